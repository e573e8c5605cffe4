"""LightTransfer-Train on a tiny model: what is trained on, which layers, and what comes out and goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_checkpoint import write_checkpoint

from lt_gguf.conversion import convert
from lt_gguf.gguf.file import read_model
from lt_gguf.spec import Provenance, StreamingSpec
from lt_gguf.spec.in_config import KEY
from lt_gguf.training import layers, trainer
from lt_gguf.training.data import IGNORED, collate, examples_of, make_samples, read_data
from lt_gguf.training.log import loss_curve
from lt_gguf.training.model import load_tokenizer
from lt_gguf.training.run import Run
from lt_gguf.training.settings import Settings
from lt_gguf.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # its names for gradient checkpointing change

ROOT = Path(__file__).parents[2]
N_LAYER = 4
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '[end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# Thoughts are written in the last answer only, as some models' templates do.
FORGETFUL = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ 'thought: ' }}{% endif %}{{ message['content'] + '[end]' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
SETTINGS = Settings(
    sink=2,
    window=10,
    samples=8,
    w_last=8,
    eval_share=0.2,
    steps=20,
    batch_size=4,
    accumulate=1,
    learning_rate=5e-3,
    log_every=2,
    save_every=8,
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


DEMO = Path(__file__).parents[2] / "models" / "demo"


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHATS = [
    [
        user(f"the quick brown fox jumps over {word}"),
        assistant(f"{word} jumps over the lazy dog"),
        user("and then"),
        assistant(word),
    ]
    for word in "zero one two three four five six seven eight nine ten".split()
] * 2


def write_chats(path: Path, chats: list) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", CHATS)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trained_text(tokenizer, example) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


def encoded(path: Path, tokenizer, **options) -> list:
    (conversation,) = read_data(path).conversations
    return examples_of(conversation, tokenizer, **{"max_length": 1000} | options)


# ------------------------------------------------------------------------------------------------------------ data


def test_only_answers_are_trained(tokenizer, tmp_path):
    file = write_chats(tmp_path / "a.jsonl", [[user("one"), assistant("two three"), user("four"), assistant("five")]])
    (example,) = encoded(file, tokenizer)
    text = "<s>[user]one[end][assistant]two three[end][user]four[end][assistant]five[end]"
    assert example["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained_text(tokenizer, example) == "two three[end]five[end]"
    assert all(label in (token, IGNORED) for token, label in zip(example["input_ids"], example["labels"], strict=True))
    (everything,) = encoded(file, tokenizer, loss="all")
    assert everything["labels"] == everything["input_ids"] == example["input_ids"]


def test_an_answer_that_is_cut_off_and_one_that_is_not_reached(tokenizer, tmp_path):
    file = write_chats(tmp_path / "a.jsonl", [[user("one two three"), assistant("four five six")]])
    (whole,) = encoded(file, tokenizer)
    first = next(i for i, label in enumerate(whole["labels"]) if label != IGNORED)
    (cut,) = encoded(file, tokenizer, max_length=first + 1)
    assert cut == {"input_ids": whole["input_ids"][: first + 1], "labels": whole["labels"][: first + 1]}
    assert encoded(file, tokenizer, max_length=first) == []


def test_answers_that_are_written_otherwise_later_are_trained_one_by_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    file = write_chats(tmp_path / "a.jsonl", [[user("one"), assistant("two"), user("three"), assistant("four")]])
    first, second = encoded(file, tokenizer)
    assert trained_text(tokenizer, first) == "thought: two[end]"
    assert tokenizer.decode(second["input_ids"]) == "[user]one[end][assistant]two[end][user]three[end][assistant]thought: four[end]"
    assert trained_text(tokenizer, second) == "thought: four[end]"


def test_batches_are_padded_on_the_right():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"messages": [', "is no JSON"),
        ('{"text": "a"}', 'has no list "messages", must be {"messages"'),
        ("[]", 'has no list "messages"'),
        ('{"messages": []}', 'has no list "messages"'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'message 1 has no strings "role" and "content"'),
        ('{"messages": [{"role": "user", "content": "a"}, "b"]}', "message 2 has no strings"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has the roles user, must have an assistant's answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "has the roles assistant, must have"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    file = write_chats(tmp_path / "a.jsonl", CHATS[:1])
    file.write_text(f"{file.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=rf"^{file}: line 3: {complaint}") as error:
        read_data(file)
    assert "\n" not in str(error.value)


def test_files_without_a_conversation_and_with_other_bytes(tmp_path):
    empty, latin = tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
    empty.write_text("\n\n")
    latin.write_bytes('{"messages": "é"}'.encode("latin-1"))
    for file, complaint in ((empty, "has no conversations"), (latin, "is not UTF-8, see byte 14")):
        with pytest.raises(ValueError, match=complaint):
            read_data(file)


def test_a_template_that_refuses_a_conversation(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system messages, please') }}")
    with pytest.raises(ValueError, match="a.jsonl: line 1: the chat template doesn't take it: no system messages, please"):
        encoded(write_chats(tmp_path / "a.jsonl", CHATS[:1]), tokenizer)


# -------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    """A whole training: its folder and what it said."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, train(str(model), data, out, SETTINGS)


