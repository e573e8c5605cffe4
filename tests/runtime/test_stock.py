"""Against llama.cpp without our patch: ordinary files run bit for bit as there, and our files run there with full attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.families import OWN_WINDOW, SLIDING_FAMILIES
from support.gguf_edit import add_metadata, encode
from support.oracle import Subject, difference

from lt_gguf.runtime.library import library_dir
from lt_gguf.spec import CacheRecommendation, CacheTypes

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "tests" / "support" / "decode_child.py"
SETTINGS = dict(n_ctx=1024, n_ubatch=64, n_seq_max=2, kv_unified=True)
OTHER_SETTINGS = [
    dict(n_ctx=2048, n_ubatch=32, n_seq_max=2, kv="f16", flash=True),
    # llama.cpp can shift a quantized K only where heads are a multiple of 64
    dict(n_ctx=2048, n_ubatch=512, n_seq_max=2, kv="q8_0", flash=True),
]


@pytest.fixture(scope="session")
def stock() -> Path:
    """The libraries of the pinned source as it is: LT_GGUF_STOCK_LIB_PATH, or built (three minutes, once)."""
    if path := os.environ.get("LT_GGUF_STOCK_LIB_PATH"):
        return Path(path)
    build = subprocess.run([sys.executable, ROOT / "scripts" / "setup" / "build_stock.py"], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return Path(build.stdout.strip())


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Callable[[str], Subject]:
    return cache(lambda family: Subject.build(family, 4, tmp_path_factory.mktemp(family)))


def decode(libraries: Path, model: Path, settings: dict, out: Path) -> dict[str, np.ndarray]:
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(libraries)}
    environment.pop("LT_GGUF_LIB_PATH", None)
    child = subprocess.run(
        [sys.executable, CHILD, model, out, json.dumps(settings)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert child.returncode == 0, child.stderr[-1000:]
    return dict(np.load(out))


CASES = [(family, SETTINGS) for family in ("llama", "smollm3", "qwen2-moe", "gpt-neox")]
CASES += [("llama-mha", settings) for settings in OTHER_SETTINGS]
CASES += [("gemma3", SETTINGS | {"swa_full": False}), ("gpt-oss", SETTINGS)]


@pytest.mark.slow
@pytest.mark.parametrize("family, settings", CASES)
def test_files_without_metadata_run_bit_for_bit_as_there(subjects, stock, family, settings, tmp_path):
    model = subjects(family).native.path
    there = decode(stock, model, settings, tmp_path / "there.npz")
    here = decode(library_dir(), model, settings, tmp_path / "here.npz")
    assert there.keys() == here.keys() and there["n_swa"] == (OWN_WINDOW if family in SLIDING_FAMILIES else 0)
    for name in there:
        assert np.array_equal(there[name], here[name]), f"{name} differs"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_our_files_run_there_with_full_attention(subjects, stock, family, tmp_path):
    subject = subjects(family)
    flagged = add_metadata(subject.native.path, tmp_path / "flagged.gguf", streaming_keys(subject))
    plain = decode(stock, subject.native.path, SETTINGS, tmp_path / "plain.npz")
    there = decode(stock, flagged, SETTINGS, tmp_path / "there.npz")
    for name in plain:
        assert np.array_equal(there[name], plain[name]), f"{name} differs"
    here = decode(library_dir(), flagged, SETTINGS, tmp_path / "here.npz")
    assert difference(here["decoded"], there["decoded"]) > 0.1  # where the metadata means something


def streaming_keys(subject: Subject) -> list[bytes]:
    from lt_gguf.gguf.file import read_model

    described = read_model(subject.native.path)
    arch = described.architecture
    recommended = CacheRecommendation(described.n_layer, CacheTypes("q8_0", "q4_0"), (0,), (CacheTypes("q4_0", "q4_0"),))
    metadata = subject.spec(4, 20, [1, 2]).to_metadata(arch) | recommended.to_metadata(arch)
    return [encode(key, typed.type, typed.value) for key, typed in metadata.items()]
