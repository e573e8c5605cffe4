"""GGUF files on the hub: which one of a repository is meant, and its download into huggingface_hub's own cache."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from lt_gguf.models import hub

# Of several files, as llama.cpp's -hf does: the one of these quantizations, else the first.
PREFERRED = ("Q4_K_M", "Q8_0")
# What lies beside a model and isn't one: projectors of pictures, importance matrices, drafts.
_COMPANION = re.compile(r"mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_N_NAMED = 8  # files in a message; a repository may have dozens

PathLike = str | os.PathLike[str]


def fetch(
    repo: str,
    pattern: str | None = None,
    *,
    additional_files: Iterable[str] = (),
    local_dir: PathLike | None = None,
    cache_dir: PathLike | None = None,
) -> Path:
    """The GGUF file of a model on the hub, the first one of a split model; what isn't in the local cache is downloaded.

    huggingface_hub shows how far it is, and goes on with a download that breaks off; one that was killed begins anew, and what it
    has left goes. Without a connection, or with HF_HUB_OFFLINE, the local cache is asked.

    Args:
        repo: ORG/NAME.
        pattern: a quantization's name, as in Q4_K_M, or a pattern of file names, as in *q8_0*.gguf. `None`: the only file, or
            the first of `PREFERRED`.
        additional_files: names or patterns of other files to download with it.
        local_dir: folder to download to, instead of the cache.
        cache_dir: of huggingface_hub, instead of its own.

    Raises:
        ValueError: the hub has no such model or file, doesn't give it to us, or a pattern fits several.
        OSError: the hub can't be reached, and the local cache doesn't have all of it.
        ImportError: huggingface_hub isn't installed.
    """
    huggingface_hub = hub.client(repo, "hub")
    files, unreachable = hub.ask(repo, "file")
    if unreachable:
        files = _cached_files(huggingface_hub, repo, local_dir, cache_dir)
        if not any(map(_is_gguf, files)):
            raise hub.not_whole(repo, "file", unreachable)
    chosen = choose(repo, files, pattern, "the local cache" if unreachable else "it")
    wanted = [*_parts(repo, chosen, files), *(_only_match(repo, files, extra) for extra in additional_files)]
    if unreachable is None:
        hub.remove_leftovers(repo, cache_dir)
    settings = {"local_dir": local_dir, "cache_dir": cache_dir, "local_files_only": unreachable is not None}
    try:
        paths = [Path(huggingface_hub.hf_hub_download(repo, file, **settings)) for file in wanted]
    except Exception as error:  # note: those of huggingface_hub's HTTP library among them, which changes with its versions
        raise hub.not_whole(repo, "file", unreachable, error) from None
    if unreachable:
        hub.say_cached(repo, unreachable)
    return paths[0]


def has_only_gguf(repo: str) -> bool:
    """True if the model on the hub has GGUF files and no weights for transformers.

    Raises:
        ValueError: the hub has no such model, or doesn't give it to us.
    """
    try:
        huggingface_hub = hub.client(repo, "hub")
    except ImportError:
        return False
    files, unreachable = hub.ask(repo, "file or folder")
    if unreachable:
        files = _cached_files(huggingface_hub, repo, None, None)
    return any(map(_is_gguf, files)) and not any(file.endswith((".safetensors", ".bin")) for file in files)


def choose(repo: str, files: Iterable[str], pattern: str | None, where: str = "it") -> str:
    """Which of a repository's files is meant, of a split model the first one; says on stderr what else there was to choose.

    Args:
        repo, pattern: as for `fetch`.
        files: the names of all that it has.
        where: what has them, in messages.

    Raises:
        ValueError: there is no such file, or a pattern of names fits several.
    """
    files = sorted(files)
    models = [file for file in files if _is_model(file)]
    if pattern in files:
        return pattern
    if not models:
        hint = f": it is a checkpoint, lt-gguf convert {repo} makes one" if any(f.endswith(".safetensors") for f in files) else ""
        raise ValueError(f"{repo}: has no GGUF file{hint}")
    if pattern is None:
        found = models if len(models) == 1 else next(filter(None, (_of_type(models, tag) for tag in PREFERRED)), models)
        others = [file for file in models if file != found[0]]
    elif pattern.endswith(".gguf") or any(sign in pattern for sign in "*?["):
        found = _matching(models, pattern)
        if len(found) > 1:
            raise ValueError(f"{repo}: {pattern} fits {len(found)} files, must fit one: {_named(found)}")
        others = []
    else:
        found = _of_type(models, pattern)
        others = found[1:]
    if not found:
        raise ValueError(f"{repo}: {where} has no file for {pattern}, must be one of {_named(models)}")
    if others:
        print(f"{repo}: taking {found[0]}; others that fit: {_named(others)}", file=sys.stderr)
    return found[0]


def _is_gguf(file: str) -> bool:
    return file.endswith(".gguf")


def _is_model(file: str) -> bool:
    """True for GGUF files that a model is loaded from: no companions, no later parts."""
    name = file.rsplit("/", 1)[-1]
    part = _PART.fullmatch(name)
    return _is_gguf(file) and not _COMPANION.search(name) and (part is None or int(part["number"]) == 1)


def _of_type(files: Sequence[str], tag: str) -> list[str]:
    """The files with this quantization in their name."""
    return [file for file in files if re.search(rf"(?<![A-Za-z0-9]){re.escape(tag)}[.-]", file, re.IGNORECASE)]


def _matching(files: Sequence[str], pattern: str) -> list[str]:
    pattern = pattern.lower()
    return [f for f in files if fnmatch.fnmatch(f.lower(), pattern) or fnmatch.fnmatch(f.rsplit("/", 1)[-1].lower(), pattern)]


def _only_match(repo: str, files: Sequence[str], pattern: str) -> str:
    found = [pattern] if pattern in files else _matching(files, pattern)
    if len(found) != 1:
        raise ValueError(f"{repo}: {pattern} fits {len(found)} files, must fit one: {_named(found or files)}")
    return found[0]


def _parts(repo: str, first: str, files: Sequence[str]) -> list[str]:
    """All files of the model. Raises ValueError if some aren't there."""
    part = _PART.fullmatch(first)
    if part is None:
        return [first]
    parts = [f"{part['stem']}-{number:05}-of-{part['count']}.gguf" for number in range(1, int(part["count"]) + 1)]
    if missing := [file for file in parts if file not in files]:
        raise ValueError(
            f"{repo}: {first} is the first of {len(parts)} files, of which {len(missing)} are missing: {_named(missing)}"
        )
    return parts


def _named(files: Sequence[str]) -> str:
    more = f" and {len(files) - _N_NAMED} more" if len(files) > _N_NAMED else ""
    return ", ".join(files[:_N_NAMED]) + more


def _cached_files(huggingface_hub: ModuleType, repo: str, local_dir: PathLike | None, cache_dir: PathLike | None) -> list[str]:
    """The files of the model that are on this machine, as they are named on the hub."""
    if local_dir is not None:
        folder = Path(local_dir)
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf") if ".cache" not in file.parts]
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = huggingface_hub.scan_cache_dir(cache_dir)
    except CacheNotFound:
        return []
    return [
        file.file_path.relative_to(revision.snapshot_path).as_posix()
        for entry in cached.repos
        if entry.repo_type == "model" and entry.repo_id == repo
        for revision in entry.revisions
        if "main" in revision.refs
        for file in revision.files
    ]
