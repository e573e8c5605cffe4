"""Finds a checkpoint: a folder, or a model on the hub, which is downloaded into huggingface_hub's own cache."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

_SETTINGS = ("LICENSE*", "*.json", "*.md", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_WEIGHTS = ("*.safetensors",)
_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
# Beside its files for transformers, a repository may hold the same weights in other formats.
_OTHER_FORMATS = {False: ("*/*", "consolidated*"), True: ("*/*", "model*.safetensors*")}


def is_hub_id(model: str | os.PathLike[str]) -> bool:
    """True if `model` is a name such as ORGANISATION/NAME and there is no file or folder of that name."""
    return re.fullmatch(_ID, os.fspath(model)) is not None and not Path(model).exists()


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
    if not is_hub_id(model):
        raise ValueError(f"{model}: must be the folder of a Hugging Face checkpoint, or a hub id such as ORGANISATION/NAME")
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(f"{model}: to download it, huggingface_hub is needed: pip install 'lt-gguf[convert]'") from None
    patterns: dict[str, Any] = {
        "allow_patterns": [*_SETTINGS, *(() if remote else _WEIGHTS)],
        "ignore_patterns": list(_OTHER_FORMATS[mistral_format]),
    }
    name = os.fspath(model)
    reason = _why_unreachable(name)
    try:
        if reason is None:
            return Path(huggingface_hub.snapshot_download(name, **patterns))
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **patterns))
    except OSError as error:
        cause = reason or f"the download broke off ({type(error).__name__})"
        raise OSError(
            f"{name}: {cause}, and the local cache doesn't have all of it: must be a folder, or try again with a connection"
        ) from None
    print(f"{name}: {reason}, the local cache has it", file=sys.stderr)
    return folder


def _why_unreachable(name: str) -> str | None:
    """Asks the hub for the model; the reason if it can't be reached, `None` if it has it.

    Raises:
        ValueError: the hub has no such model, or doesn't give it to us.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().model_info(name)
    except GatedRepoError:
        raise ValueError(f"{name}: is gated: must be agreed to on the hub, and HF_TOKEN must be set to your token") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: there is no such folder, and no such model on the hub (if it is private, set HF_TOKEN)"
        ) from None
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE keeps us from the hub"
    except HfHubHTTPError as error:
        return f"can't reach the hub (status {error.response.status_code})"
    except Exception as error:
        # note: huggingface_hub's HTTP library, whose errors these are, changes with its versions
        return f"can't reach the hub ({type(error).__name__})"
    return None
