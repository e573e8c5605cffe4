"""Log-probabilities and answers of many requests at a time are those of each one alone, and those of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import Context
from support.oracle import Subject, random_tokens
from support.small_gguf import write_small
from support.tiny_checkpoint import hybrid_file  # noqa: F401

from lt_gguf.evaluation import context as context_module
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.spec import AutoSpec, StreamingSpec, Typed

SINK, WINDOW = 4, 40
EXACT = 4e-4  # of log-probabilities: twice what logits may differ by

# f32 keys and values, so that little but the order of additions differs; and batches that prompts don't fit
SETTINGS = {"n_parallel": 3, "n_batch": 96, "n_threads": 1, "flash_attn": False, "cache_type_k": "f32", "cache_type_v": "f32"}
LAYERS = (0, 2)
SPECS = {
    "off": None,
    "stream": StreamingSpec(LAYERS, 4, SINK, WINDOW, "stream"),
    "full": StreamingSpec(LAYERS, 4, SINK, WINDOW, "full"),
}
all_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=[f"spec-{name}" for name in SPECS])  # `full` would be the marker

# (prompt, answer): short and long ones, so that a group ends at different times and some batches hold several prompts
LENGTHS = [(60, 1), (1, 30), (230, 77), (45, 150), (97, 0), (96, 2), (150, 97), (3, 3)]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.build("llama", 4, tmp_path_factory.mktemp("scorer"))


@pytest.fixture
def load(subject: Subject):
    """Gives a scorer of the random model."""
    made = []

    def make(spec: StreamingSpec | AutoSpec | str | None, reads_once: bool = False, **settings) -> Scorer:
        options = ScorerOptions(**(SETTINGS | settings))
        made.append(Scorer(subject.native.path, "off" if spec is None else spec, options, reads_once))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


def make_requests(lengths: list[tuple[int, int]] = LENGTHS) -> list[tuple[list[int], list[int]]]:
    tokens = [random_tokens(n + m, seed=i).tolist() for i, (n, m) in enumerate(lengths)]
    return [(text[:n], text[n:]) for text, (n, _) in zip(tokens, lengths, strict=True)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def fed_one_by_one(context: Context, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Float64 (len(answer), n_vocab) of a prompt and a token at a time."""
    context.clear()
    context.prompt_begin(len(prompt))
    rows = [context.read_prompt(prompt), context.decode_one_by_one(answer, len(prompt))] if answer else []
    return log_softmax(np.concatenate(rows))[:-1] if answer else np.empty((0, context.model.n_vocab))


# -- log-probabilities


