"""What an analysis has in hand between two layers: the hidden states of all samples, and the ratios so far.

Both are saved after layers, so that an interrupted analysis goes on where it was. Hidden states stay in memory where they
fit; where they don't, they are in the saved files, and one sample at a time is read.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

MEMORY_SHARE = 0.25  # of the memory that is free, which hidden states may take

# Hidden states that are in memory are saved after the first layer that ends so long after the last save, and never so often
# that saving takes more than a tenth of the time.
SAVE_SECONDS = 10.0
SAVE_SHARE = 0.1

_STATE, _LOCK = "state.json", "lock"


class AnalysisState:
    """The state of one analysis, in a folder of its own.

    Args:
        folder: where it is saved; what is saved there of the same analysis is taken over, what is left of another removed.
        fingerprint: of all that the ratios depend on.
        n_sample, n_layer: the shape of `ratios`.

    Raises:
        OSError: the folder can't be read or written.
    """

    def __init__(self, folder: Path, fingerprint: str, n_sample: int, n_layer: int) -> None:
        self.folder, self.fingerprint, self.n_sample = folder, fingerprint, n_sample
        self.ratios = np.full((n_sample, n_layer), np.nan)
        self.n_done = 0  # layers
        self.is_embedded = False
        self._in_memory: bool | None = None  # unknown until their size is
        self._hidden: list[torch.Tensor | None] = [None] * n_sample
        self._dtype: torch.dtype | None = None
        self._width = 0
        self._saved = 0  # layers that were done in what is saved
        self._next_save = 0.0
        self._read()

    @property
    def is_finished(self) -> bool:
        return self.n_done == self.ratios.shape[1]

    def hidden(self, sample: int) -> torch.Tensor:
        """What goes into layer `n_done` for a sample, (1, T, hidden_size), on the CPU."""
        kept = self._hidden[sample]
        if kept is not None:
            return kept
        assert self._dtype is not None  # of what is in the file
        values = np.fromfile(self._file(self._saved, sample), dtype=np.uint8)
        return torch.from_numpy(values).view(self._dtype).reshape(1, -1, self._width)

    def set_hidden(self, sample: int, hidden: torch.Tensor) -> None:
        """Takes what came out of layer `n_done` for a sample, or out of the embedding before that has been said to be done."""
        self._dtype, self._width = hidden.dtype, hidden.shape[-1]
        if self._in_memory is None:
            self._in_memory = self.n_sample * hidden.nbytes <= MEMORY_SHARE * free_memory()
        if self._in_memory:
            self._hidden[sample] = hidden.cpu()
        else:
            self._write(self.n_done + 1 if self.is_embedded else 0, sample, hidden.cpu())

    def embedding_done(self) -> None:
        """Says that all samples have gone through the embedding."""
        self.is_embedded = True
        self._save()

    def layer_done(self) -> None:
        """Says that all samples have gone through layer `n_done`, and that their ratios are in `ratios`."""
        self.n_done += 1
        if self.is_finished or not self._in_memory or time.monotonic() >= self._next_save:
            self._save()

    def _save(self) -> None:
        begin = time.monotonic()
        if self.is_finished:
            self._hidden = [None] * self.n_sample
        elif self._in_memory:
            for sample, hidden in enumerate(self._hidden):
                assert hidden is not None  # a layer is done when all samples are
                self._write(self.n_done, sample, hidden)
        state = {
            "fingerprint": self.fingerprint,
            "layers_done": self.n_done,
            "dtype": str(self._dtype).removeprefix("torch."),
            "hidden_size": self._width,
            "lazy_ratio_by_sample": [[None if ratio != ratio else ratio for ratio in row] for row in self.ratios.tolist()],
        }
        temporary = self.folder / f".{_STATE}"
        temporary.write_text(json.dumps(state))
        temporary.replace(self.folder / _STATE)
        self._saved = self.n_done
        self._remove_hidden()
        end = time.monotonic()
        self._next_save = end + max(SAVE_SECONDS, (end - begin) / SAVE_SHARE)

    def _read(self) -> None:
        """Takes over what an earlier process has saved of the same analysis, and removes everything else."""
        state = {}
        with suppress(FileNotFoundError, ValueError):
            state = json.loads((self.folder / _STATE).read_text())
        if state.get("fingerprint") == self.fingerprint:
            rows = state["lazy_ratio_by_sample"]
            self.ratios[:] = [[np.nan if ratio is None else ratio for ratio in row] for row in rows]
            self.n_done = self._saved = state["layers_done"]
            self._dtype, self._width = getattr(torch, state["dtype"]), state["hidden_size"]
            self.is_embedded = True
        else:
            (self.folder / _STATE).unlink(missing_ok=True)
        self._remove_hidden()

    def _file(self, layer: int, sample: int) -> Path:
        """Holds what goes into a layer."""
        return self.folder / f"hidden-{layer}-{sample}.bin"

    def _write(self, layer: int, sample: int, hidden: torch.Tensor) -> None:
        hidden.contiguous().view(torch.uint8).numpy().tofile(self._file(layer, sample))

    def _remove_hidden(self) -> None:
        """Removes the files that what is saved doesn't need."""
        needed = f"hidden-{self._saved}-" if self.is_embedded and not self.is_finished else None
        for path in self.folder.glob("hidden-*-*.bin"):
            if needed is None or not path.name.startswith(needed):
                path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the with block no other process has the folder, which is made if it isn't there.

    Raises:
        ValueError: another process has it.
        OSError: it can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is at this analysis, wait for it or give another folder") from None
        yield


def free_memory() -> int:
    """Bytes that this process can still take, as far as the system says; half of the memory where it doesn't."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        with suppress(OSError, ValueError):  # note: a container's limit; the file says "max" where there is none
            group = Path("/sys/fs/cgroup")
            free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
        return max(free, 0)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
