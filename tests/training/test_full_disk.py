"""A checkpoint that can't be written is one line with its place, whatever safetensors and torch call it."""

from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import save_file

from lt_gguf.training.model import disk_errors

TENSORS = {"weight": torch.zeros(1 << 20)}


def limited(write) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "torch"])
def test_what_cannot_be_written_is_an_error_of_the_disk(tmp_path, write):
    with pytest.raises(OSError, match="place: a checkpoint can't be written: ") as error, disk_errors(tmp_path / "place"):
        limited(lambda: write(TENSORS, str(tmp_path / "file")))
    assert "\n" not in str(error.value)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes don't fit")
