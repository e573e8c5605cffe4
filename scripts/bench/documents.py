"""Time to the first token of an answer about a document: the first time, again in the same program, and after a restart.

    python scripts/bench/documents.py [--model smollm2] [--tokens 6000] [--streaming SPEC] [--repeat 3]

The document is pages of Python's own documentation, cut to about that many tokens. Each time is from opening the document (its text is
there) to the first piece of the answer; a restart is another process, whose loading of the model is named apart. The states lie in
a folder of their own, which is removed at the end. Prints a table in Markdown, and the least and the most of each.
"""

from __future__ import annotations

import argparse
import json
import pydoc
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTION = "What does Popen do? Answer in one sentence."
PAGES = ("subprocess", "argparse", "tarfile", "typing")
NAMES = {"first": "the first time", "again": "again in the same program", "restart": "after a restart"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a GGUF file or a name (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=6000, help="of the document, about (default: %(default)s)")
    parser.add_argument("--streaming", help="a spec; else what the file says")
    parser.add_argument("--repeat", type=int, default=3, help="how often all of it is done (default: %(default)s)")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args, Path(args.child))))
        return
    seconds: dict[str, list[float]] = {name: [] for name in (*NAMES, "load")}
    said: dict[str, int] = {}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            for which in ("first", "restart"):
                found = in_a_process(folder)
                seconds[which].append(found["first"])
                seconds["load"].append(found["load"])
                if which == "first":
                    seconds["again"].append(found["again"])
                    said = {"tokens": found["tokens"], "bytes": found["bytes"]}
                elif found["read"] > 64:
                    sys.exit(f"error: after a restart {found['read']} tokens were read")
    print(f"{said['tokens']} tokens in the document; {said['bytes'] / 2**20:.1f} MiB on disk\n")
    print("| first token of the answer | median | from | to |\n| --- | --: | --: | --: |")
    for name, title in NAMES.items():
        print(f"| {title} | {statistics.median(seconds[name]):.2f} s | {min(seconds[name]):.2f} s | {max(seconds[name]):.2f} s |")
    print(f"\nLoading the model, and hashing it once: {statistics.median(seconds['load']):.2f} s")


def in_a_process(folder: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, *sys.argv, "--child", folder], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def measured(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    from lt_gguf import Llama
    from lt_gguf.chat.conversation import Conversation
    from lt_gguf.documents import read_bytes
    from lt_gguf.models import resolve
    from lt_gguf.runtime.kept_states import KeptStates
    from lt_gguf.runtime.state_store import StateStore

    begun = time.monotonic()
    llm = Llama(resolve(args.model), n_ctx=0, streaming=args.streaming, verbose=False)
    kept = KeptStates(llm, StateStore(folder))
    assert kept.identity  # which hashes the model
    load = time.monotonic() - begun
    conversation = Conversation(llm, temperature=0.0, n_predict=24, kept=kept)
    pages = [pydoc.plain(pydoc.render_doc(name)) for name in PAGES]
    text = re.sub(r"[ \t]+", " ", "\n".join(pages))
    n_characters = args.tokens * len(text) // len(llm.tokenize(text.encode(), add_bos=False))
    document = read_bytes(text[:n_characters].encode(), "documentation.txt")
    times = []
    for _ in range(2):
        read_before, begun = llm.n_read, time.monotonic()
        first: list[float] = []
        conversation.attach([document])
        conversation.ask(QUESTION, lambda _, first=first: first.append(time.monotonic()))
        times.append((first[0] - begun, llm.n_read - read_before))
        conversation.reset()
    n_tokens, n_bytes = len(conversation.prompts.document_tokens(document)), kept.store.n_bytes
    return {"first": times[0][0], "read": times[0][1], "again": times[1][0], "load": load, "tokens": n_tokens, "bytes": n_bytes}


if __name__ == "__main__":
    main()
