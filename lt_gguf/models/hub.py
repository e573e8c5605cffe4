"""The hub of models: whether it can be reached, what it has, and how it is said if it can't. (huggingface_hub does the work.)"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

# What the system says where a file can't be written, for another reason than a full disk.
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENOTDIR)
ID_PATTERN = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def is_hub_id(model: str | os.PathLike[str]) -> bool:
    """True if `model` is a name such as ORGANISATION/NAME and there is no file or folder of that name."""
    return re.fullmatch(ID_PATTERN, os.fspath(model)) is not None and not Path(model).exists()


def client(name: str, extra: str) -> ModuleType:
    """The package huggingface_hub. Raises ImportError: it isn't installed, but comes with our `extra`."""
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise ImportError(f"{name}: to download it, huggingface_hub is needed: pip install 'lt-gguf[{extra}]'") from None


def ask(name: str, kind: str) -> tuple[list[str], str | None]:
    """Asks the hub for a model; `kind` of path is what else its name could have been.

    Returns:
        The names of its files, and `None`; or no names, and the reason for which the hub can't be reached.

    Raises:
        ValueError: the hub has no such model, or doesn't give it to us.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        info = huggingface_hub.HfApi().model_info(name)
    except HFValidationError:
        raise ValueError(f"{name}: there is no such {kind}, and no model on the hub can have that name") from None
    except GatedRepoError:
        raise ValueError(f"{name}: is gated: must be agreed to on the hub, and HF_TOKEN must be set to your token") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: there is no such {kind}, and no such model on the hub (if it is private, set HF_TOKEN)"
        ) from None
    except OfflineModeIsEnabled:
        return [], "HF_HUB_OFFLINE keeps us from the hub"
    except HfHubHTTPError as error:
        return [], f"can't reach the hub (status {error.response.status_code})"
    except Exception as error:
        # note: huggingface_hub's HTTP library, whose errors these are, changes with its versions
        return [], f"can't reach the hub ({type(error).__name__})"
    return [file.rfilename for file in info.siblings or []], None


def not_whole(name: str, kind: str, reason: str | None, error: Exception | None = None) -> OSError:
    """The error to raise when neither the hub, for the `reason` of `ask`, nor the local cache gives all of the model."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(
            f"{name}: the disk of huggingface_hub's cache is full: free some space, or set HF_HOME to a folder elsewhere"
        )
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        where = f" ({error.filename})" if error.filename else ""
        return OSError(
            f"{name}: huggingface_hub's cache can't be written{where}: {error.strerror}: set HF_HOME to a folder that can"
        )
    cause = reason or f"the download broke off ({type(error).__name__})"
    return OSError(f"{name}: {cause}, and the local cache doesn't have all of it: must be a {kind}, or try again with a connection")


def say_cached(name: str, reason: str) -> None:
    """Says that the model comes from the local cache, and why."""
    print(f"{name}: {reason}, the local cache has it", file=sys.stderr)


def remove_leftovers(name: str, cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Removes what killed downloads of a model have left in huggingface_hub's cache, and says so.

    Each download writes to a file of its own, with which no later one goes on, so that gigabytes would stay for good. (Earlier versions
    had one file for all of them, without the part between the dots, and do go on with it: that one stays.)
    """
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    folder = f"models--{name.replace('/', '--')}"
    n_bytes = 0
    for leftover in (cache / folder / "blobs").glob("*.*.incomplete"):
        lock = cache / ".locks" / folder / f"{leftover.name.split('.')[0]}.lock"
        with suppress(OSError), open(lock, "a") as file:  # held while it is downloaded; where there are no locks, it stays
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = leftover.stat().st_size
            leftover.unlink()
            n_bytes += size
    if n_bytes:
        said = f"{n_bytes / 1e6:.1f} MB of an interrupted download are removed: it begins anew, huggingface_hub can't go on with it"
        print(f"{name}: {said}", file=sys.stderr)
