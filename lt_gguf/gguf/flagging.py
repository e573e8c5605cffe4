"""Adds, changes or removes our metadata of a GGUF file, what streams and what is recommended for the cache, without touching its tensors.

A new file has the old one's keys in their order, byte for byte: ours are replaced where they stand, or come after the
others. The tensors' offsets count from where the tensors begin, so what the file says of them is copied as it is too, and
the tensors through a small buffer. Of a split model only the first file changes (llama.cpp reads the keys from there); the others
are copied. They are not hard links: the new model must not change with the old one. Where the file system can share blocks
until one of the files changes (Btrfs, XFS), `copy_file_range` does.

All files grow in a hidden folder beside their destination and are renamed when they are complete, the first one last, so
whatever ends the work, under the final name there is either a complete model or nothing new. As with `cp`, nothing waits
until the data is on the disk.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lt_gguf.gguf.file import describe_model, model_files, split_files
from lt_gguf.gguf.header import GGUFLayout, encode_pair, read_layout
from lt_gguf.gguf.unfinished import unfinished_folder
from lt_gguf.spec import CacheRecommendation, Provenance, StreamingSpec, Typed
from lt_gguf.spec.keys import VERSION_KEY, cache_prefix, streaming_keys

Progress = Callable[[int, int], None]  # bytes written, bytes in all

# What a disk writes as a whole or not at all, however old it is.
SECTOR = 512

_N_KEYS_OFFSET = 16  # in the file: magic, version, number of tensors, number of keys
_PROVENANCE_PREFIX = VERSION_KEY.partition(".")[0] + "."
_KERNEL_CHUNK = 64 << 20  # bytes between two looks at Ctrl-C and the progress display
_BUFFER = 256 << 10  # fits into a core's cache: 1 MiB took 1.4 times as long
_BLOCK = 4096  # of file systems: data that moves by less can't be shared, and pieces of pages are slow to move in the kernel
# copy_file_range isn't there, or not between these two files
_ONLY_BY_HAND = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def flag(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    spec: StreamingSpec | None,
    provenance: Provenance | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    recommended: CacheRecommendation | None = None,
) -> list[Path]:
    """Writes the model `source` to `destination` with another streaming spec.

    Args:
        source: GGUF file, the first one of a split model.
        destination: file to write, the first one of a split model, or a folder, in which it has the source's name.
        spec: which layers stream, `None`: an ordinary model.
        provenance: how the layers were chosen. `None`: the file doesn't say.
        progress: is told from time to time how far the copy is.
        overwrite: replace existing files.
        recommended: types of the KV cache. `None`: the file recommends none.

    Returns:
        The files written.

    Raises:
        ValueError: `source` is no GGUF model, or can't stream so, or `destination` won't do.
        OSError: a file can't be read or written.
    """
    source = Path(source)
    layout = read_layout(source)
    metadata = _new_metadata(source, layout, spec, provenance, recommended)
    sources = model_files(source, layout.header)
    destinations = _destinations(sources, Path(destination), overwrite)
    header = _new_header(layout, metadata)
    parts: list[Sequence[bytes | range]] = [[*header, layout.data], *([range(file.stat().st_size)] for file in sources[1:])]
    count = _Count(sum(len(piece) for pieces in parts for piece in pieces), progress)
    folder = destinations[0].parent
    with unfinished_folder(folder, ".flagging-") as hidden:
        unfinished = [hidden / file.name for file in destinations]
        for pieces, old, new, final in zip(parts, sources, unfinished, destinations):
            try:
                _write(pieces, old, new, count)
            except OSError as error:
                if error.filename == str(old):
                    raise
                # note: the name that the user gave; the hidden one says nothing to anybody
                raise OSError(error.errno, error.strerror or str(error), str(final)) from None
        _publish(unfinished, destinations)
    return destinations


def flag_in_place(
    path: str | os.PathLike[str],
    spec: StreamingSpec | None,
    provenance: Provenance | None = None,
    recommended: CacheRecommendation | None = None,
) -> bool:
    """Changes our metadata of the model at `path` where it stands, if that is safe; the arguments are `flag`'s.

    It is safe if nothing moves and all that changes lies in one sector of the disk: a single write of it can't be
    interrupted by a signal, and a disk that loses its power has written all of it or nothing. So at any moment the file is
    what it was or what it is to be. Anything larger could be torn. A copy of the old header beside the file wouldn't help:
    llama.cpp, which loads the file next, knows nothing of it.

    Returns:
        False if the file already says just that.

    Raises:
        ValueError: it isn't safe, the file has other names that would change with it, or as for `flag`.
        OSError: the file can't be written.
    """
    path = Path(path)
    layout = read_layout(path)
    metadata = _new_metadata(path, layout, spec, provenance, recommended)
    pieces = _new_header(layout, metadata)
    with open(path, "rb") as file:
        old = file.read(layout.data.start)
    new = b"".join(old[piece.start : piece.stop] if isinstance(piece, range) else piece for piece in pieces)
    if old == new:
        return False
    if path.is_symlink() or path.stat().st_nlink > 1:
        raise ValueError(f"{path}: has other names, which would change with it: write a new file instead")
    if len(old) != len(new):
        raise ValueError(
            f"{path}: can't be changed in place: what stands before the tensors would take {len(new):,} bytes "
            f"instead of {len(old):,}: write a new file instead"
        )
    changed = [at for at in range(0, len(old), SECTOR) if old[at : at + SECTOR] != new[at : at + SECTOR]]
    if len(changed) > 1:
        raise ValueError(
            f"{path}: can't be changed in place: the change is in {len(changed)} sectors of {SECTOR} bytes, of which a crash "
            "could leave some unwritten: write a new file instead"
        )
    with open(path, "r+b", buffering=0) as file:
        file.seek(changed[0])
        file.write(new[changed[0] : changed[0] + SECTOR])
        os.fsync(file.fileno())
    return True


def _new_metadata(
    source: Path,
    layout: GGUFLayout,
    spec: StreamingSpec | None,
    provenance: Provenance | None,
    recommended: CacheRecommendation | None,
) -> dict[str, Typed]:
    """Our keys in the model at `source` when it says all that is new.

    Raises:
        ValueError: that doesn't fit the model, or the model is malformed.
    """
    arch = str(layout.header.metadata.get("general.architecture", Typed("string", "")).value)
    ours = {} if spec is None else spec.to_metadata(arch)
    if provenance is not None and spec is not None:
        ours |= provenance.to_metadata()
    if recommended is not None:
        ours |= recommended.to_metadata(arch)
    others = {key: value for key, value in layout.header.metadata.items() if not _is_ours(key, arch)}
    describe_model(source, replace(layout.header, metadata=others | ours))  # raises what would be wrong with the new file
    return ours


def _is_ours(key: str, arch: str) -> bool:
    return key in streaming_keys(arch) or key.startswith((_PROVENANCE_PREFIX, cache_prefix(arch)))


def _new_header(layout: GGUFLayout, ours: dict[str, Typed]) -> list[bytes | range]:
    """All that stands before the tensors: new bytes, and ranges of the old file."""
    arch = str(layout.header.metadata["general.architecture"].value)
    left = dict(ours)
    pairs: list[bytes | range] = []
    for key, pair in layout.pairs.items():
        if key in left:
            pairs.append(encode_pair(key, left.pop(key)))
        elif not _is_ours(key, arch):
            pairs.append(pair)
    pairs += [encode_pair(key, value) for key, value in left.items()]
    pieces: list[bytes | range] = [range(_N_KEYS_OFFSET), struct.pack("=Q", len(pairs)), *pairs, layout.tensor_infos]
    if layout.header.n_tensors or layout.data.start > layout.tensor_infos.stop:
        pieces.append(bytes(-sum(map(len, pieces)) % layout.alignment))
    return _joined(pieces)


def _joined(pieces: Sequence[bytes | range]) -> list[bytes | range]:
    """The same with ranges that follow each other as one: a system call less for each key."""
    joined: list[bytes | range] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, range) and isinstance(last, range) and last.stop == piece.start:
            joined[-1] = range(last.start, piece.stop)
        else:
            joined.append(piece)
    return joined


def _destinations(sources: Sequence[Path], destination: Path, overwrite: bool) -> list[Path]:
    if destination.is_dir():
        destination = destination / sources[0].name
    if not destination.parent.is_dir():
        raise ValueError(f"{destination}: the folder {destination.parent} doesn't exist")
    try:
        files = split_files(destination, len(sources))
    except ValueError as error:
        raise ValueError(f"{destination}: {error}") from None
    if files[0] != destination:
        raise ValueError(f"{destination}: is not the first of {len(files)} files, which is named {files[0].name}")
    for file in files:
        if not os.path.lexists(file):
            continue
        for source in sources:
            if file.exists() and file.samefile(source):
                raise ValueError(f"{file}: is the same file as {source}: give it another name, or use --in-place")
        if file.exists() and not file.is_file():
            raise ValueError(f"{file}: is there and is no ordinary file, give another name")
        if not overwrite:
            raise FileExistsError(f"{file}: exists, remove it or use --overwrite")
    return files


class _Count:
    """Adds up what is written."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.told = 0

    def __call__(self, n_bytes: int) -> None:
        self.done += n_bytes
        # note: not after every buffer, there are thousands of them
        if self.progress and (self.done == self.total or self.done - self.told >= _KERNEL_CHUNK):
            self.told = self.done
            self.progress(self.done, self.total)


