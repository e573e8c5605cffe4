"""Finds a checkpoint: a folder, or a model on the hub, which is downloaded into huggingface_hub's own cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lt_gguf.models import hub

_SETTINGS = ("LICENSE*", "*.json", "*.md", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_WEIGHTS = ("*.safetensors",)
# Beside its files for transformers, a repository may hold the same weights in other formats.
_OTHER_FORMATS = {False: ("*/*", "consolidated*"), True: ("*/*", "model*.safetensors*")}


def resolve(model: str | os.PathLike[str], remote: bool = False, mistral_format: bool = False) -> Path:
    """The folder of a checkpoint.

    Args:
        model: a folder, or a model's id on the hub.
        remote: of a model on the hub, only what is needed beside its weights.
        mistral_format: of a model on the hub, the files in Mistral's own format.

    Raises:
        ValueError: there is no such folder, and no such model.
        OSError: the hub can't be reached, and the local cache doesn't have the whole model.
    """
    if Path(model).is_dir():
        return Path(model)
    if not hub.is_hub_id(model):
        raise ValueError(f"{model}: must be the folder of a Hugging Face checkpoint, or a hub id such as ORGANISATION/NAME")
    name = os.fspath(model)
    huggingface_hub = hub.client(name, "convert")
    patterns: dict[str, Any] = {
        "allow_patterns": [*_SETTINGS, *(() if remote else _WEIGHTS)],
        "ignore_patterns": list(_OTHER_FORMATS[mistral_format]),
    }
    _, reason = hub.ask(name, "folder")
    try:
        if reason is None:
            hub.remove_leftovers(name)
            return Path(huggingface_hub.snapshot_download(name, **patterns))
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **patterns))
    except OSError as error:
        raise hub.not_whole(name, "folder", reason, error) from None
    hub.say_cached(name, reason)
    return folder
