"""Candidates measured on the runtime: the numbers are those of separate runs, and everything is counted."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from lt_gguf.calibration import Texts
from lt_gguf.evaluation import candidates
from lt_gguf.evaluation.candidates import RuntimeCandidates, open_candidates
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.facts import CHOOSING, JUDGING
from lt_gguf.evaluation.outcomes import KnownOutcomes
from lt_gguf.evaluation.probes import Document, make_documents
from lt_gguf.evaluation.runtime_bench import RuntimeBench
from lt_gguf.evaluation.shared_prompts import SharedPrompts
from lt_gguf.evaluation.stories import story
from lt_gguf.evaluation.words import keys
from lt_gguf.runtime import build_info
from lt_gguf.runtime.text_model import TextModel
from lt_gguf.selection.evidence import FIRST, LATER, TEXT
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import CacheTypes

SINK, WINDOW, LENGTH = 4, 60, 600
OPTIONS = ScorerOptions(n_threads=1, flash_attn=False)
EXACT = ScorerOptions(n_threads=1, cache_type_k="f32", cache_type_v="f32", flash_attn=False)


@pytest.fixture(scope="module")
def model(demo_gguf):
    model = TextModel(demo_gguf)
    yield model
    model.close()


@pytest.fixture(scope="module")
def texts() -> Texts:
    rng = np.random.default_rng(1)
    return Texts("stories.txt", "ab" * 32, tuple(story(rng) for _ in range(120)))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec_of(model: TextModel, layers=(), prefill: str = "full") -> StreamingSpec:
    return StreamingSpec(layers, model.n_layer, SINK, WINDOW, prefill)


def documents_of(model: TextModel, texts: Texts, n: int = 2, kinds=CHOOSING, seed: int = 7) -> list[Document]:
    return make_documents(model, texts, kinds, n, LENGTH, WINDOW, [seed])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def read_by_hand(llm, document: Document) -> list[np.ndarray]:
    """What lt_gguf.Llama says to each probe of a document: prompts are read, answers are decoded token by token."""

    def decode(tokens, rows: list[np.ndarray]) -> None:
        for token in tokens:
            llm.eval([token])
            rows.append(np.array(llm._ctx.get_logits()[: llm.n_vocab()], dtype=np.float64))

    found = []
    text: list[np.ndarray] = []
    llm.reset()
    llm.eval(document.prefix)
    decode(document.text[:-1], text)
    found.append(log_softmax(np.array(text)))
    for conversation in document.conversations:
        llm.reset()
        read: tuple[int, ...] = document.prefix
        for turn in conversation:
            rows: list[np.ndarray] = []
            llm.eval([*read, *turn.message])
            decode(turn.answer, rows)
            begin, end = turn.span
            found.append(log_softmax(np.array(rows))[begin - 1 : end - 1])
            read = ()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["full", "stream"], ids=["reading-in-full", "reading-in-streams"])
def test_the_numbers_are_those_of_a_run_by_hand(demo_gguf, model, texts, prefill):
    """The hybrid really streams in lt_gguf.Llama, and reads each conversation for itself; all numbers by their definitions."""
    import lt_gguf

    (document,) = documents_of(model, texts)
    layers = (1, 3)
    found = RuntimeBench(model, EXACT, spec_of(model, prefill=prefill), [document], KnownOutcomes()).measure_all(
        [layers, (2,), ()]
    )[0]
    settings = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}  # 0: f32
    settings |= {"flash_attn": False, "verbose": False}
    full, hybrid = (
        read_by_hand(lt_gguf.Llama(str(demo_gguf), streaming=streaming, **settings), document)
        for streaming in ("off", spec_of(model, layers, prefill))
    )
    probes = document.probes
    assert [outcome.where for outcome in found.outcomes] == [probe.where for probe in probes] == [TEXT, *[FIRST, LATER] * 2]
    for outcome, probe, p, q in zip(found.outcomes, probes, full, hybrid, strict=True):
        expected = np.array(probe.expected)
        weights = np.exp(p[np.arange(len(expected)), expected])
        assert outcome.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=2e-3, abs=1e-6)
        assert outcome.known == pytest.approx((weights * (p.argmax(axis=1) == expected)).mean(), abs=1e-4)
        assert outcome.found == pytest.approx((weights * (q.argmax(axis=1) == expected)).mean(), abs=1e-4)
        assert outcome.hit == (q.argmax(axis=1) == expected).all()
    assert found.kl_answer > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(), (1, 3)], ids=["full", "hybrid"])
def test_a_quantized_cache_is_compared_with_one_in_16_bits(demo_gguf, model, texts, own_cache, layers):
    """As lt_gguf.Llama runs it: the prompt is read with that cache, and layers that stream keep 16 bits."""
    import lt_gguf

    (document,) = documents_of(model, texts)
    bench = RuntimeBench(model, EXACT, spec_of(model), [document], KnownOutcomes())
    quantized = bench.with_cache(CacheTypes("q8_0", "q4_0"), layers)
    found = quantized.measure(layers)
    quantized.close()
    settings = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # f32
    full = read_by_hand(lt_gguf.Llama(str(demo_gguf), streaming="off", **settings, **exact), document)
    streaming = spec_of(model, layers) if layers else "off"
    types = {"type_k": 8, "type_v": 2, "flash_attn": True}  # q8_0, q4_0
    other = read_by_hand(lt_gguf.Llama(str(demo_gguf), streaming=streaming, **settings, **types), document)
    for outcome, p, q in zip(found.outcomes, full, other, strict=True):
        assert outcome.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=0.1, abs=1e-5)
    assert found.kl_text > 1e-5
    # written down apart from what is measured beside a full model with the same cache
    again = bench.with_cache(CacheTypes("q8_0", "q4_0"), layers)
    assert again.measure(layers) == found and again.read == 0
    assert KnownOutcomes.of(model.file, quantized._options, [document]).count(spec_of(model)) == 0


def test_what_was_measured_before_is_not_measured_again(model, texts, own_cache):
    documents = documents_of(model, texts)
    path = own_cache / "known.jsonl"
    tokens: list[int] = []
    bench = RuntimeBench(model, OPTIONS, spec_of(model), documents, KnownOutcomes(path), tokens.append)
    some = bench.measure((2,))
    assert bench.sets == 2 and sum(tokens) == bench.read + bench.computed  # the full model was run first
    assert bench.read == bench.tokens_to_read == sum(len(document.prefix) for document in documents)
    before = len(tokens)
    full = bench.measure(())
    assert (full.kl, full.loss.value) == (0, 0) and bench.measure((2,)) == some and len(tokens) == before
    # another process goes on with what is in the file, of which the last line is half a line
    with open(path, "a") as file:
        file.write(json.dumps({"layers": "hide=3;", "outcomes": []})[:-9])
    again = RuntimeBench(model, OPTIONS, spec_of(model), documents, KnownOutcomes(path), tokens.append)
    assert again.measure_all([(2,), ()]) == [some, full] and len(tokens) == before
    other = again.with_window(30)
    assert other.measure((2,)).kl != some.kl and len(tokens) > before
    assert (other.read, other.sets) == (other.tokens_to_read, 4)  # the full model is run once more, it wasn't kept
    third = again.with_window(20)
    assert third.measure((2,)).kl != other.measure((2,)).kl
    assert (third.read, third.sets) == (other.tokens_to_read, 5)  # and serves for all windows


@pytest.mark.slow
def test_a_model_without_far_sight_answers_otherwise(model, texts):
    bench = RuntimeBench(model, OPTIONS, spec_of(model), documents_of(model, texts, 8), KnownOutcomes())
    blind = bench.measure(tuple(range(model.n_layer)))
    assert min(blind.kl_where(where).value for where in (FIRST, LATER)) > 0.1


def test_documents_ask_for_what_is_far_away(model, texts):
    documents = documents_of(model, texts, 6)
    assert [len(document.conversations) for document in documents] == [4, 2]
    said = ""
    for document in documents:
        for first, later in document.conversations:
            tokens = document.prefix + first.message + first.answer + later.message + later.answer
            assert LENGTH - 100 < len(tokens) <= LENGTH and document.n_tokens >= len(tokens)
            assert (first.where, later.where) == (FIRST, LATER) and first.kind != later.kind
            said += model.detokenize(tokens)
            for turn in (first, later):
                begin, end = turn.span
                assert 1 <= begin < end <= len(turn.answer)  # its beginning is decoded, too
                value = turn.answer[begin:end]
                n = len(document.prefix)
                places = [i for i in range(n) if document.prefix[i : i + len(value)] == value]
                assert places and max(places) < n - WINDOW, (turn, model.detokenize(document.prefix))
    assert {turn.kind for document in documents for both in document.conversations for turn in both} == set(CHOOSING)
    assert not any(f"the {key}" in said.lower() for key in keys(held_out=True))
    assert documents_of(model, texts, 6) == documents
    assert not set(CHOOSING) & set(JUDGING)


@pytest.mark.slow
def test_two_benches_with_other_questions(demo_gguf, model, texts, own_cache):
    steps = []
    settings = {"questions": 2, "length": LENGTH, "options": OPTIONS}
    with open_candidates(demo_gguf, spec_of(model), texts, **settings, progress=lambda *step: steps.append(step)) as measured:
        one, other = measured.choosing._documents, measured.judging._documents
        assert sum(len(document.conversations) for document in one) == 2
        assert sum(len(document.conversations) for document in other) == 4
        assert not {document.prefix for document in one} & {document.prefix for document in other}
        measured.announce(2, 1)
        measured.choosing.measure((0,))
        measured.judging.measure(())
        found = measured.measurement
    assert steps[0][:2] == ("loss: about 2 sets of layers on 2 conversations of 600 tokens, and 1 on others", 0)
    assert steps[-1][1] == found.read + found.computed and steps == sorted(steps, key=lambda step: step[1])
    assert (found.data, found.sha256, found.conversations, found.lengths, found.sets) == ("stories.txt", "ab" * 32, 2, (LENGTH,), 3)
    assert found.read == sum(len(document.prefix) for document in (*one, *other))
    assert len(list((own_cache / "measured").iterdir())) == 2


@pytest.mark.slow
def test_long_conversations_share_their_documents(demo_gguf, model, texts, own_cache, monkeypatch):
    """Reading is what they cost; each still is a conversation of its own, and what is lost in them is told apart."""
    monkeypatch.setattr(candidates, "LONG_LENGTH", 900)
    settings = {"questions": 10, "length": LENGTH, "options": OPTIONS}
    with open_candidates(demo_gguf, spec_of(model), texts, **settings) as measured:
        long = [document for document in measured.judging._documents if document.length == 900]
        assert [len(document.conversations) for document in long] == [10]
        found = measured.judging.measure((0,))
        described = measured.measurement
    assert found.lengths == described.lengths == (LENGTH, 900) and described.long == 10
    assert "10 conversations to choose by, and 20 of 600 and 10 of 900 tokens to judge by" in str(described)
    of_conversation = Counter(outcome.prompt for outcome in found.answers)
    assert sorted(of_conversation) == list(range(30)) and set(of_conversation.values()) == {2}
    assert len({outcome.prompt for outcome in found.of_length(900).outcomes}) == 10


def test_a_document_is_kept_and_recalled(model, texts):
    """What comes after it is the same, whether it has just been read or was saved."""
    (document,) = documents_of(model, texts)
    with SharedPrompts(model, OPTIONS, document.n_tokens, 2) as prompts:
        prompts.read([document.prefix])
        state = prompts.save()
        (first,) = prompts.decode([document.text])
        prompts.restore(state, len(document.prefix))
        (second,) = prompts.decode([document.text])
    np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"questions": 0}, "questions = 0: must be at least 1"),
        ({"length": 1 << 20}, "calibration length = 1048576: must be at most the model's context of"),
        ({"length": 80}, "conversations take .* tokens at least, must be at most 80: ask for longer ones, or select by lazy-ratio"),
    ],
)
def test_what_cannot_be_measured(model, texts, changes, complaint):
    settings = {"questions": 2, "length": LENGTH} | changes
    with pytest.raises(ValueError, match=complaint) as error:
        RuntimeCandidates(model, OPTIONS, spec_of(model), texts, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n_gpu_layers, gpu, flash_attn", [(0, True, False), (-1, False, False), (-1, True, True)])
def test_flash_attention_is_for_gpus(demo_gguf, texts, own_cache, monkeypatch, n_gpu_layers, gpu, flash_attn):
    """On a CPU the few tokens of a candidate are faster without it; by default all layers would run on a GPU, if there were one."""
    monkeypatch.setattr(build_info, "has_gpu", lambda: gpu)
    options = ScorerOptions(n_threads=1, n_gpu_layers=n_gpu_layers)
    every = StreamingSpec((), 12, SINK, WINDOW)
    with open_candidates(demo_gguf, every, texts, questions=1, length=LENGTH, options=options) as measured:
        assert measured.choosing._options.flash_attn is flash_attn