@pytest.mark.slow
def test_the_loss_falls_and_the_checkpoint_says_what_streams(trained, model, data):
    out, record = trained
    losses = [entry["loss"] for entry in record["training_loss"]]
    assert [entry["step"] for entry in record["training_loss"]] == list(range(2, 21, 2))
    assert losses[-1] < 0.5 * losses[0]
    held_out = record["held_out_loss"]
    assert held_out["after"] < 0.5 * held_out["before"]
    assert held_out["full"] != held_out["before"]
    assert json.loads((out / "training.json").read_text()) == record
    assert str(data.parent) not in (out / "training.json").read_text()
    config = json.loads((out / "config.json").read_text())
    said = config.pop(KEY)
    assert config == json.loads((model / "config.json").read_text())  # nothing else has changed
    assert {key: said[key] for key in ("sink", "window", "prefill", "selection")} == {
        "sink": 2,
        "window": 10,
        "prefill": "stream",
        "selection": "frequency",
    }
    assert len(said["layers"]) == 2 and len(said["lazy_ratio"]) == N_LAYER
    assert (said["calibration"]["data"], said["calibration"]["samples"]) == ("chats.jsonl", 8)
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # checkpoints are gone
    names = {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "training.json", "loss.png", "loss.svg"}
    assert names <= {path.name for path in out.iterdir()}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.iterdir())


