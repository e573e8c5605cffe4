"""lm-evaluation-harness with local tasks and a random model: its numbers are those of transformers."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # all data is local
os.environ |= OFFLINE  # until the harness has read it: other tests want to try the hub

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from support.gguf_edit import add_metadata, encode
from support.oracle import Subject

from lt_gguf.evaluation import lm_eval_model
from lt_gguf.evaluation.lm_eval_model import HybridLM
from lt_gguf.spec import StreamingSpec

for name in OFFLINE:
    del os.environ[name]

SPEC = StreamingSpec((0, 2), 4, 4, 40, "full")
STREAMING = str(SPEC).replace(",", "+")
SETTINGS = {"n_threads": 1, "n_batch": 128, "flash_attn": False, "cache_type_k": "f32", "cache_type_v": "f32"}
EXACT = 2e-3  # of the log-probabilities of some tokens together
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.build("llama", 4, tmp_path_factory.mktemp("lm-eval"))


@pytest.fixture
def load(subject):
    made = []

    def make(file: Path = subject.native.path, **arguments) -> HybridLM:
        made.append(HybridLM(str(file), **({"streaming": STREAMING} | SETTINGS | arguments)))
        return made[-1]

    yield make
    for model in made:
        model.close()


# -- the same without any of the code that is tested


def tokens_of(text: str) -> list[int]:
    """The random model's vocabulary is bytes; SentencePiece puts a space before a text, and writes spaces as U+2581."""
    return [3 + byte for byte in ("▁" + text.replace(" ", "▁")).encode()] if text else []


def text_of(tokens: list[int]) -> str:
    data = b"".join(b"" if token < 3 else bytes([token - 3]) if token < 259 else b"word%d" % (token - 259) for token in tokens)
    return data.decode(errors="replace").replace("▁", " ")


def expected_rows(subject: Subject, prompt: list[int], answer: list[int], spec: StreamingSpec | None = SPEC) -> np.ndarray:
    """Float64 (len(answer), n_vocab) log-probabilities."""
    logits = subject.expected(np.array(prompt + answer), spec, [(0, len(prompt))]).astype(np.float64)
    rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return rows[len(prompt) - 1 : len(prompt) - 1 + len(answer)]


def expected_sum(subject: Subject, prompt: list[int], answer: list[int], **options) -> float:
    return expected_rows(subject, prompt, answer, **options)[range(len(answer)), answer].sum()


def is_greedy(subject: Subject, prompt: list[int], answer: list[int]) -> bool:
    return expected_rows(subject, prompt, answer).argmax(-1).tolist() == answer


# -- through the harness


def words(seed: int, n: int) -> str:
    return " ".join(np.random.default_rng(seed).choice("red blue fox dog sees hides 17 42 the a".split(), n).tolist())


