"""Compares a GGUF file of ours with upstream's of the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import gguf

OUR_KEYS = 6  # four of the spec, version and selection


def assert_same_but_for_the_streaming_keys(ours: Path, upstreams: Path, n_added: int = OUR_KEYS) -> None:
    """All of upstream's keys in its order, and `n_added` more; all tensors byte for byte."""
    our_reader, upstreams_reader = gguf.GGUFReader(ours), gguf.GGUFReader(upstreams)
    added = [key for key in our_reader.fields if ".attention.streaming." in key or key.startswith("lighttransfer.")]
    assert len(added) == n_added
    assert [key for key in our_reader.fields if key not in added] == list(upstreams_reader.fields)
    for key, field in upstreams_reader.fields.items():
        if key != "GGUF.kv_count":
            assert our_reader.fields[key].types == field.types
            assert our_reader.fields[key].contents() == field.contents()
    assert len(our_reader.tensors) == len(upstreams_reader.tensors)
    for our, upstreams_own in zip(our_reader.tensors, upstreams_reader.tensors):
        assert (our.name, our.tensor_type, our.shape.tolist()) == (
            upstreams_own.name,
            upstreams_own.tensor_type,
            upstreams_own.shape.tolist(),
        )
        assert our.data.tobytes() == upstreams_own.data.tobytes()
