"""`lt_gguf.Llama`: the spec it runs with, going back, saved states, and errors that say what is wrong."""

from __future__ import annotations

import pickle

import gguf
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from support.tiny_checkpoint import N_LAYER, N_VOCAB, SINK, WINDOW, hybrid_file  # noqa: F401 - a fixture

import lt_gguf  # before llama_cpp, to which it shows the libraries
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import kv_memory
from lt_gguf.models import hub_files, package
from lt_gguf.runtime import api
from lt_gguf.spec import AutoSpec, StreamingSpec
from lt_gguf.spec.auto import LAZY

SPEC = StreamingSpec((1, 3), N_LAYER, SINK, WINDOW, "stream")
# A micro-batch is 8 tokens: the streaming layers then hold at most 256 cells, fewer than the prompt's tokens.
SETTINGS = {"n_ctx": 1024, "n_batch": 32, "n_ubatch": 8, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPT = np.random.default_rng(0).integers(3, N_VOCAB, 400).tolist()


def load(path, **settings) -> lt_gguf.Llama:
    return lt_gguf.Llama(str(path), **(SETTINGS | settings))


def continuation(llm: lt_gguf.Llama, prompt: list[int], n: int = 12) -> list[int]:
    return [token for token, _ in zip(llm.generate(prompt, temp=0), range(n))]


def last_logits(llm: lt_gguf.Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (N_VOCAB,)).copy()


# ------------------------------------------------------------------------------------------- the spec


def test_the_files_spec(hybrid_file):
    llm = load(hybrid_file)
    assert llm.streaming == SPEC
    kv = llm.kv_bytes()
    expected = kv_memory(read_model(hybrid_file).kv_shape, SPEC, 1024, n_ubatch=8, flash_attn=False)
    assert kv == {"full": expected.full, "streaming": expected.streaming, "prompt": 0, "swa": 0, "total": expected.total}
    assert 0 < kv["streaming"] < kv["full"]


@pytest.mark.parametrize(
    "streaming, expected",
    [
        ("off", None),
        ("layers=none", None),
        ("window=9", StreamingSpec((1, 3), N_LAYER, SINK, 9, "stream")),
        ("layers=0-2;sink=0;window=1", StreamingSpec((0, 1, 2), N_LAYER, 0, 1, "stream")),
        (StreamingSpec((2,), N_LAYER, 1, 2), StreamingSpec((2,), N_LAYER, 1, 2)),
        (StreamingSpec.off(N_LAYER), None),
    ],
)
def test_another_spec(hybrid_file, monkeypatch, streaming, expected):
    monkeypatch.setenv("LT_STREAMING", "layers=all;sink=5;window=77")
    llm = load(hybrid_file, streaming=streaming)
    assert llm.streaming == expected
    assert (llm.kv_bytes()["streaming"] == 0) == (expected is None)


def test_prefill_in_full(hybrid_file):
    llm = load(hybrid_file, streaming="prefill=full")
    assert llm.streaming == StreamingSpec((1, 3), N_LAYER, SINK, WINDOW, "full")
    assert llm.auto is None
    llm.eval(PROMPT)
    after = last_logits(llm)
    full = load(hybrid_file, streaming="off")
    full.eval(PROMPT)
    np.testing.assert_allclose(after, last_logits(full), atol=2e-3)  # KV in f16
    assert not np.allclose(after, last_logits(fed(hybrid_file, PROMPT)), atol=1e-2)
    assert len(api.seq_positions(llm.ctx, api.KVPart.STREAMING, 0)) < 400
    for one in (llm, full):
        one.eval([5])
    assert not np.allclose(last_logits(llm), last_logits(full), atol=1e-2)


def fed(path, tokens, **settings) -> lt_gguf.Llama:
    llm = load(path, **settings)
    llm.eval(tokens)
    return llm


@pytest.mark.parametrize(
    "streaming, lazy",
    [("auto:0.5", "min"), ("auto=0.5;w_last=16;lazy=mean", "mean"), (AutoSpec(0.5, SINK, WINDOW), "min")],
)
def test_layers_chosen_for_the_prompt(hybrid_file, streaming, lazy):
    llm = load(hybrid_file, streaming=streaming)
    assert llm.streaming is None
    assert llm.auto == AutoSpec(0.5, SINK, WINDOW, lazy=lazy)
    assert llm.kv_bytes()["streaming"] == 0
    for prompt in (PROMPT, PROMPT[::-1], PROMPT[:300]):
        laziest = np.argsort(llm.lazy_ratios(prompt, SINK, WINDOW, llm.auto.w_last, llm.auto.lazy))[2:]
        llm.reset()
        llm.eval(prompt)
        assert llm.streaming == StreamingSpec(tuple(laziest), N_LAYER, SINK, WINDOW, "full")
        assert 0 < llm.kv_bytes()["streaming"] < llm.kv_bytes()["full"]
        fixed = load(hybrid_file, streaming=llm.streaming)
        assert continuation(llm, prompt) == continuation(fixed, prompt)


def test_a_prompt_that_fits_the_window_chooses_nothing(hybrid_file):
    llm = load(hybrid_file, streaming="auto:0.5")
    continuation(llm, PROMPT[:20])
    assert llm.streaming is None


def test_environment(hybrid_file, monkeypatch):
    monkeypatch.setenv("LT_STREAMING", "window=77")
    assert load(hybrid_file).streaming == StreamingSpec((1, 3), N_LAYER, SINK, 77, "stream")
    monkeypatch.setenv("LT_STREAMING", "off")
    assert load(hybrid_file).streaming is None
    monkeypatch.setenv("LT_STREAMING", "auto=0.25;w_last=8")
    assert load(hybrid_file).auto == AutoSpec(0.25, SINK, WINDOW, 8)


def test_swa_full_does_not_undo_the_saving(hybrid_file):
    assert load(hybrid_file, swa_full=True).kv_bytes() == load(hybrid_file, swa_full=False).kv_bytes()


def test_streaming_changes_what_a_long_prompt_gives_and_nothing_for_a_short_one(hybrid_file):
    hybrid, full = load(hybrid_file), load(hybrid_file, streaming="off")
    for n, is_same in ((SINK + WINDOW, True), (400, False)):
        for llm in (hybrid, full):
            llm.reset()
            llm.eval(PROMPT[:n])
        assert np.allclose(last_logits(hybrid), last_logits(full), atol=1e-4) == is_same
    assert api.seq_positions(hybrid.ctx, api.KVPart.FULL, 0) == list(range(400))
    assert len(api.seq_positions(hybrid.ctx, api.KVPart.STREAMING, 0)) < 400


# --------------------------------------------------------------------------------------- lazy ratios


@pytest.mark.parametrize("lazy", LAZY)
def test_lazy_ratios_are_those_of_auto(hybrid_file, lazy):
    llm = load(hybrid_file, n_batch=64, n_ubatch=64)
    expected = continuation(llm, PROMPT)
    ratios = llm.lazy_ratios(PROMPT, SINK, WINDOW, 16, lazy)
    assert ratios.dtype == np.float32 and ratios.shape == (N_LAYER,)
    assert np.all((ratios > 0) & (ratios < 1))
    auto = load(hybrid_file, streaming=f"auto=0.5;w_last=16;lazy={lazy}", n_ubatch=32)
    auto.eval(PROMPT)
    np.testing.assert_allclose(ratios, api.lazy_ratios(auto.ctx), atol=1e-5)
    wider = llm.lazy_ratios(PROMPT, SINK, 300, 16, lazy)
    assert np.all(wider > ratios + 0.1)
    # nothing of it has touched this context, nor what contexts are made of
    assert llm.streaming == SPEC and api.model_spec(llm.model) == str(SPEC)
    assert continuation(llm, PROMPT) == expected
    assert api.lazy_ratios(llm.ctx) is None


def test_lazy_ratios_of_a_prompt_that_is_longer_than_this_context(hybrid_file):
    llm, long = load(hybrid_file, n_ctx=64), PROMPT * 5
    np.testing.assert_array_equal(llm.lazy_ratios(long, SINK, WINDOW), load(hybrid_file).lazy_ratios(long, SINK, WINDOW))


def test_lazy_ratios_with_an_adapter(hybrid_file, tmp_path):
    path = tmp_path / "adapter.gguf"
    write_adapter(path)
    llm = load(hybrid_file, lora_path=str(path), lora_scale=0.5, use_mmap=False)
    auto = load(hybrid_file, streaming="auto=0.5;lazy=mean", lora_path=str(path), lora_scale=0.5, use_mmap=False)
    auto.eval(PROMPT)
    ratios = llm.lazy_ratios(PROMPT, SINK, WINDOW, auto.auto.w_last)
    np.testing.assert_allclose(ratios, api.lazy_ratios(auto.ctx), atol=1e-5)
    assert not np.allclose(ratios, load(hybrid_file).lazy_ratios(PROMPT, SINK, WINDOW), atol=1e-4)


def write_adapter(path) -> None:
    """A random LoRA adapter of rank 4 for the queries of all layers."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for il in range(N_LAYER):
        for name, shape in (("lora_a", (4, 64)), ("lora_b", (64, 4))):
            writer.add_tensor(f"blk.{il}.attn_q.weight.{name}", random.normal(0, 2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "n, options, complaint",
    [
        (3000, {}, "has 3000 tokens, must have at most the model's context of 2048"),
        (1024, {}, r"all of them within sink \+ window = 1024"),
        (42, {"sink": 2, "window": 40}, r"all of them within sink \+ window = 42"),
        (100, {"window": 0}, "window = 0: must be"),
        (100, {"window": 9, "w_last": 0}, "w_last = 0: must be"),
    ],
)
def test_bad_prompts_for_lazy_ratios(hybrid_file, n, options, complaint):
    llm = load(hybrid_file)
    with pytest.raises(ValueError, match=complaint):
        llm.lazy_ratios([5] * n, **options)
    assert api.model_spec(llm.model) == str(SPEC)


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["prompt_limit", "snapshot_limit"])
@pytest.mark.parametrize("value", [-1, 1.5, "1MiB"])
def test_bad_limits(hybrid_file, name, value):
    with pytest.raises(ValueError, match=f"{name} = .*must be an integer"):
        load(hybrid_file, **{name: value})


@pytest.mark.parametrize("limited", ["prompt_limit", "n_ctx"])
def test_a_prompt_that_does_not_fit_is_refused_before_it_is_read(hybrid_file, limited):
    settings = {"streaming": "prefill=full", "logits_all": limited == "n_ctx"}
    llm = load(hybrid_file, **settings, **({"prompt_limit": 1000} if limited == "prompt_limit" else {"n_ctx": 128}))
    first = continuation(llm, PROMPT[:20])
    n_read, n_tokens = llm.n_read, llm.n_tokens
    with pytest.raises(ValueError, match="a prompt of 380 tokens") as error:
        llm.eval(PROMPT[20:])
    assert "\n" not in str(error.value)
    assert (llm.n_read, llm.n_tokens) == (n_read, n_tokens)
    with pytest.raises(ValueError, match="a prompt of 380 tokens"):
        continuation(llm, PROMPT)
    assert llm.n_read == n_read
    assert continuation(llm, PROMPT[:20]) == first


@pytest.mark.parametrize(
    "streaming, complaint",
    [
        ("layers=4", f'streaming: layers = "4": must be .* layers from 0 to {N_LAYER - 1}'),
        ("window=0", "streaming: window = 0"),
        (StreamingSpec((1,), 99), f"streaming: is for a model of 99 layers, must be for {N_LAYER}"),
        (3, "streaming = 3: must be a StreamingSpec, an AutoSpec, a string"),
    ],
)
def test_bad_spec(hybrid_file, streaming, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        load(hybrid_file, streaming=streaming)
    assert "\n" not in str(error.value)


def test_names_and_models_on_the_hub(hybrid_file, monkeypatch):
    """As scripts for llama-cpp-python say it, and as our commands do."""
    asked = []

    def fetch(repo, pattern=None, **settings):
        asked.append((repo, pattern, {key: value for key, value in settings.items() if value}))
        return hybrid_file

    monkeypatch.setattr(hub_files, "fetch", fetch)
    monkeypatch.setattr(package, "fetch", lambda model: hybrid_file)
    pretrained = lt_gguf.Llama.from_pretrained
    for llm in (
        load("smollm2"),
        pretrained("smollm2", **SETTINGS),
        pretrained(str(hybrid_file), **SETTINGS),
        pretrained("org/name:Q8_0", **SETTINGS),
        pretrained("org/name", "*q8_0.gguf", **SETTINGS),
        pretrained(repo_id="org/name", filename="*.gguf", local_dir="d", local_dir_use_symlinks=False, streaming="off", **SETTINGS),
        pretrained("org/name:Q8_0", additional_files=["*mmproj*"], cache_dir="c", **SETTINGS),
    ):
        assert llm.model_path == str(hybrid_file)
    assert asked == [
        ("org/name", "Q8_0", {}),
        ("org/name", "*q8_0.gguf", {}),
        ("org/name", "*.gguf", {"local_dir": "d"}),
        ("org/name", "Q8_0", {"additional_files": ["*mmproj*"], "cache_dir": "c"}),
    ]
    for arguments, complaint in (
        (("smollm2", "*.gguf"), "smollm2: must be a model on the hub, as ORG/NAME, for a file name"),
        (("org/name:Q8_0", "*.gguf"), r"org/name:Q8_0: says which file, and so does \*.gguf"),
        (("smolm2",), "did you mean smollm2"),
    ):
        with pytest.raises(ValueError, match=complaint):
            pretrained(*arguments)


def test_errors_have_llama_cpps_reason(hybrid_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tiny\.gguf: .*llama\.attention\.streaming\.window = 0: must be"):
        load(hybrid_file, kv_overrides={"llama.attention.streaming.window": 0})
    with pytest.raises(ValueError, match="quantized V cache requires flash_attn"):
        load(hybrid_file, type_v=8)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(hybrid_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.gguf: .*not within the file bounds"):
        load(cut)
    with pytest.raises(ValueError, match="Model path does not exist"):
        load(tmp_path / "none.gguf")
    monkeypatch.setenv("LT_STREAMING", "layers=banana")
    with pytest.raises(ValueError, match='LT_STREAMING: layers = "banana"'):
        load(hybrid_file)


def test_a_function_that_an_older_library_lacks_says_so():
    with pytest.raises(lt_gguf.LibraryError, match="is an older lt-gguf without lt_of_tomorrow: install lt-gguf again"):
        api._bind("lt_of_tomorrow", None)(1, 2)


def test_the_log_goes_where_it_went_before(hybrid_file, capfd):
    load(hybrid_file, verbose=True)
    assert "streaming layers: layers=1,3" in capfd.readouterr().err
    load(hybrid_file, verbose=False)
    assert not capfd.readouterr().err


# --------------------------------------------------------------------------------------- going back


@pytest.mark.parametrize("n_kept", [0, 1, 10, 100, 250, 395, 399])
def test_another_prompt_after_a_long_one(hybrid_file, n_kept):
    """The first `n_kept` tokens stay: what upstream would take from the cache, streaming layers may have dropped."""
    llm = load(hybrid_file)
    continuation(llm, PROMPT)
    other = PROMPT[:n_kept] + PROMPT[50:100]
    assert continuation(llm, other) == continuation(load(hybrid_file), other)
    assert continuation(llm, other) == continuation(load(hybrid_file), other)  # and once more the same


@pytest.mark.parametrize("n_kept", [0, 1, 100, 390, 400])
def test_eval_after_setting_n_tokens_back(hybrid_file, n_kept):
    llm, fresh = load(hybrid_file), load(hybrid_file)
    llm.eval(PROMPT)
    llm.n_tokens = n_kept
    llm.eval(PROMPT[:30])
    fresh.eval(PROMPT[:n_kept] + PROMPT[:30])
    assert llm.n_tokens == fresh.n_tokens == n_kept + 30
    assert llm._input_ids.tolist() == fresh._input_ids.tolist()
    np.testing.assert_allclose(last_logits(llm), last_logits(fresh), atol=1e-4)


class WrongDraft:
    """A draft model whose guesses are wrong, so that each is taken back: more of them than streaming layers can."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, input_ids, /, **_):
        return np.full(self.n, 5, dtype=np.intc)


@pytest.mark.parametrize("draft_model", [LlamaPromptLookupDecoding(num_pred_tokens=4), WrongDraft(3), WrongDraft(300)])
def test_drafts_change_nothing(hybrid_file, draft_model):
    settings = {"logits_all": True, "n_batch": 512}
    expected = continuation(load(hybrid_file, **settings), PROMPT)
    assert continuation(load(hybrid_file, draft_model=draft_model, **settings), PROMPT) == expected


# ------------------------------------------------------------------------------------- saved states


def test_a_saved_state_goes_on_as_if_nothing_had_been(hybrid_file):
    llm = load(hybrid_file)
    continuation(llm, PROMPT)
    state = llm.save_state()
    expected = continuation(llm, PROMPT + [7, 8, 9])
    continuation(llm, PROMPT[::-1])
    llm.load_state(state)
    assert continuation(llm, PROMPT + [7, 8, 9]) == expected
    other = load(hybrid_file)
    other.load_state(state)
    assert continuation(other, PROMPT + [7, 8, 9]) == expected


@pytest.mark.parametrize("settings", [{"n_ctx": 512}, {"streaming": "off"}, {"streaming": "layers=0"}], ids=str)
def test_a_state_that_does_not_fit_leaves_an_empty_context(hybrid_file, settings):
    llm = load(hybrid_file)
    llm.eval(PROMPT + PROMPT)
    state = llm.save_state()
    other = load(hybrid_file, **settings)
    with pytest.raises(RuntimeError, match="the state doesn't fit this context"):
        other.load_state(state)
    assert other.n_tokens == 0
    assert continuation(other, PROMPT) == continuation(load(hybrid_file, **settings), PROMPT)


def test_pickle(hybrid_file):
    limited = pickle.loads(pickle.dumps(load(hybrid_file, streaming="auto:0.5", prompt_limit=2**20, snapshot_limit=77)))
    assert limited.auto == AutoSpec(0.5, SINK, WINDOW)
    state = limited.__getstate__()
    assert (state["prompt_limit"], state["snapshot_limit"]) == (2**20, 77)
    llm = load(hybrid_file, streaming="window=9")
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.streaming == llm.streaming == StreamingSpec((1, 3), N_LAYER, SINK, 9, "stream")
    assert continuation(copy, PROMPT) == continuation(llm, PROMPT)


@pytest.mark.parametrize("n_ctx", ["largest", "4096", 4096.0, -1, None, True, 2**31])
def test_bad_context_sizes(hybrid_file, n_ctx):
    with pytest.raises(ValueError) as error:
        load(hybrid_file, n_ctx=n_ctx)
    allowed = 'must be a number of tokens up to 2147483647, 0: as many as the model was trained for, "auto": and as memory allows'
    assert str(error.value) == f"n_ctx = {n_ctx!r}: {allowed}"


def test_context_sizes(hybrid_file):
    assert load(hybrid_file, n_ctx=np.int64(512)).n_ctx() == 512
    assert load(hybrid_file, n_ctx=0).n_ctx() == 2048
