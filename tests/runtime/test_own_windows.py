"""`lt_gguf.Llama` and llama-server on a model whose other layers have a sliding window of their own: going back is as with any hybrid."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from support import server
from support.llama import all_modes, answer, assert_like, fed, load, logits, n_read, text
from support.llama_walk import Walk
from support.tiny_checkpoint import write_checkpoint

from lt_gguf.conversion import convert
from lt_gguf.gguf.file import read_model

OWN_WINDOW, SINK, WINDOW = 30, 2, 40


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A random Gemma 2 whose odd layers stream and whose even layers have a window."""
    folder = tmp_path_factory.mktemp("gemma2")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(checkpoint, "gemma2", sliding_window=OWN_WINDOW, query_pre_attn_scalar=16)
    options = {"outtype": "f32", "select": "manual", "layers": "all", "sink": SINK, "window": WINDOW, "prefill": "stream"}
    return convert(checkpoint, folder / "tiny.gguf", **options).files[0]


def test_the_file(file):
    described = read_model(file)
    assert described.spec.layers == described.may_stream == (1, 3)
    assert described.own_window == ((0, 2), OWN_WINDOW)


@all_modes
def test_an_edited_message_reads_only_what_follows(file, mode):
    llm = load(file, mode)
    first, second, edited = text(600), text(500, 1), text(150, 2)
    said = answer(llm, first)
    answer(llm, first + said + second)
    prompt = first + said + edited
    assert n_read(llm, lambda: answer(llm, prompt, 1)) == len(edited) + 1  # and the answer's last token
    assert_like(llm, file, mode, [("prompt", first), ("decode", said[:-1]), ("prompt", said[-1:] + edited)])


@pytest.mark.slow
@all_modes
@pytest.mark.parametrize("n_answer", [2, 400])
def test_regenerating_an_answer_reads_nothing(file, mode, n_answer):
    llm = load(file, mode)
    prompt = text(900)
    said = answer(llm, prompt, n_answer)
    assert n_read(llm, lambda: next(llm.generate(prompt, temp=0))) == 0
    np.testing.assert_allclose(logits(llm), logits(fed(file, mode, [("prompt", prompt)])), atol=2e-4)
    assert answer(llm, prompt, n_answer) == said


@pytest.mark.slow
@all_modes
@pytest.mark.parametrize("seed", range(4))
def test_random_walk(file, monkeypatch, mode, seed):
    walk = Walk(file, mode, seed, monkeypatch)
    for _ in range(30):
        walk.step()
        assert_like(walk.llm, file, mode, walk.history)


@pytest.mark.parametrize("prefill", ["stream", "full"])
def test_the_cache_takes_what_is_said(file, prefill):
    from lt_gguf.memory.kv import kv_memory

    described = read_model(file)
    spec = described.parse_spec(f"layers=all;prefill={prefill}")
    expected = kv_memory(described.kv_shape, spec, 2048, type_k="f32", n_ubatch=16, flash_attn=False)
    llm = load(file, streaming=spec)
    parts = llm.kv_bytes()
    assert [parts[name] for name in ("full", "streaming", "swa", "total")] == [*expected, expected.total]


# ----------------------------------------------------------------------------------------- llama-server

SETTINGS = ["--ctx-size", "2048", "--batch-size", "256", "--ubatch-size", "64", "--flash-attn", "off"]
SETTINGS += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
PROMPT = text(600)


def complete(address: str, prompt: list[int], n: int = 20, cached: bool = True) -> tuple[list[int], int]:
    """The tokens of the answer, and how many of the prompt's were not processed again."""
    options = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    body = json.dumps(options | {"cache_prompt": cached}).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        found = json.load(response)
    return found["tokens"], found["timings"]["cache_n"]


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["stream", "full"])
def test_a_server_goes_on_from_checkpoints(file, tmp_path, prefill):
    """An edited message, and the same once more: nothing before it is read again, and the answers are a fresh server's."""
    streaming = f"layers=all;sink={SINK};window={WINDOW};prefill={prefill}"
    with server.running(file, streaming, tmp_path / "server.log", *SETTINGS) as address:
        said, _ = complete(address, PROMPT, 300)
        history = PROMPT + said[:200]
        messages = {seed: history + text(100, seed) for seed in (1, 2)}
        complete(address, messages[1])
        found = {seed: complete(address, message) for seed, message in messages.items()}
        found["again"] = complete(address, messages[2])
    messages["again"] = messages[2]
    log = (tmp_path / "server.log").read_text()[-3000:]
    for name, message in messages.items():
        with server.running(file, streaming, tmp_path / "fresh.log", *SETTINGS) as address:
            complete(address, PROMPT, 201)  # what was decoded stays decoded
            fresh, _ = complete(address, message)
        assert found[name][0] == fresh, f"{name}: {log}"
        assert found[name][1] >= len(PROMPT), f"{name}: {log}"


@pytest.mark.slow
def test_a_server_shifts_its_context(file, tmp_path):
    """An answer longer than the context is made to its end."""
    streaming = f"layers=1;sink={SINK};window={WINDOW};prefill=full"
    with server.running(file, streaming, tmp_path / "server.log", *SETTINGS, "--context-shift", "--keep", "300") as address:
        assert len(complete(address, PROMPT, 1800)[0]) == 1800
