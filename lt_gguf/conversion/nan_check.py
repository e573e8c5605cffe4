"""Looks for NaN in a checkpoint's tensors while they are converted, in a thread beside the conversion.

The conversion reads the same bytes at the same time, so the disk is read once, and torch lets other threads run while it
looks through a tensor: it costs no time where there is a second core.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name, torch's


class NanCheck:
    """The tensors of safetensors files, each of them looked at once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._checks: dict[tuple[Path, int], Future[None]] = {}
        self._error: ValueError | None = None

    def add(self, file: Path, offset: int, size: int, dtype: str) -> None:
        """Has the tensor looked at that begins at byte `offset` of `file` and takes `size` bytes.

        Raises:
            ValueError: one that was added before holds NaN.
        """
        if self._error is not None:
            raise self._error
        if dtype in _FLOATS and size > 0 and (file, offset) not in self._checks:
            self._checks[file, offset] = self._thread.submit(self._check, file, offset, size, dtype)

    def finish(self) -> None:
        """Waits for the last. Raises ValueError as `add`."""
        self._thread.shutdown()
        if self._error is not None:
            raise self._error

    def _check(self, file: Path, offset: int, size: int, dtype: str) -> None:
        import torch

        torch.set_num_threads(1)  # of this thread: the conversion has its own
        # note: "c" (copies what is written to) because torch warns of memory that can't be written to
        data = torch.from_numpy(np.memmap(file, mode="c", offset=offset, shape=size)).view(getattr(torch, _FLOATS[dtype]))
        # note: the least value is NaN if one is; faster than isnan(), which makes a tensor
        if self._error is None and torch.isnan(data.amin()):
            self._error = ValueError(f"{file.name}: the tensor {_name(file, offset)} holds NaN: the checkpoint is damaged")


def _name(file: Path, offset: int) -> str:
    from gguf.utility import SafetensorsLocal

    return next(name for name, tensor in SafetensorsLocal(file).tensors.items() if tensor.data_range.offset == offset)
