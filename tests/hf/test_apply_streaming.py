"""What implementations `apply_streaming` offers, which one `auto` takes, and the spec that a checkpoint's config says."""

from __future__ import annotations

import json

import pytest
import torch
from support.families import FAMILIES, SLIDING_FAMILIES
from transformers import DynamicCache

from lt_gguf.hf import apply_streaming, remove_streaming
from lt_gguf.hf import streaming_attention as module
from lt_gguf.hf.decoder import cache_argument
from lt_gguf.hf.streaming_attention import BlockMasks, streaming_attention
from lt_gguf.spec import Provenance, StreamingSpec
from lt_gguf.spec.in_config import KEY, read_spec, write_spec

# of flex_attention that isn't compiled, and of how transformers calls it
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

N_LAYER = 4
N_TOKENS = 300  # three blocks of flex_attention


def spec(layers=(1, 2), sink=3, window=11, prefill="stream") -> StreamingSpec:
    return StreamingSpec(tuple(layers), N_LAYER, sink, window, prefill)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def llama():
    return FAMILIES["llama"].build_model(N_LAYER)


@pytest.fixture
def without_compiling():
    """torch runs flex_attention as it is written, and not compiled, which would take a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def logits(model, implementation: str, streaming=spec(), prompts=None, **arguments) -> torch.Tensor:
    with torch.no_grad(), streaming_attention(model, streaming, prompts=prompts, implementation=implementation):
        return model(**arguments).logits


def rows(*lengths: int) -> dict[str, torch.Tensor]:
    """Sequences padded on the left."""
    longest = max(lengths)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens(len(lengths), longest), "attention_mask": mask, "position_ids": positions}


@pytest.mark.slow
@pytest.mark.parametrize("prefill, prompts", [("stream", None), ("full", [(0, 150)]), ("full", [(0, 40), (100, 260), (290, 400)])])
def test_flex_attention_equals_sdpa(llama, without_compiling, prefill, prompts):
    arguments = {"input_ids": tokens(2, N_TOKENS), "use_cache": False}
    streaming = spec(prefill=prefill)
    expected = logits(llama, "sdpa", streaming, prompts, **arguments)
    got = logits(llama, "flex_attention", streaming, prompts, **arguments)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert not torch.allclose(expected, logits(llama, "sdpa", None, **arguments), atol=1e-2)


def test_flex_attention_counts_positions_within_each_sequence(llama, without_compiling):
    padded = rows(200, 131)
    is_token = padded["attention_mask"].bool()
    expected, got = (logits(llama, each, **padded, use_cache=False)[is_token] for each in ("sdpa", "flex_attention"))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    positions = torch.cat([torch.arange(n) for n in (90, 130, 20)])[None]
    packed = {"input_ids": tokens(1, 240), "position_ids": positions, "use_cache": False}
    expected, got = (logits(llama, each, **packed) for each in ("sdpa", "flex_attention"))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_flex_attention_after_a_cache(llama, without_compiling):
    inputs = tokens(1, N_TOKENS)
    with torch.no_grad(), streaming_attention(llama, spec(), implementation="flex_attention"):
        cache = DynamicCache(config=llama.config)
        llama(inputs[:, :170], **cache_argument(llama, cache))
        got = llama(inputs[:, 170:], **cache_argument(llama, cache)).logits
    torch.testing.assert_close(got, logits(llama, "sdpa", input_ids=inputs)[:, 170:], atol=2e-5, rtol=0)


def test_a_batch_of_sequences_equals_each_alone(llama):
    padded = rows(60, 37, 45)
    together = logits(llama, "sdpa", **padded)
    for i, length in enumerate((60, 37, 45)):
        alone = logits(llama, "sdpa", input_ids=padded["input_ids"][i : i + 1, 60 - length :])
        torch.testing.assert_close(together[i : i + 1, 60 - length :], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "device, q_length, is_flex", [("cuda", 15, True), ("cuda", 14, False), ("cuda", 1, False), ("cpu", 4096, False)]
)
def test_auto_takes_flex_attention_on_a_gpu_where_there_is_something_to_leave_out(llama, monkeypatch, device, q_length, is_flex):
    monkeypatch.setattr(module, "_block_masks", lambda config, **_: BlockMasks(("full", "streaming")))
    monkeypatch.setattr(module, "streaming_mask", lambda config, **_: torch.ones(1, 2, 1, 1))
    apply_streaming(llama, spec())
    assert llama.config._attn_implementation == "streaming_auto"
    masks = module._auto_mask(llama.config, device=torch.device(device), q_length=q_length)
    assert isinstance(masks, BlockMasks) == is_flex
    ran = []
    monkeypatch.setattr(module, "flex_attention_forward", lambda *_: ran.append(("flex", _[4])))
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *_: ran.append(("sdpa", tuple(_[4].shape))))
    for layer in llama.model.layers[:2]:
        module._streaming_auto(layer.self_attn, None, None, None, masks)
    assert ran == ([("flex", "full"), ("flex", "streaming")] if is_flex else [("sdpa", (1, 1, 1, 1))] * 2)


def test_auto_without_a_gpu_computes_what_sdpa_does(llama):
    inputs = tokens(1, 60)
    assert torch.equal(logits(llama, "auto", input_ids=inputs), logits(llama, "sdpa", input_ids=inputs))


def test_auto_leaves_flex_attention_to_models_that_take_it(llama):
    llama.config.attention_dropout = 0.1  # which it hasn't
    apply_streaming(llama, spec())
    assert llama.config._attn_implementation == "streaming_sdpa"


@pytest.mark.parametrize("family", ["gpt-oss", "gemma2"])
def test_auto_is_the_models_own_attention_where_torchs_would_leave_something_out(family):
    """Learned sinks, a softcap."""
    model = SLIDING_FAMILIES[family][0].build_model(4)
    streams = StreamingSpec((1,), 4, 4, 10, "stream")
    inputs = tokens(1, 60)
    apply_streaming(model, streams)
    with torch.no_grad():
        auto = model(inputs).logits
        apply_streaming(model, streams, implementation="eager")
        assert torch.equal(auto, model(inputs).logits)


def test_a_mask_made_by_the_caller_is_refused_by_each(llama):
    for implementation in ("auto", "sdpa", "eager", "flex_attention"):
        with pytest.raises(ValueError, match="transformers' mask functions did not build"):
            mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
            logits(llama, implementation, input_ids=tokens(1, 8), attention_mask=mask)


def test_generating_equals_reading_what_was_generated(llama):
    apply_streaming(llama, spec())
    inputs = tokens(2, 40)
    generated = llama.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    with torch.no_grad():
        read = llama(generated).logits[:, 39:-1].argmax(-1)
    assert torch.equal(generated[:, 40:], read)


def test_the_spec_of_the_config_is_kept_and_taken(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    inputs = tokens(1, 60)
    expected = logits(llama, "sdpa", input_ids=inputs)
    with pytest.raises(ValueError, match="config doesn't say which layers"):
        apply_streaming(llama)
    write_spec(llama.config, spec(), Provenance("frequency", (0.5, 0.25, 1.0, 0.0), json.dumps({"data": "a.jsonl"})))
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = logits(llama, "sdpa", None, input_ids=inputs)
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, plain)  # loaded like any other
        apply_streaming(loaded)
        assert torch.equal(loaded(inputs).logits, expected)
        remove_streaming(loaded)
        assert torch.equal(loaded(inputs).logits, plain)
    content = json.loads((tmp_path / "config.json").read_text())
    assert read_spec(content, N_LAYER) == (
        spec(),
        Provenance("frequency", (0.5, 0.25, 1.0, 0.0), '{"data": "a.jsonl"}'),
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"version": 2}, "version = 2: must be 1"),
        ({"layers": [4]}, r"layers = \[4\]: must be a list of layers from 0 to 3"),
        ({"layers": "1,2"}, r'layers = "1,2": must be a list of layers from 0 to 3'),
        ({"layers": [True]}, r"layers = \[true\]: must be a list"),
        ({"sink": -1}, "sink = -1: must be an integer from 0"),
        ({"sink": None}, "sink = null: must be an integer"),
        ({"window": 0}, "window = 0: must be an integer from 1"),
        ({"window": 1.5}, "window = 1.5: must be an integer"),
        ({"prefill": "half"}, 'prefill = "half": must be "full" or "stream"'),
        ({"selection": ""}, 'selection = "": must be the name'),
        ({"lazy_ratio": [0.1] * 5}, r"lazy_ratio = \[0.1, .*: must be a list of 4 numbers"),
        ({"lazy_ratio": [2]}, r"lazy_ratio = \[2\]: must be a list of 4 numbers from 0 to 1"),
        ({"calibration": "text"}, 'calibration = "text": must be an object'),
    ],
)
def test_a_wrong_spec_in_a_config_is_named(change, complaint):
    content = {"version": 1, "layers": [1], "sink": 4, "window": 8, "prefill": "stream", "selection": "frequency"}
    assert read_spec({KEY: content}, N_LAYER) == (StreamingSpec((1,), N_LAYER, 4, 8, "stream"), Provenance("frequency"))
    with pytest.raises(ValueError, match=rf"^config.json: {KEY}\.{complaint}") as error:
        read_spec({KEY: content | change}, N_LAYER)
    assert "\n" not in str(error.value)


def test_configs_without_a_spec_and_with_something_else():
    assert read_spec({}, N_LAYER) is None
    with pytest.raises(ValueError, match=rf"{KEY} = \[1\]: must be an object"):
        read_spec({KEY: [1]}, N_LAYER)
