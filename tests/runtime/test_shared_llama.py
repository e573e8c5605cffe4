"""A `Llama` that threads share: every answer is the one that a Llama of its own gives."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from support.llama import all_modes, answer, load, text
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

import lt_gguf  # noqa: F401 - before llama_cpp, to which it shows the libraries

CHILD = Path(__file__).parents[1] / "support" / "shared_llama_child.py"
GREEDY = {"max_tokens": 12, "temperature": 0}
PROMPTS = [text(n, seed) for seed, n in enumerate((30, 150, 300, 90, 200))]


def complete(llm, prompt) -> str:
    return llm.create_completion(prompt, **GREEDY)["choices"][0]["text"]


def word(chunk) -> str:
    return chunk["choices"][0]["text"]


@pytest.fixture(scope="module")
def alone(hybrid_file) -> list[str]:
    """The answers, each of a Llama of its own."""
    return [complete(load(hybrid_file), prompt) for prompt in PROMPTS]


@pytest.mark.slow
@all_modes
def test_everything_at_once(hybrid_file, mode):
    """240 operations of ten kinds in four threads. Without turns: GGML_ASSERT(i1 >= 0 && i1 < ne1), or wrong answers."""
    child = subprocess.run([sys.executable, CHILD, hybrid_file, mode, "240"], capture_output=True, text=True, timeout=300)
    assert (child.returncode, child.stdout) == (0, "240 operations\n"), child.stderr[-2000:]


@pytest.mark.parametrize("kind", ["whole calls", "an item at a time"])
def test_with_asyncio(hybrid_file, alone, kind):
    llm = load(hybrid_file)

    async def read(prompt) -> str:
        if kind == "whole calls":
            return await asyncio.to_thread(complete, llm, prompt)
        stream, words = llm.create_completion(prompt, stream=True, **GREEDY), []
        while (chunk := await asyncio.to_thread(next, stream, None)) is not None:
            words.append(word(chunk))
        return "".join(words)

    async def read_all() -> list[str]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2 * len(PROMPTS)))
        return await asyncio.gather(*map(read, PROMPTS + PROMPTS))

    assert asyncio.run(read_all()) == alone + alone


def test_a_stream_that_is_closed_half_way(hybrid_file, alone):
    llm = load(hybrid_file)
    with ThreadPoolExecutor(4) as pool:
        stream = llm(PROMPTS[1], stream=True, **GREEDY)
        begun = word(next(stream)) + word(next(stream))
        rest = [pool.submit(complete, llm, prompt) for prompt in PROMPTS]
        assert not any(done.done() for done in rest)
        stream.close()
        assert [done.result() for done in rest] == alone
    assert alone[1].startswith(begun)
    assert llm.n_tokens == len(llm.eval_tokens)


def test_looking_on_while_it_streams(hybrid_file):
    llm, other = load(hybrid_file, "auto"), load(hybrid_file, "auto")
    expected = answer(load(hybrid_file, "auto"), PROMPTS[2])
    ratios = other.lazy_ratios(PROMPTS[1], 2, 40, 16)
    tokens = []
    for token in llm.generate(PROMPTS[2], temp=0):
        tokens.append(token)
        assert llm.n_tokens == len(PROMPTS[2]) + len(tokens) - 1
        assert llm.kv_bytes()["streaming"] > 0 and llm.streaming.layers
        if len(tokens) == 3:
            np.testing.assert_array_equal(llm.lazy_ratios(PROMPTS[1], 2, 40, 16), ratios)
            other.load_state(llm.save_state())
            assert other.n_tokens == llm.n_tokens
            with pytest.raises(RuntimeError, match="Llama.reset: would wait for ever for Llama.generate"):
                llm.reset()
        if len(tokens) == len(expected):
            break
    assert tokens == expected


def test_with_a_draft_model(hybrid_file):
    llm = load(hybrid_file, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3))
    expected = [complete(load(hybrid_file, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3)), p) for p in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(complete, 4 * [llm] * len(PROMPTS), 4 * PROMPTS)) == 4 * expected


def test_an_error_in_a_call_gives_up_the_turn(hybrid_file, alone):
    llm = load(hybrid_file, timeout=30)
    for stream in (False, True):
        with pytest.raises(ValueError, match="exceed context window"):
            list(llm(text(3000), stream=stream))
    with pytest.raises(ZeroDivisionError):
        llm(PROMPTS[0], stopping_criteria=lambda *_: 1 / 0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(complete, llm, PROMPTS[0]).result() == alone[0]


def test_timeout(hybrid_file):
    llm = pickle.loads(pickle.dumps(load(hybrid_file, timeout=0.05)))
    assert llm.__getstate__()["timeout"] == 0.05
    stream = llm.create_chat_completion([{"role": "user", "content": "the"}], stream=True, **GREEDY)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        calls = [
            lambda: complete(llm, PROMPTS[0]),
            lambda: llm.create_completion(PROMPTS[0], timeout=0),
            lambda: next(llm.create_completion(PROMPTS[0], stream=True)),
            lambda: llm.create_chat_completion([], timeout=0.01),
            lambda: llm.create_embedding("a", timeout=0.01),
            lambda: llm.load_state(None),
        ]
        for call in calls:
            with pytest.raises(TimeoutError, match=r"still taken by Llama.create_chat_completion \(a stream begun"):
                pool.submit(call).result()


def test_close(hybrid_file):
    llm = load(hybrid_file)
    stream = llm(PROMPTS[0], stream=True)
    next(stream)
    llm.close()
    llm.close()
    for use in (lambda: next(stream), lambda: complete(llm, PROMPTS[0]), llm.kv_bytes, llm.save_state, llm.reset):
        with pytest.raises(RuntimeError, match="this Llama is closed: load the model again"):
            use()


def test_an_image_is_read_in_the_streams_turn(hybrid_file, alone):
    """A chat handler of the user's may read into the context itself: nobody may come between that and its stream."""
    llm = load(hybrid_file)

    def handler(*, llama, stream, **_):
        llama.reset()
        llama.eval(PROMPTS[1])
        return llama.create_completion(llama.input_ids[: llama.n_tokens].tolist(), stream=stream, **GREEDY)

    llm.chat_handler = handler
    stream = llm.create_chat_completion([], stream=True)
    assert complete(llm, PROMPTS[2]) == alone[2]
    n_read = llm.n_read
    assert "".join(map(word, stream)) == alone[1]
    assert llm.n_read - n_read <= len(PROMPTS[1]) + 1


def test_two_llamas_do_not_wait_for_each_other(hybrid_file):
    one, other = load(hybrid_file, timeout=0), load(hybrid_file, timeout=0)
    streams = [llm(PROMPTS[0], stream=True, **GREEDY) for llm in (one, other)]
    assert [[word(a), word(b)] for a, b in zip(*streams)]


LOADING = """
import sys
from concurrent.futures import ThreadPoolExecutor
import lt_gguf

def load(_):
    lt_gguf.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False).close()

with ThreadPoolExecutor(4) as pool:
    list(pool.map(load, range(40)))
print("still here")
"""


def test_loading_in_many_threads(hybrid_file):
    """llama_cpp.Llama puts /dev/null in the place of the process's stdout meanwhile, and must bring it back."""
    child = subprocess.run([sys.executable, "-c", LOADING, hybrid_file], capture_output=True, text=True, timeout=300)
    assert (child.returncode, child.stdout) == (0, "still here\n"), child.stderr[-2000:]