def _write(pieces: Sequence[bytes | range], source: Path, target: Path, count: _Count) -> None:
    """Writes a new file of bytes and of ranges of `source`. Raises ValueError if `source` is shorter than it was."""
    with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
        for piece in pieces:
            if isinstance(piece, range):
                if not _copy(old.fileno(), new.fileno(), piece, count):
                    raise ValueError(f"{source}: became shorter while it was copied: nothing was written")
                continue
            left = memoryview(piece)
            while left:
                n = new.write(left)
                left = left[n:]
                count(n)


def _copy(source: int, target: int, part: range, count: _Count) -> bool:
    """Copies a range of the file `source` to where the file `target` ends. False if `source` ends before."""
    moves_by_blocks = (os.lseek(target, 0, os.SEEK_CUR) - part.start) % _BLOCK == 0
    by_kernel = moves_by_blocks and hasattr(os, "copy_file_range")
    buffer = None
    at = part.start
    while at < part.stop:
        n = 0
        if by_kernel:
            try:
                n = os.copy_file_range(source, target, min(_KERNEL_CHUNK, part.stop - at), at)
            except OSError as error:
                if error.errno not in _ONLY_BY_HAND:
                    raise
            by_kernel = n > 0
        if not by_kernel:
            buffer = buffer or memoryview(bytearray(min(_BUFFER, len(part))))
            n_read = os.preadv(source, [buffer[: part.stop - at]], at)
            n = os.write(target, buffer[:n_read])
        if n == 0:
            return False
        at += n
        count(n)
    return True


def _publish(unfinished: Sequence[Path], destinations: Sequence[Path]) -> None:
    # note: without its first file a split model can't be loaded, so that never one is made of two models' files
    if len(destinations) > 1:
        destinations[0].unlink(missing_ok=True)
    for new, final in reversed(list(zip(unfinished, destinations))):
        new.replace(final)
