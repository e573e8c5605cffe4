"""The weights of a Hugging Face checkpoint, read from its files one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# in the order in which transformers looks for them
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

CHECKED_AT_ONCE = 1 << 22  # values; so that a check needs little memory


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `tensor[...]` reads it, which is how transformers reads those that it loads."""

    path: Path
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        # note: opened for each tensor, so that its pages leave our memory with it and not with the file's last one
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name)[index]
        return _load_pickled(self.path)[self.name][index]


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold the weights.

    Raises:
        ValueError: there are none, or one that the index names is missing.
        OSError: the index can't be read.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLED, PICKLED_INDEX)):
        if (checkpoint / single).is_file():
            return [checkpoint / single]
        if (checkpoint / index).is_file():
            files = sorted({checkpoint / name for name in _weight_map(checkpoint / index).values()})
            for file in files:
                if not file.is_file():
                    raise ValueError(f"{file}: is missing, but {index} names it: the checkpoint isn't complete")
            return files
    raise ValueError(f"{checkpoint}: has no weights, must have {SAFETENSORS} or {SAFETENSORS_INDEX} (or {PICKLED})")


def stored_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name. Reads headers only.

    Raises:
        ValueError: as `weight_files`, or a file is damaged.
        OSError: a file can't be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(checkpoint):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
            else:
                names = list(_load_pickled(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: can't be read, is it complete? ({error})") from None
        tensors |= {name: StoredTensor(path, name) for name in names}
    return tensors


def has_bad_values(tensor: torch.Tensor) -> bool:
    """True if there is a NaN or an infinity in it."""
    if not tensor.is_floating_point():
        return False
    return not all(part.isfinite().all() for part in tensor.detach().flatten().split(CHECKED_AT_ONCE))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index}: isn't an index of weights, must be JSON with a weight_map") from None


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors that are mapped to the file, read when they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
