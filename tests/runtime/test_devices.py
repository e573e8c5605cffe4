"""Layers on devices: two RPC servers on this machine stand in for two GPUs, and memory that is only reckoned."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.native import FULL, STREAMING, Model
from support.oracle import EXACT, Subject, difference, random_tokens
from support.rpc import rpc_servers

CHILD = Path(__file__).parents[1] / "support" / "rpc_child.py"
N_TOKENS = 400


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.build("llama", 4, tmp_path_factory.mktemp("devices"))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[1, 3], [0, 1, 2, 3]], ids=["half", "all"])
def test_split_over_two_devices(subject, layers, tmp_path):
    spec = subject.spec(4, 28, layers)
    tokens = random_tokens(N_TOKENS)
    np.save(tmp_path / "tokens.npy", tokens)
    with rpc_servers(2) as (endpoints, _):
        child = subprocess.run(
            [sys.executable, CHILD, subject.native.path, str(spec), tmp_path / "tokens.npy", tmp_path / "out.npz", *endpoints],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    out = np.load(tmp_path / "out.npz")
    buffers = " ".join(map(str, out["buffers"]))
    assert all(endpoint in buffers for endpoint in endpoints), buffers

    with subject.context(spec, n_ctx=512, n_batch=512, n_ubatch=32) as context:
        here = context.decode(tokens)
        assert context.seq_rm(0, 8, 100)
        context.seq_add(0, 100, -1, -92)
        shifted = context.decode(tokens[:20], start=N_TOKENS - 92)
        assert [context.kv_bytes(FULL), context.kv_bytes(STREAMING)] == out["kv_bytes"].tolist()
    assert difference(out["logits"], here) < EXACT
    assert difference(out["shifted"], shifted) < EXACT
    assert difference(out["again"], here[-60:]) < EXACT


def test_memory_is_reckoned_without_allocating(subject):
    """What llama.cpp's tools do to fit a model into a device: the same sizes, nothing allocated."""
    spec = subject.spec(4, 1020, [1, 3])
    settings = {"n_ctx": 16384, "n_batch": 512, "n_ubatch": 512, "kv": "f16"}
    with subject.context(spec, **settings) as real:
        expected = [real.kv_bytes(FULL), real.kv_bytes(STREAMING)]
    assert expected[1] < expected[0] / 8
    with Model(subject.native.path, no_alloc=True, load_mode=0) as model:
        model.set_streaming(str(spec))
        with model.context(**settings) as reckoned:
            assert [reckoned.kv_bytes(FULL), reckoned.kv_bytes(STREAMING)] == expected