def test_layers_are_those_that_are_lazy_in_most_samples(model, data, tokenizer):
    from lt_gguf.hf.analysis import measure

    samples = make_samples(data, None, 0.2, tokenizer, max_length=8192, loss="assistant", seed=1)
    options = {"sink": 2, "window": 10, "w_last": 8}
    ratios = measure(model, [example["input_ids"] for example in samples.training], **options)
    times = dict.fromkeys(range(N_LAYER), 0)
    for of_sample in ratios.tolist():
        for layer in sorted(times, key=lambda il: of_sample[il])[N_LAYER // 2 :]:
            times[layer] += 1
    _least, *others = sorted(set(times.values()))
    assert others  # that there is something to choose
    for n in range(1, N_LAYER):
        asked = {"select": None, "fraction": n / N_LAYER, "layers": None, "n_samples": 1000, "n_questions": 1, "seed": 1}
        chosen = layers.choose_layers(model, samples, **options, **asked, progress=lambda *_: None)
        assert len(chosen.spec.layers) == n and chosen.spec.prefill == "stream"
        streaming = [times[il] for il in range(N_LAYER) if il in chosen.spec.layers]
        full = [times[il] for il in range(N_LAYER) if il not in chosen.spec.layers]
        assert min(streaming) >= max(full)
    assert chosen.provenance.lazy_ratio == pytest.approx(ratios.mean(axis=0), abs=1e-12)


@pytest.mark.slow
def test_layers_with_which_the_model_loses_least(data, tokenizer):
    """The demo model finds things in layer 3; its lazy ratio is among the highest, so the frequent half has it."""
    samples = make_samples(data, None, 0.2, tokenizer, max_length=8192, loss="assistant", seed=1)
    asked = {"select": "loss", "fraction": 0.5, "layers": None, "sink": 4, "window": 124}
    numbers = {"n_samples": 8, "n_questions": 1, "w_last": 8, "seed": 1}
    chosen = layers.choose_layers(DEMO, samples, **asked, **numbers, progress=lambda *_: None)
    assert len(chosen.spec.layers) == 6 and 3 not in chosen.spec.layers
    assert (chosen.spec.window, chosen.spec.prefill, chosen.provenance.selection) == (124, "stream", "loss")
    assert "6 of 12 layers, as were asked for, chosen by what is lost" in chosen.reason


@pytest.mark.slow
def test_the_converter_takes_it_without_options(trained, tmp_path):
    out, _ = trained
    convert(out, tmp_path / "m.gguf", outtype="f32")
    found = read_model(tmp_path / "m.gguf")
    said = json.loads((out / "config.json").read_text())[KEY]
    assert found.spec == StreamingSpec(tuple(said["layers"]), N_LAYER, 2, 10, "stream")
    assert found.provenance.selection == "frequency"
    assert found.provenance.lazy_ratio == pytest.approx(said["lazy_ratio"], abs=1e-6)


class Killed(Exception):
    pass


def watched(steps: list[int], step: int | None = None):
    """A progress bar that writes down the steps that were made, and ends the training after the one given."""

    class Bar(trainer.ProgressBar):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)
            if state.global_step == step:
                raise Killed

    return Bar


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_weights(trained, model, data, tmp_path, monkeypatch):
    out, work = tmp_path / "out", tmp_path / "out-training"
    first, rest = [], []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "ProgressBar", watched(first, step=19))
        train(str(model), data, out, SETTINGS)
    assert not out.exists() and (work / "checkpoint-16").is_dir()
    (work / "checkpoint-18").mkdir()  # one that was being written
    for change, complaint in (
        ({}, "holds a training that was interrupted: use --resume"),
        ({"resume": True, "window": 11}, "was begun with another window"),
    ):
        with pytest.raises(ValueError, match=complaint):
            train(str(model), data, out, replace(SETTINGS, **change))
    monkeypatch.setattr(layers.analysis, "measure", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(trainer, "ProgressBar", watched(rest))
    record = train(str(model), data, out, replace(SETTINGS, resume=True))
    assert (first, rest) == (list(range(1, 20)), list(range(17, 21)))
    expected = weights(trained[0])
    got = weights(out)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    assert record == trained[1] and not work.exists()


@pytest.mark.slow
def test_lora_is_added_to_the_weights(model, data, tmp_path):
    out = tmp_path / "out"
    settings = replace(SETTINGS, lora=True, lora_rank=4, gradient_checkpointing=True, streaming_layers="1", learning_rate=2e-2)
    record = train(str(model), data, out, settings)
    assert record["held_out_loss"]["after"] < record["held_out_loss"]["before"] - 0.1
    before, after = weights(model), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    change = after["model.layers.1.self_attn.q_proj.weight"] - before["model.layers.1.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 4
    said = json.loads((out / "config.json").read_text())[KEY]
    assert (said["layers"], said["selection"], "lazy_ratio" in said) == ([1], "manual", False)


def test_gradients_do_not_pass_what_is_hidden(model, data, tmp_path, monkeypatch):
    """The model that is trained streams: with every layer streaming, a far token can't change the loss of an answer."""
    seen = []

    def look(self, args, state, control, model=None, **_):
        inputs = torch.randint(3, 300, (1, 60), generator=torch.Generator().manual_seed(0))
        embedded = model.get_input_embeddings()(inputs).detach().requires_grad_()
        model(inputs_embeds=embedded).logits[0, -1].sum().backward()
        seen.append((embedded.grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist())
        model.zero_grad()
        control.should_training_stop = True

    monkeypatch.setattr(trainer.ProgressBar, "on_step_end", look)
    train(str(model), data, tmp_path / "out", replace(SETTINGS, streaming_layers="all", window=1, eval_share=0))
    assert seen == [[0, 1, 59]]


def test_training_again_keeps_the_layers(trained, data, tmp_path):
    out, first = trained
    record = train(str(out), data, tmp_path / "again", replace(SETTINGS, steps=1))
    assert record["streaming"] == first["streaming"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())[KEY] == json.loads((out / "config.json").read_text())[KEY]


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"loss": "some"}, 'loss = "some": must be one of assistant, all'),
        ({"select": "kl"}, 'select = "kl": must be one of frequency'),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: must be more than 0"),
        ({"eval_share": 1.0}, "eval_share = 1.0: must be from 0 to less than 1"),
        ({"window": 0}, "window = 0"),
        ({"window": 500}, "no sample is longer than sink . window = 502 tokens"),
        ({"streaming_layers": "9"}, 'layers = "9"'),
        ({"streaming_layers": "none"}, "no layer is to stream"),
        ({"streaming_layers": "1", "select": "frequency"}, "chooses the layers itself"),
        ({"select": "trained"}, f'has no "{KEY}"'),
        ({"max_length": 8}, "no answer begins within 8 tokens"),
    ],
)
def test_what_is_refused_leaves_nothing(model, data, tmp_path, change, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        train(str(model), data, tmp_path / "out", replace(SETTINGS, **change))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(model, data, tmp_path):
    with pytest.raises(FileExistsError, match="exists, remove it or use --overwrite"):
        train(str(model), data, tmp_path, SETTINGS)


def test_a_tokenizer_without_a_template(tmp_path):
    with pytest.raises(ValueError, match="plain: its tokenizer has no chat template"):
        load_tokenizer(write_checkpoint(tmp_path / "plain"))


def test_a_run_that_was_not_begun_begins(tmp_path):
    run = Run(tmp_path / "work", {"seed": 1}, resume=True, is_main=True)
    assert not run.is_begun and run.last_checkpoint() is None
    chosen = layers.Chosen(StreamingSpec((1,), 3, 4, 5, "stream"), Provenance("frequency", (0.5, 1.0, 0.25)), "because")
    run.begin(chosen)
    assert Run(tmp_path / "work", {"seed": 1}, resume=True, is_main=True).chosen() == chosen


def test_the_picture_shows_every_loss():
    figure = loss_curve(
        [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}], {"full": 2.0, "before": 3.5, "after": 2.25}, "a $ model"
    )
    (axes,) = figure.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["training"] == ([1, 2], [3.0, 2.5])
    assert drawn["held out, streaming, before: 3.500"] == ([0], [3.5])
    assert drawn["held out, streaming, after: 2.250"] == ([2], [2.25])
    assert drawn["held out, full attention, before: 2.000"][1] == [2.0, 2.0]