CHOICES = [
    {"question": words(i, 20), "choices": [words(100 + 3 * i + j, 2 + 6 * j) for j in range(3)], "right": i % 3} for i in range(6)
]
TEXTS = [{"text": words(50, 12)}, {"text": words(51, 60)}]
QUESTIONS = [{"question": words(70 + i, 8 + 9 * i), "answer": "?"} for i in range(5)]
TASKS = {
    "tiny_choice": (CHOICES, {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
                              "doc_to_target": "right", "metric_list": [{"metric": "acc"}]}),
    "tiny_rolling": (TEXTS, {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                             "metric_list": [{"metric": "byte_perplexity"}]}),
    "tiny_answer": (QUESTIONS, {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
                                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20},
                                "metric_list": [{"metric": "exact_match"}]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, task) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML
    return folder


@pytest.fixture(scope="module")
def results(subject, task_folder):
    """Of all tasks, with arguments as on the command line."""
    arguments = SETTINGS | {"model": subject.native.path, "streaming": STREAMING, "n_parallel": 3}
    return lm_eval.simple_evaluate(
        model="lt-gguf",
        model_args=",".join(f"{key}={value}" for key, value in arguments.items()),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )


@pytest.mark.slow
def test_the_harness_chooses_as_transformers(subject, results):
    n_right = 0
    for sample, doc in zip(results["samples"]["tiny_choice"], CHOICES, strict=True):
        prompt = [BOS, *tokens_of(doc["question"])]
        assert len(prompt) > SPEC.sink + SPEC.window
        answers = [tokens_of(choice) for choice in doc["choices"]]  # the space before a text is that between the words
        expected = [expected_sum(subject, prompt, answer) for answer in answers]
        computed = [response for (response,) in sample["resps"]]
        np.testing.assert_allclose([value for value, _ in computed], expected, atol=EXACT)
        assert [greedy for _, greedy in computed] == [is_greedy(subject, prompt, answer) for answer in answers]
        n_right += int(np.argmax(expected)) == doc["right"]
        full = [expected_sum(subject, prompt, answer, spec=None) for answer in answers]
        assert np.abs(np.subtract(full, expected)).max() > 20 * EXACT  # streaming makes a difference
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(n_right / len(CHOICES))


def test_the_harness_measures_the_perplexity_of_transformers(subject, results):
    expected = sum(expected_sum(subject, [BOS], tokens_of(doc["text"])) for doc in TEXTS)
    n_bytes = sum(len(doc["text"]) for doc in TEXTS)
    assert results["results"]["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-expected / n_bytes), rel=1e-4)


def test_the_harness_gets_greedy_answers(subject, results):
    for sample, doc in zip(results["samples"]["tiny_answer"], QUESTIONS, strict=True):
        prompt, answer = [BOS, *tokens_of(doc["question"])], []
        while len(answer) < 20:
            answer.append(int(expected_rows(subject, prompt, [*answer, 0])[-1].argmax()))
        text = text_of(answer[: answer.index(EOS)] if EOS in answer else answer)
        assert sample["resps"] == [[text.split("\n")[0]]]


def test_the_results_say_what_ran(results):
    assert results["config"]["streaming"] == str(SPEC)


@pytest.mark.slow
def test_the_command(subject, task_folder):
    arguments = SETTINGS | {"model": subject.native.path, "streaming": STREAMING}
    command = [sys.executable, "-m", "lt_gguf.evaluation.lm_eval_cli", "run", "--model", "lt-gguf", "--tasks", "tiny_choice"]
    command += ["--include_path", str(task_folder), "--batch_size", "2"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|tiny_choice\s*\|.*\|acc\s*\|", done.stdout)


# -- the rest of the interface


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_a_text_may_have_no_context(subject, load):
    (value, _greedy), (empty, empty_greedy) = load().loglikelihood(
        [request("loglikelihood", "", "a fox"), request("loglikelihood", "a fox", "")], disable_tqdm=True
    )
    assert value == pytest.approx(expected_sum(subject, [BOS], tokens_of("a fox")), abs=EXACT)
    assert (empty, empty_greedy) == (0.0, True)


def test_a_model_without_a_first_token_begins_with_the_one_that_ends_a_text(subject, load, tmp_path):
    key = encode("tokenizer.ggml.add_bos_token", "bool", False)
    model = load(add_metadata(subject.native.path, tmp_path / "plain.gguf", [key]))
    ((value, _),) = model.loglikelihood([request("loglikelihood", "", "a fox")], disable_tqdm=True)
    (rolling,) = model.loglikelihood_rolling([request("loglikelihood_rolling", "a fox")], disable_tqdm=True)
    assert value == rolling == pytest.approx(expected_sum(subject, [EOS], tokens_of("a fox")), abs=EXACT)


def test_the_most_likely_answer_is_told_from_others(load):
    model, prompt = load(), [BOS, *tokens_of(words(5, 12))]
    greedy = next(model._scorer.generate([(prompt, 9)]))
    requests = [(prompt, greedy), (prompt, [*greedy[:-1], 5]), (prompt, greedy[:4]), (prompt, [5, *greedy[1:]])]
    assert [found for _, found in model._score(requests, "", disable_tqdm=True)] == [True, False, True, False]


def test_spaces_before_a_continuation_belong_to_it(load):
    pairs = [("the fox", " sees"), ("the fox ", "sees"), ("the fox", "  sees")]
    one, other, two = load().loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    assert one == other != two


def test_a_long_context_loses_its_first_tokens(subject, load):
    """But not the one that begins a text."""
    context, continuation = words(1, 60), " dog"
    tokens, answer = tokens_of(context), tokens_of("dog")
    ((value, _),) = load(n_ctx=128).loglikelihood([request("loglikelihood", context, continuation)], disable_tqdm=True)
    prompt = [BOS, *tokens[-(128 + 1 - len(answer) - 1) :]]
    assert len(prompt) + len(answer) - 1 == 128
    assert value == pytest.approx(expected_sum(subject, prompt, answer), abs=EXACT)
    with pytest.raises(ValueError, match="128 tokens leaves no room for its context: must have at most 127"):
        load(n_ctx=128).generate_until([request("generate_until", context, {"max_gen_toks": 128})], disable_tqdm=True)
    (text,) = load(n_ctx=128).generate_until([request("generate_until", context, {"max_gen_toks": 127})], disable_tqdm=True)
    assert text


def test_a_long_text_is_measured_in_windows(subject, load):
    text = words(3, 43)
    tokens = tokens_of(text)
    (computed,) = load(n_ctx=100).loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    expected, n_last = expected_sum(subject, [BOS], tokens[:100]), len(tokens) % 100
    assert 200 < len(tokens) < 300 and n_last
    expected += expected_sum(subject, tokens[99:100], tokens[100:200])
    expected += expected_sum(subject, tokens[-101:-n_last], tokens[-n_last:])
    assert computed == pytest.approx(expected, abs=EXACT)


def test_answers_end_before_what_they_are_to_end_with(subject, load):
    """And the model computes nothing after it."""
    model = load(n_parallel=2)
    contexts = [words(i, n) for i, n in enumerate((10, 13, 11, 12))]

    def answers(**arguments) -> list[str]:
        return model.generate_until([request("generate_until", context, arguments) for context in contexts], disable_tqdm=True)

    whole = answers(max_gen_toks=30)
    for context, text in zip(contexts, whole, strict=True):
        alone = request("generate_until", context, {"max_gen_toks": 30})
        assert model.generate_until([alone], disable_tqdm=True) == [text]
    until = [whole[0][9:11], whole[3][14], "not in any of them"]
    assert answers(max_gen_toks=30, until=until) == [min((text.split(end)[0] for end in until), key=len) for text in whole]
    assert answers(max_gen_toks=30, until=until[0]) == [text.split(until[0])[0] for text in whole]
    n_decoded, decode = [], model._scorer._context.compute
    model._scorer._context.compute = lambda tokens: n_decoded.append(tokens.shape[1]) or decode(tokens)
    contexts = contexts[:1]
    answers(max_gen_toks=30, until=until)
    assert len(n_decoded) < 16  # the prompt and a token at a time


def test_special_tokens_end_an_answer_by_their_names(load, monkeypatch):
    """They have no text that could be found."""
    model, stops = load(), []
    generate = model._scorer.generate
    watched = lambda questions, stop, **rest: stops.append(stop) or generate(questions, stop, **rest)  # noqa: E731
    monkeypatch.setattr(model._scorer, "generate", watched)
    for until in (["<s>", "\n"], ["\n"]):
        model.generate_until([request("generate_until", "a", {"until": until, "max_gen_toks": 1})], disable_tqdm=True)
    assert stops == [{BOS, EOS}, {EOS}]


def test_requests_with_different_arguments_keep_their_order(load):
    model = load()
    context = words(9, 20)
    limits = [3, 11, 3, 7]
    requests = [request("generate_until", context, {"max_gen_toks": n}) for n in limits]
    answers = model.generate_until(requests, disable_tqdm=True)
    longest = answers[1]
    assert all(longest.startswith(answer.rstrip("\ufffd")) for answer in answers)
    assert answers[0] == answers[2] and len({answers[0], answers[1], answers[3]}) == 3


def test_a_temperature_samples(load):
    requests = [request("generate_until", words(9, 20), {"max_gen_toks": 8, "temperature": 1.0, "do_sample": True})] * 5
    one = load(seed=1).generate_until(requests, disable_tqdm=True)
    assert len(set(one)) == 5
    assert one == load(seed=1).generate_until(requests, disable_tqdm=True)
    assert one != load(seed=2).generate_until(requests, disable_tqdm=True)
    greedy = [request("generate_until", words(9, 20), {"max_gen_toks": 8, "temperature": 1.0, **other}) for other in
              ({"do_sample": False}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6})]  # fmt: skip
    assert len(set(load().generate_until(greedy, disable_tqdm=True))) == 1


def test_what_is_sampled():
    random = np.random.default_rng(0)
    row = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        drawn = [lm_eval_model._sample(random, row, temperature, top_k, top_p) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(shares(), np.exp(row), atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), np.exp(2 * row) / np.exp(2 * row).sum(), atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.7), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.8), np.array([0, 0.5, 0.15, 0.25]) / 0.9, atol=0.03)