@all_specs
def test_logprobs_are_those_of_transformers(subject, load, spec):
    requests = make_requests()
    rows = list(load(spec).logprobs(requests))
    assert len(rows) == len(requests)
    for (prompt, answer), computed in zip(requests, rows):
        prompts = [(0, len(prompt))] if spec is not None and spec.prefill == "full" else None
        expected = log_softmax(subject.expected(np.array(prompt + answer), spec, prompts))
        expected = expected[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
        assert computed.dtype == np.float32
        np.testing.assert_allclose(computed, expected, atol=EXACT)


@all_specs
def test_logprobs_are_those_of_tokens_decoded_one_by_one(subject, load, spec):
    requests = make_requests()
    with subject.context(spec) as context:
        for request, computed in zip(requests, load(spec).logprobs(requests), strict=True):
            np.testing.assert_allclose(computed, fed_one_by_one(context, *request), atol=EXACT)


def test_the_specs_differ(load):
    """Else the tests above would say nothing of streaming."""
    request = make_requests([(150, 60)])
    off, stream, full = (next(load(spec).logprobs(request)) for spec in SPECS.values())
    assert np.abs(off[0] - full[0]).max() < EXACT  # what follows the prompt doesn't see a difference yet
    assert min(np.abs(off - stream).max(), np.abs(off[1:] - full[1:]).max(), np.abs(stream - full).max()) > 0.05


@pytest.mark.slow
@all_specs
@pytest.mark.parametrize("n_parallel", [1, 2, 8])
def test_results_do_not_depend_on_how_many_run_at_a_time(load, spec, n_parallel):
    requests = make_requests()
    together = load(spec, n_parallel=n_parallel).logprobs(requests)
    for computed, other in zip(together, load(spec).logprobs(requests), strict=True):
        np.testing.assert_allclose(computed, other, atol=EXACT)


def test_large_vocabularies_are_decoded_in_small_batches(load, monkeypatch):
    """Which changes nothing but the memory that is taken."""
    requests = make_requests()
    expected = list(load(SPECS["full"]).logprobs(requests))
    monkeypatch.setattr(context_module, "_LOGITS_BYTES", 7 * 4 * 320)
    scorer = load(SPECS["full"])
    assert scorer._context.n_wanted_at_once == 7
    for computed, other in zip(scorer.logprobs(requests), expected, strict=True):
        np.testing.assert_allclose(computed, other, atol=EXACT)


def test_only_what_is_asked_for_is_kept(load, monkeypatch):
    """In the order of the places, also where they are computed in several batches."""
    monkeypatch.setattr(context_module, "_LOGITS_BYTES", 7 * 4 * 320)
    scorer, requests = load(SPECS["full"]), make_requests()
    kept = scorer.logprobs(requests, lambda rows, tokens: rows[range(len(rows)), tokens])
    for (_, answer), rows, values in zip(requests, scorer.logprobs(requests), kept, strict=True):
        np.testing.assert_allclose(values, rows[range(len(answer)), answer], atol=EXACT)


def test_with_ordinary_settings(subject, load):
    """f16 keys and values and flash attention: near, and normalized."""
    prompt, answer = make_requests([(200, 50)])[0]
    spec = SPECS["full"]
    with Scorer(subject.native.path, spec, ScorerOptions(n_threads=1)) as scorer:
        computed = next(scorer.logprobs([(prompt, answer)]))
    exact = next(load(spec).logprobs([(prompt, answer)]))
    np.testing.assert_allclose(computed, exact, atol=0.05)
    np.testing.assert_allclose(np.exp(computed.astype(np.float64)).sum(-1), 1, atol=1e-5)


def test_two_iterators_at_once(load):
    scorer, requests = load(SPECS["full"]), make_requests()
    expected = list(scorer.logprobs(requests))
    for (a, b), row in zip(zip(scorer.logprobs(requests), scorer.logprobs(requests), strict=True), expected, strict=True):
        np.testing.assert_allclose(a, row, atol=EXACT)
        np.testing.assert_allclose(b, row, atol=EXACT)


def test_requests_are_taken_as_they_are_needed(load):
    taken = []
    rows = load(None).logprobs(taken.append(i) or request for i, request in enumerate(make_requests()))
    next(rows)
    assert taken == [0, 1, 2]  # n_parallel of them


# -- sizes


def test_an_empty_prompt_is_refused_and_an_empty_answer_is_not(load):
    scorer = load(SPECS["stream"])
    with pytest.raises(ValueError, match="prompt is empty"):
        list(scorer.logprobs([([], [5])]))
    assert next(scorer.logprobs([([5], [])])).shape == (0, scorer.n_vocab)
    assert list(scorer.logprobs([])) == []


@all_specs
def test_a_request_must_fit_the_context(load, spec):
    """The last token of an answer isn't computed, so it takes no room."""
    scorer = load(spec, n_ctx=256)
    fits, too_long = make_requests([(200, 57)] * 4), make_requests([(200, 58)])
    rows = list(scorer.logprobs(fits))
    with pytest.raises(ValueError, match=r"257 tokens.*n_ctx = 256"):
        list(scorer.logprobs(too_long))
    with pytest.raises(ValueError, match=r"257 tokens.*n_ctx = 256"):
        list(scorer.generate([(fits[0][0], 58)]))
    np.testing.assert_array_equal(next(scorer.logprobs(fits)), rows[0])


@pytest.mark.slow
@all_specs
def test_a_context_grows_with_what_is_asked(load, spec):
    short, long = make_requests([(20, 9), (1400, 9)])
    scorer = load(spec, n_parallel=2)
    first = next(scorer.logprobs([short]))
    grown = list(scorer.logprobs([short, long, short]))
    np.testing.assert_allclose(grown[1], next(load(spec, n_ctx=1408).logprobs([long])), atol=EXACT)
    for row in (grown[0], grown[2]):
        np.testing.assert_allclose(row, first, atol=EXACT)


def test_prompts_are_announced_when_they_begin(load, monkeypatch):
    """Streaming layers need room for two at most: one that ends in a batch and one that begins in it."""
    monkeypatch.setenv("LT_PROMPT_LIMIT", "1")  # MiB: of f32 keys and values in two layers, 1024 tokens
    *prompts, too_long = make_requests([(400, 3), (420, 3), (450, 3), (1100, 3)])
    scorer = load(SPECS["full"])
    limited = list(scorer.logprobs(prompts))
    with pytest.raises(ValueError, match="1100 tokens.*LT_PROMPT_LIMIT"):
        list(scorer.logprobs([too_long]))
    monkeypatch.delenv("LT_PROMPT_LIMIT")
    for row, again, free in zip(limited, scorer.logprobs(prompts), load(SPECS["full"]).logprobs(prompts), strict=True):
        np.testing.assert_allclose(row, free, atol=EXACT)
        np.testing.assert_allclose(again, free, atol=EXACT)


def test_an_unknown_token_is_refused(load):
    scorer = load(None)
    with pytest.raises(RuntimeError, match="llama_decode returned -1.*invalid token"):
        list(scorer.logprobs([([5, scorer.n_vocab], [5])]))
    assert next(scorer.logprobs([([5], [6])])).shape == (1, scorer.n_vocab)


# -- answers


def greedy(context: Context, prompt: list[int], n_max: int, stop: set[int] = frozenset()) -> list[int]:
    context.clear()
    context.prompt_begin(len(prompt))
    answer, row = [], context.read_prompt(prompt)
    while len(answer) < n_max and (token := int(row[0].argmax())) not in stop:
        answer.append(token)
        row = context.decode([token], len(prompt) + len(answer) - 1)
    return answer


@pytest.mark.slow
@all_specs
def test_answers_are_greedy(subject, load, spec):
    requests = [(prompt, n) for (prompt, _), n in zip(make_requests(), [40, 1, 0, 70, 12, 3, 30, 5], strict=True)]
    with subject.context(spec) as context:
        expected = [greedy(context, *request) for request in requests]
        assert [len(answer) for answer in expected] == [n for _, n in requests]
        assert list(load(spec).generate(requests)) == expected
        stop = {expected[0][20], expected[3][4], expected[6][0]}
        stopped = [greedy(context, *request, stop) for request in requests]
        assert list(load(spec).generate(requests, stop)) == stopped
        assert len(stopped[0]) <= 20 and len(stopped[3]) <= 4 and stopped[6] == []


@all_specs
def test_the_beginning_of_an_answer_can_be_given(subject, load, spec):
    """It is decoded, which makes a difference where prompts are read in full."""
    n_given = [3, 0, 90, 1]
    requests = [(prompt, 12, answer[:n]) for (prompt, answer), n in zip(make_requests([(150, 100)] * 4), n_given)]
    answers = list(load(spec).generate(requests))
    with subject.context(spec) as context:
        for (prompt, n, given), answer in zip(requests, answers, strict=True):
            assert len(answer) == n
            rows = fed_one_by_one(context, prompt, [*given, *answer])[len(given) :]
            assert answer == rows.argmax(-1).tolist()
    scorer = load(spec, n_ctx=256)
    prompt, given = requests[0][0], requests[2][2]
    assert len(next(scorer.generate([(prompt, 17, given)]))) == 17
    with pytest.raises(ValueError, match="257 tokens"):
        list(scorer.generate([(prompt, 18, given)]))


def test_an_answer_ends_when_it_is_done(load):
    requests = [(prompt, 20) for prompt, _ in make_requests()]
    scorer = load(None)
    whole = list(scorer.generate(requests))
    wanted = whole[2][5]
    ended = list(scorer.generate(requests, is_done=lambda answer: answer[-1] == wanted))
    assert ended == [answer[: answer.index(wanted) + 1] if wanted in answer else answer for answer in whole]
    assert len(ended[2]) <= 6


def test_tokens_can_be_chosen_otherwise(load):
    prompt = make_requests([(30, 0)])[0][0]
    scorer = load(None, n_parallel=1)
    answer = next(scorer.generate([(prompt, 8)], choose=np.argmin))
    rows = next(scorer.logprobs([(prompt, answer)]))
    assert answer == rows.argmin(-1).tolist() != rows.argmax(-1).tolist()


# -- what streams


def test_another_spec_on_the_same_weights(load):
    requests = make_requests()
    scorer = load(None)
    model = scorer._model.model
    for spec in (SPECS["full"], SPECS["stream"], None):
        scorer.with_streaming("off" if spec is None else spec)
        assert scorer.spec == spec
        for computed, fresh in zip(scorer.logprobs(requests), load(spec).logprobs(requests), strict=True):
            np.testing.assert_array_equal(computed, fresh)
    assert scorer._model.model == model


def test_a_wrong_spec_changes_nothing(load):
    request = make_requests([(150, 20)])
    scorer = load(SPECS["full"])
    before = next(scorer.logprobs(request))
    for wrong, message in [
        ("layers=9", "layers"),
        (StreamingSpec((1,), 5), "5 layers, must be for 4"),
        (7, "streaming = 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            scorer.with_streaming(wrong)
    assert scorer.spec == SPECS["full"]
    np.testing.assert_array_equal(next(scorer.logprobs(request)), before)


def test_layers_that_are_chosen_for_the_prompt(subject, load):
    auto = AutoSpec(0.5, SINK, WINDOW, 8)
    with pytest.raises(ValueError, match="n_parallel = 3: must be 1"):
        load(auto)
    scorer = load(auto, n_parallel=1)
    requests, chosen = make_requests([(200, 30), (60, 30), (300, 30)]), set()
    for request in requests:
        computed = next(scorer.logprobs([request]))
        spec = scorer.spec
        assert len(spec.layers) == 2 and (spec.sink, spec.window, spec.prefill) == (SINK, WINDOW, "full")
        chosen.add(spec.layers)
        with subject.context(spec) as context:
            np.testing.assert_allclose(computed, fed_one_by_one(context, *request), atol=EXACT)
    scorer.with_streaming(None)
    assert scorer.spec is None


def test_the_file_says_what_streams(hybrid_file):
    with Scorer(hybrid_file, options=ScorerOptions(n_threads=1)) as scorer:
        assert scorer.spec == StreamingSpec((1, 3), 4, 2, 40, "stream")
        scorer.with_streaming("window=30")
        assert scorer.spec == StreamingSpec((1, 3), 4, 2, 30, "stream")
        scorer.with_streaming("off")
        assert scorer.spec is None


# -- text


def test_text_and_tokens(hybrid_file):
    with Scorer(hybrid_file, options=ScorerOptions(n_threads=1)) as scorer:
        assert (scorer.bos, scorer.eos, scorer.chat_template) == ([1], {2}, None)
        for text in ("the lazy fox", " runs  away\n", "", "Grüße, 世界 🙂", "a" * 5000):
            assert scorer.detokenize(scorer.tokenize(text)) == text
        assert scorer.tokenize("</s>", special=True) == [2]
        assert len(scorer.tokenize("</s>")) > 1
        assert scorer.detokenize([1, *scorer.tokenize("a fox"), 2]).strip() == "a fox"


def test_the_chat_template_is_the_files(tmp_path):
    template = "{{ messages }}"
    write_small(tmp_path / "chat.gguf", keys={"tokenizer.chat_template": Typed("string", template)})
    with Scorer(tmp_path / "chat.gguf", options=ScorerOptions(n_threads=1)) as scorer:
        assert scorer.chat_template == template


# -- loading


def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF" + bytes(100))
    for file in (wrong, tmp_path / "missing.gguf"):
        with pytest.raises(ValueError, match=file.name) as error:
            Scorer(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "setting", [{"n_ctx": -1}, {"n_parallel": 0}, {"n_batch": 0}, {"n_threads": 0}, {"n_gpu_layers": -2}, {"cache_type_k": "f8"}]
)
def test_options_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting)) if "cache_type_k" not in setting else "f8"):
        ScorerOptions(**setting)


