"""What a text means where a GGUF file is asked for: a path, a name, or a model on the hub."""

from __future__ import annotations

import difflib
import errno
import os
import re
from pathlib import Path
from typing import Any

from lt_gguf.models import hub
from lt_gguf.models.named import MODELS

FORMS = f"a GGUF file, a name ({', '.join(MODELS)}), or a model on the hub as ORG/NAME, ORG/NAME:Q4_K_M or ORG/NAME:*q8_0*.gguf"


def resolve(model: str | os.PathLike[str], forms: str = FORMS) -> Path:
    """The GGUF file that `model` stands for, the first one of a split model; what isn't on this machine is downloaded.

    A path that exists always wins. Then names go before models on the hub.

    Args:
        model: a path; a name of `MODELS`; or ORG/NAME on the hub, of which a quantization's name or a pattern of file names
            may choose the file, as in ORG/NAME:Q4_K_M.
        forms: what an error says is allowed.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
        ValueError: it is none of these, or the hub has no such model or file.
        OSError: it can't be downloaded; one line with what to do.
        ImportError: it is on the hub, and huggingface_hub isn't installed.
    """
    path, text = Path(model), os.fspath(model)
    if path.is_dir():
        raise ValueError(f"{model}: is a folder, must be {forms}")
    if path.exists():
        return path
    if is_named(text):
        return Path(local_path(text))
    if hub_model := split_hub_name(text):
        from lt_gguf.models import hub_files

        return hub_files.fetch(*hub_model)
    if is_path(text):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
    near = difflib.get_close_matches(text.lower(), MODELS, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"{text}: there is no such file and no model of that name{hint}, must be {forms}")


def resolve_on_hub(model: str | os.PathLike[str], filename: str | None, **settings: Any) -> Path:
    """The GGUF file of a model on the hub, whatever lies at a path of that name.

    Args:
        model: ORG/NAME, or ORG/NAME:PATTERN.
        filename: the pattern, if the name has none.
        settings: as for `hub_files.fetch`.

    Raises:
        ValueError: it isn't the name of a model on the hub; else as `resolve` does.
    """
    found = split_hub_name(os.fspath(model))
    if found is None:
        raise ValueError(f"{model}: must be a model on the hub, as ORG/NAME, for a file name, a folder or a cache to count")
    repo, pattern = found
    if pattern is not None and filename is not None:
        raise ValueError(f"{model}: says which file, and so does {filename}: give one of them")
    from lt_gguf.models import hub_files

    return hub_files.fetch(repo, filename or pattern, **settings)


def local_path(model: str | os.PathLike[str]) -> str:
    """The path of a name of `MODELS`; anything else is a path, whether or not something is there.

    Raises:
        OSError: as `resolve` does.
    """
    text = os.fspath(model)
    if not is_named(text):
        return text
    from lt_gguf.models import package

    return str(package.fetch(MODELS[text]))


def is_named(model: str | os.PathLike[str]) -> bool:
    """True if `model` is a name of `MODELS`, and there is no file or folder of that name."""
    return os.fspath(model) in MODELS and not Path(model).exists()


def is_path(model: str | os.PathLike[str]) -> bool:
    """True if `model` is a file or folder, or, as there is none, can't be meant for anything else."""
    text = os.fspath(model)
    if Path(text).exists():
        return True
    return text not in MODELS and split_hub_name(text) is None and (text.endswith(".gguf") or os.sep in text)


def is_gguf(model: str | os.PathLike[str]) -> bool:
    """False if `model` is a checkpoint: a folder, or a model on the hub that isn't GGUF files alone.

    Raises:
        ValueError: the hub has no such model, or doesn't give it to us.
    """
    if Path(model).is_dir():
        return False
    name = split_hub_name(os.fspath(model))
    if name is None or name[1] is not None or Path(model).exists():
        return True
    from lt_gguf.models import hub_files

    return hub_files.has_only_gguf(name[0])


def split_hub_name(text: str) -> tuple[str, str | None] | None:
    """ORG/NAME and what follows its colon, `None` if nothing does; `None` for a text that isn't of that form."""
    found = re.fullmatch(rf"({hub.ID_PATTERN})(?::(.+))?", text)
    # note: models/small.gguf is a file that isn't there
    if found is None or (found[2] is None and text.endswith(".gguf")):
        return None
    return found[1], found[2]
