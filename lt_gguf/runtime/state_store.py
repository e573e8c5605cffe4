"""Saved states on disk: what a model has read once needn't be read again, in this process or another one, today or next week.

A state is found by *whose* it is (model, spec, types of the cache: `kept_states.identity`) and by its tokens: the one that has most
of a prompt's beginning. The folder has a bound; who was used longest ago goes first. Files are written under another name and
renamed, each has a checksum, and a lock keeps processes from removing what another one reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lt_gguf.memory.sizes import format_bytes
from lt_gguf.models.package import user_cache
from lt_gguf.runtime.state_file import DamagedError, StateHeader, opened_state, read_header, read_part, write_state

DEFAULT_LIMIT = 4 << 30  # bytes
TOKENS = "tokens"  # the part that holds them, int32

_FOLDER = "states"
_NAME = re.compile(r"[0-9a-f]{24}-[0-9a-f]{24}\.state")
_UNFINISHED = ".unfinished-"
_LEFT_BEHIND = 3600.0  # seconds: an unfinished file that is older is nobody's


@dataclass(frozen=True)
class Entry:
    """A state in the store.

    Args:
        path: its file.
        header: what it says of itself.
        n_bytes: on disk.
        used_at: when it was last written or restored, seconds since the epoch.
    """

    path: Path
    header: StateHeader
    n_bytes: int
    used_at: float

    @property
    def n_tokens(self) -> int:
        return int(self.header.fields.get("n_tokens", 0))

    @property
    def label(self) -> str:
        """What a person calls it, such as the name of a document."""
        return str(self.header.fields.get("label", ""))

    @property
    def model(self) -> str:
        """The name of the model's file."""
        return str(self.header.fields.get("model", ""))