def test_a_closed_scorer_fails_but_does_not_crash(load):
    scorer = load(None)
    scorer.close()
    scorer.close()
    for use in (lambda: list(scorer.logprobs([([5], [6])])), lambda: scorer.tokenize("a"), lambda: scorer.with_streaming(None)):
        with pytest.raises(AttributeError):
            use()


# ------------------------------------------------------------------------------------------- one prompt, several hybrids

ASKED_OF_ALL = make_requests([(230, 77), (60, 40), (96, 2)])


@pytest.fixture
def n_read(monkeypatch):
    """How many tokens of prompts a scorer has read until now."""
    lengths: list[int] = []
    begin = context_module.ScoringContext.begin_prompt
    monkeypatch.setattr(
        context_module.ScoringContext, "begin_prompt", lambda self, seq, n: lengths.append(n) or begin(self, seq, n)
    )
    return lambda: sum(lengths)


def test_prompts_are_read_once_for_hybrids_that_share_them(load, n_read):
    others = [StreamingSpec((1, 3), 4, SINK, WINDOW), StreamingSpec((0,), 4, 0, 20)]
    specs = ["off", SPECS["full"], *others, "off", SPECS["stream"], SPECS["full"]]
    really = [list(load(spec).logprobs(ASKED_OF_ALL)) for spec in specs]
    assert np.abs(really[0][0][1:] - really[1][0][1:]).max() > 0.05
    scorer = load("off", reads_once=True)
    n_before = n_read()
    for spec, expected in zip(specs, really, strict=True):
        scorer.with_streaming(spec)
        assert scorer.spec == (None if spec == "off" else spec)
        for one, same in zip(scorer.logprobs(ASKED_OF_ALL), expected, strict=True):
            np.testing.assert_allclose(one, same, atol=EXACT)
    n_prompts = sum(len(prompt) for prompt, _ in ASKED_OF_ALL)
    assert n_read() - n_before == 3 * n_prompts  # once for five, for the one that reads otherwise, and after it