def test_the_command_trains_and_says_what(model, data, tmp_path, lt_gguf_command):
    options = {"streaming-layers": 1, "sink": 2, "window": 10, "steps": 2, "accumulate": 1, "eval-share": 0.2}
    given = [f"--{name}={value}" for name, value in options.items()]
    status, out, err = lt_gguf_command("train", model, data, tmp_path / "out", *given)
    assert (status, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == f"{tmp_path / 'out'}: layers=1;sink=2;window=10;prefill=stream" and second.startswith("manual: 1 of 4 layers")
    assert re.fullmatch(r"held-out loss in nats a token: 5[.]\d{4} with full .* before and 5[.]\d{4} after 2 steps", third)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["lt-gguf train", "scripts/train_lt.py"])
def test_the_command_says_what_is_wrong_in_one_line(entry, model, data, tmp_path, lt_gguf_command):
    arguments = [str(model), str(data), str(tmp_path / "out"), "--streaming-layers", "9"]
    if entry == "lt-gguf train":
        status, _, said = lt_gguf_command("train", *arguments)
    else:  # which accelerate starts in each of several processes
        done = subprocess.run([sys.executable, ROOT / entry, *arguments], capture_output=True, text=True)
        status, said = done.returncode, done.stderr
    assert status == 1 and said.startswith('error: layers = "9"') and said.count("\n") == 1