class StateStore:
    """A folder of saved states.

    Args:
        folder: `None`: that of the user cache. It is made when something is kept.
        limit: most bytes that its files take together; 0: nothing is kept, and nothing found.

    Attributes:
        noticed: lines about files that were damaged and have been removed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = user_cache() / _FOLDER if folder is None else Path(folder)
        self.limit = limit
        self.noticed: list[str] = []

    def entries(self) -> list[Entry]:
        """All states, those first that were used last. A damaged file is removed and noticed; others' files are passed over."""
        found = []
        for path in self._files():
            try:
                status = path.stat()
                found.append(Entry(path, read_header(path), status.st_size, status.st_mtime))
            except DamagedError as error:
                self.drop(path, str(error))
            except OSError:  # removed meanwhile, or not readable
                continue
        return sorted(found, key=lambda entry: -entry.used_at)

    @property
    def n_bytes(self) -> int:
        """Of all states on disk."""
        return sum(size for _, size, _ in self._sizes())

    def find(self, identity: str, tokens: Sequence[int]) -> tuple[Entry, int] | None:
        """The state of `identity` that spares most of reading a prompt, and how many of its tokens; `None` if none does."""
        best: tuple[Entry, int] | None = None
        if self.limit == 0:
            return None
        wanted = np.asarray(tokens, np.int32)
        for entry in self.entries():
            if entry.header.fields.get("identity") != identity:
                continue
            try:
                kept = np.frombuffer(read_part(entry.path, entry.header, TOKENS), np.int32)
                n = _n_usable(entry, kept, wanted)
            except (DamagedError, ValueError, TypeError, AttributeError) as error:
                self.drop(entry.path, str(error))
                continue
            except OSError:
                continue
            # note: of two that spare as much, the smaller one is there sooner
            if n and (best is None or (n, -entry.n_bytes) > (best[1], -best[0].n_bytes)):
                best = entry, n
        return best

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[tuple[StateHeader, dict[str, memoryview]]]:
        """The parts of a state, its checksum compared; they are valid within the block, and nobody removes it meanwhile.

        Raises:
            DamagedError: it isn't what was written. It has been removed, and that is noticed.
            OSError: it can't be read.
        """
        with self._locked(fcntl.LOCK_SH):
            try:
                with opened_state(entry.path) as (header, parts):
                    if header != entry.header:
                        raise DamagedError(f"{entry.path.name}: was replaced")
                    with suppress(OSError):
                        os.utime(entry.path)  # it is the last one to go now
                    yield header, parts
            except DamagedError as error:
                self.drop(entry.path, str(error))
                raise

    def put(self, identity: str, tokens: Sequence[int], fields: Mapping[str, Any], parts: Mapping[str, Any]) -> bool:
        """Keeps a state in place of one with the same tokens, and removes what then is too much.

        Args:
            fields: what else its header says; `n_tokens` and `identity` are added.
            parts: its parts beside the tokens.

        Returns:
            false if it alone is larger than the limit; nothing has changed.

        Raises:
            OSError: it can't be written, for example because the disk is full; nothing has changed.
        """
        array = np.ascontiguousarray(tokens, np.int32)
        parts = {TOKENS: array} | dict(parts)
        if sum(memoryview(part).nbytes for part in parts.values()) > self.limit:
            return False
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # note: they hold what a person's documents say
        path = self.folder / f"{identity[:24]}-{hashlib.blake2b(array.tobytes(), digest_size=12).hexdigest()}.state"
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=_UNFINISHED, delete=False) as unfinished:
            try:
                write_state(unfinished, {**fields, "identity": identity, "n_tokens": len(array)}, parts)
                unfinished.close()
                with self._locked(fcntl.LOCK_EX):
                    os.replace(unfinished.name, path)
                    self._trim(path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished.name)
                raise
        return path.exists()

    def clear(self) -> int:
        """Removes all states; returns the bytes that they took. Files of others stay."""
        with self._locked(fcntl.LOCK_EX):
            n_bytes = 0
            for path, size, _ in self._sizes():
                path.unlink(missing_ok=True)
                n_bytes += size
            self._remove_unfinished(0)
        return n_bytes

    def drop(self, path: Path, why: str) -> None:
        """Removes a damaged file, and notices it."""
        with suppress(OSError):
            path.unlink()
        self.noticed.append(why)

    def take_noticed(self) -> list[str]:
        """The lines about damaged files, each given once."""
        noticed, self.noticed = self.noticed, []
        return noticed

    def _files(self) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        except OSError:
            return []

    def _sizes(self) -> list[tuple[Path, int, float]]:
        """Path, bytes and time of last use of each."""
        sizes = []
        for path in self._files():
            with suppress(OSError):
                status = path.stat()
                sizes.append((path, status.st_size, status.st_mtime))
        return sizes

    def _trim(self, newest: Path) -> None:
        """Removes the oldest until the rest fits; whoever calls has the lock."""
        sizes = sorted(self._sizes(), key=lambda one: (one[0] == newest, one[2]))
        total = sum(size for _, size, _ in sizes)
        for path, size, _ in sizes:
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._remove_unfinished(_LEFT_BEHIND)

    def _remove_unfinished(self, older_than: float) -> None:
        with suppress(OSError):
            for path in self.folder.glob(f"{_UNFINISHED}*"):
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime >= older_than:
                        path.unlink()

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Where the file system has no locks, as some networks' have none, the checksum alone has to do."""
        if not self.folder.is_dir():
            yield
            return
        with open(self.folder / ".lock", "a") as lock:
            with suppress(OSError):
                fcntl.flock(lock, how)
            yield


def _n_usable(entry: Entry, kept: np.ndarray, wanted: np.ndarray) -> int:
    """How many of a prompt's tokens needn't be read once the state is restored. What streams can only be cut at its snapshots."""
    shorter = min(len(kept), len(wanted))
    differs = np.nonzero(kept[:shorter] != wanted[:shorter])[0]
    common = int(differs[0]) if len(differs) else shorter
    fields = entry.header.fields
    if common == len(kept) or not fields["streams"]:
        return common
    return max((int(n) for n in fields["cuts"] if n <= common), default=0)


def describe_limit(store: StateStore) -> str:
    """As in "1.20 GiB of 4.00 GiB"."""
    return f"{format_bytes(store.n_bytes)} of {format_bytes(store.limit)}"