def test_unknown_arguments_of_a_generation_are_refused(load):
    with pytest.raises(ValueError, match="num_beams: unknown, must be one of until"):
        load().generate_until([request("generate_until", "a", {"num_beams": 2})], disable_tqdm=True)


CHAT = [{"role": "user", "content": "a fox?"}, {"role": "assistant", "content": "red"}, {"role": "user", "content": "a dog?"}]


@pytest.fixture
def chat_file(subject, tmp_path) -> Path:
    template = (Path(__file__).parents[2] / "models" / "demo" / "chat_template.jinja").read_text()
    return add_metadata(subject.native.path, tmp_path / "chat.gguf", [encode("tokenizer.chat_template", "string", template)])


def test_chats_are_written_in_the_models_format(load, chat_file):
    model = load(chat_file)
    template = jinja2.Template(model.chat_template(True))
    assert model.apply_chat_template(CHAT) == template.render(messages=CHAT, bos_token="<s>", add_generation_prompt=True)
    begun = [*CHAT, {"role": "assistant", "content": "blue"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == model.apply_chat_template(CHAT) + "blue"
    assert model.chat_template(False) is None
    assert model.tokenizer_name == "chat.gguf"


def test_a_text_begins_once(load, chat_file):
    """Also where the chat template writes what begins a text, and special tokens are known by their names."""
    model = load(chat_file)
    assert model._encode("<s>a</s>") == [BOS, *tokens_of("a"), EOS] == [*model._encode("a"), EOS]


def test_a_file_without_chat_template_says_so(load):
    with pytest.raises(ValueError, match="has no chat template"):
        load().apply_chat_template(CHAT)


def test_wrong_arguments_are_refused(subject):
    with pytest.raises(ValueError, match="layers"):
        HybridLM(str(subject.native.path), streaming="layers=1+9")
    with pytest.raises(ValueError, match="no choice of streaming layers is known"):
        HybridLM(str(subject.native.path), streaming="auto")
    with pytest.raises(ValueError, match="n_parallel"):
        HybridLM(str(subject.native.path), batch_size=0)
