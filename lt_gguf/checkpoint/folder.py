"""What the folder of a Hugging Face checkpoint must have, looked at before anything is converted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CARD = "README.md"

_WEIGHTS = {False: ("model*.safetensors", "pytorch_model*.bin"), True: ("consolidated*.safetensors",)}  # by mistral_format
_INDEX = "model.safetensors.index.json"


def read_config(name: str, folder: Path, mistral_format: bool = False) -> dict[str, Any]:
    """What the checkpoint's config.json says; nothing if it is in Mistral's format.

    Args:
        name: of the checkpoint, for messages.

    Raises:
        ValueError: there is none, or it isn't one.
    """
    path = folder / ("params.json" if mistral_format else "config.json")
    if not path.is_file():
        raise ValueError(f"{name}: has no {path.name}, must be the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("is no JSON object")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {} if mistral_format else config


def check_weights(name: str, folder: Path, mistral_format: bool = False) -> None:
    """Raises ValueError if files of weights are missing."""
    patterns = _WEIGHTS[mistral_format]
    if not any(next(folder.glob(pattern), None) for pattern in patterns):
        raise ValueError(f"{name}: has no weights, must have {' or '.join(patterns)}")
    index = folder / _INDEX
    if mistral_format or not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{index}: must be JSON with a "weight_map", the file of each tensor') from None
    if missing := sorted(file for file in files if not (folder / file).is_file()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{name}: {missing[0]}{more} of {len(files)} files of weights are missing")


def license_of(folder: Path) -> str | None:
    """What the checkpoint's own card says in its front matter, `None` if it doesn't."""
    card = folder / CARD
    if not card.is_file():
        return None
    front_matter = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    said = re.search(r"^license:\s*[\"']?([\w.+-]+)", front_matter[1], re.MULTILINE) if front_matter else None
    return said[1] if said else None
