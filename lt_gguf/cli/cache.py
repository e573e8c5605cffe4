"""`lt-gguf cache`: what models have read, kept on disk."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from typing import Annotated

import typer

from lt_gguf.memory.sizes import format_bytes
from lt_gguf.runtime.state_store import StateStore


class Action(StrEnum):
    """What can be done with the cache."""

    LIST = "list"
    CLEAR = "clear"


def cache(
    action: Annotated[Action, typer.Argument(help="list: what is there; clear: remove all of it.", metavar="list|clear")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """What models have read, kept on disk so that it isn't read again: documents and conversations of lt-gguf chat."""
    store = StateStore()
    if action is Action.CLEAR:
        n = len(store.entries())
        n_bytes = store.clear()
        print(f"removed {n} states, {format_bytes(n_bytes)}, from {store.folder}")
        return
    entries = store.entries()
    for line in store.take_noticed():
        print(f"removed: {line}", file=sys.stderr)
    if as_json:
        listed = [
            {"label": one.label, "model": one.model, "tokens": one.n_tokens, "bytes": one.n_bytes, "used": round(one.used_at)}
            for one in entries
        ]
        print(json.dumps({"folder": str(store.folder), "bytes": store.n_bytes, "states": listed}, indent=2))
        return
    for one in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used_at))
        print(f"{used}  {one.n_tokens:>7} tokens  {format_bytes(one.n_bytes):>10}  {one.model}  {one.label}")
    print(f"{len(entries)} states, {format_bytes(store.n_bytes)}, in {store.folder}")