def test_answers_of_hybrids_that_share_their_prompts(load, n_read):
    asked = [(prompt, len(answer), answer[:5]) for prompt, answer in ASKED_OF_ALL]
    specs = ["off", SPECS["full"], "off"]
    really = [list(load(spec).generate(asked)) for spec in specs]
    assert really[0] != really[1]
    scorer = load(SPECS["full"], reads_once=True)
    n_before = n_read()
    for spec, expected in zip(specs, really, strict=True):
        scorer.with_streaming(spec)
        assert list(scorer.generate(asked)) == expected
    assert n_read() - n_before == sum(len(prompt) for prompt, *_ in asked)


def test_other_prompts_are_read(load):
    """What is held serves only who asks for all of it, in that order."""
    expected = list(load(SPECS["full"]).logprobs(ASKED_OF_ALL))
    scorer = load("off", reads_once=True)
    list(scorer.logprobs(ASKED_OF_ALL))
    scorer.with_streaming(SPECS["full"])
    for some in ([2, 1, 0], [0], [1, 2]):
        found = list(scorer.logprobs([ASKED_OF_ALL[i] for i in some]))
        for one, i in zip(found, some, strict=True):
            np.testing.assert_allclose(one, expected[i], atol=EXACT)


def test_whose_prompts_are_shared(load):
    scorer = load("off", reads_once=True)
    shared = {"off": True, "layers=1;prefill=full": True, "layers=1;prefill=stream": False, "auto:0.5": False, None: True}
    assert {spec: scorer.shares(spec) for spec in shared} == shared
    with pytest.raises(ValueError, match="layers"):
        scorer.shares("layers=9")
    assert scorer.spec is None and len(next(scorer.logprobs(ASKED_OF_ALL))) == 77


# -- types of the cache


@all_specs
@pytest.mark.parametrize("reads_once", [False, True])
def test_a_variant_has_a_cache_of_its_type(load, spec, reads_once):
    """As a scorer that was made with that type; and the next one is again as if it hadn't been there."""
    text = "off" if spec is None else str(spec)
    requests = make_requests()[:4]
    scorer = load("off", reads_once)
    found = {}
    for variant in (text, f"{text}@f16", text, f"{text}@bf16"):
        scorer.with_streaming(variant)
        assert (scorer.spec is None) == (spec is None)
        found.setdefault(variant, []).append(list(scorer.logprobs(requests)))
    for variant, runs in found.items():
        type_ = variant.partition("@")[2] or "f32"
        expected = list(load(spec, reads_once, cache_type_k=type_, cache_type_v=type_).logprobs(requests))
        for run in runs:
            assert all(np.array_equal(a, b) for a, b in zip(run, expected, strict=True)), variant
    assert not np.array_equal(found[text][0][1], found[f"{text}@bf16"][0][1])


def test_a_variant_of_no_type(load):
    with pytest.raises(ValueError, match='cache type = "f8": must be one of'):
        load("off").with_streaming("off@f8")
