"""`lt-gguf eval`: the full model and hybrids on the same prompts and texts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_checkpoint import SINK, WINDOW, hybrid_file  # noqa: F401 - a fixture

from lt_gguf.evaluation.results import Journal
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.summary import Summary
from lt_gguf.report import plots

OF_THE_FILE = f"layers=1,3;sink={SINK};window={WINDOW};prefill=stream"
QUICK = ["--threads", "1", "--parallel", "3"]
ONE_TASK = ["--tasks", "single", "--lengths", "300", "--depths", "0.5", "--samples", "2"]
ONE_TEXT = ["--tasks", "kl", "--lengths", "300", "--text-samples", "3"]
SMALL = ["--tasks", "single,votes,kl,perplexity", "--lengths", "600", "--depths", "0,1", "--samples", "2", "--text-samples", "3"]


@pytest.fixture
def evaluate(lt_gguf_command, hybrid_file, text, monkeypatch):
    monkeypatch.delenv("LT_STREAMING", raising=False)
    return lambda *arguments: lt_gguf_command("eval", hybrid_file, *QUICK, "--text", text, *arguments)


@pytest.fixture
def pictures():
    """For a test that looks at them."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Drawing takes longer than all else."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Summary, "figures", lambda summary: iter(()))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the quick brown fox, {i * 7919 % 1000} öäü\n" for i in range(400)))
    return path


def records(folder: Path) -> dict[tuple, dict]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()[1:]]
    keys = ("spec", "task", "length", "depth", "index")
    found = {tuple(line.pop(key) for key in keys): line for line in lines}
    assert len(found) == len(lines)
    return found


def result(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_an_evaluation(evaluate, hybrid_file, tmp_path, pictures):
    out = tmp_path / "out"
    status, shown, err = evaluate(*SMALL, "--out", out)
    assert (status, err) == (0, "")
    names = ["scores", "depth_by_length", "kl"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")] + ["results.json", "results.md", "records.jsonl"]
    )
    found = records(out)
    expected = [("single", 600, depth, i) for depth in (0, 1) for i in (0, 1)] + [("votes", 600, None, i) for i in (0, 1)]
    expected += [("text", 600, None, i) for i in range(3)]
    assert set(found) == {(spec, *key) for spec in ("off", OF_THE_FILE) for key in expected}
    for key in expected:  # both models are asked the same
        assert found["off", *key]["prompt"] == found[OF_THE_FILE, *key]["prompt"]
    assert len({record["prompt"] for record in found.values()}) == len(expected)
    assert all(record["kl"] > 1e-6 for (spec, task, *_), record in found.items() if task == "text" and spec != "off")

    written = result(out)
    settings = written["settings"]
    assert settings["model"] == hybrid_file.name and settings["seed"] == 0 and settings["text"]["name"] == "text.txt"
    assert settings["scoring"] == "generated answer" and len(settings["sha256"]) == 64
    assert written["models"] == [{"name": "full", "spec": "off"}, {"name": "hybrid", "spec": OF_THE_FILE}]
    assert [(s["task"], s["spec"], s["n"]) for s in written["scores"]] == [
        ("single", "off", 4), ("single", OF_THE_FILE, 4), ("votes", "off", 2), ("votes", OF_THE_FILE, 2),
    ]  # fmt: skip
    assert str(tmp_path) not in "".join(path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md", ".jsonl"))

    lines = shown.splitlines()
    for word in ("single", "votes", "full", "hybrid", "perplexity", "KL to full, nats", "95 % confidence intervals"):
        assert any(word in line for line in lines), word
    assert f"hybrid: {OF_THE_FILE}" in lines and lines[-1].startswith(f"{out}: scores.png")


def test_where_nothing_is_dropped_nothing_is_lost(evaluate, tmp_path):
    same = "layers=0-3;sink=4;window=4000;prefill=stream"
    assert evaluate(*SMALL, "--streaming", same, "--cache-type", "f32", "--out", tmp_path / "out")[0] == 0
    (text,) = (t["divergence"] for t in result(tmp_path / "out")["text"] if t["spec"] == same)
    assert text["kl"]["value"] < 1e-6 and text["same_top"]["value"] == 1
    assert text["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-5)
    assert [s["difference"]["value"] for s in result(tmp_path / "out")["scores"] if s["spec"] == same] == [0, 0]


def test_types_of_the_cache_are_compared(evaluate, tmp_path):
    """Each with the full model and the hybrid, all beside the full model with --cache-type; and it goes on with what is there."""
    types = ["--cache-types", "bf16,f16", "--out", tmp_path / "out"]
    status, shown, err = evaluate(*ONE_TASK, *types)
    assert (status, err) == (0, "")
    assert {spec for spec, *_ in records(tmp_path / "out")} == {"off", OF_THE_FILE, "off@bf16", f"{OF_THE_FILE}@bf16"}
    assert "full, bf16: no layer streams, bf16 cache" in shown.splitlines()
    before = (tmp_path / "out" / "records.jsonl").read_text()
    assert evaluate(*ONE_TASK, *types)[0] == 0 and (tmp_path / "out" / "records.jsonl").read_text() == before
    assert evaluate(*ONE_TEXT, "--cache-types", "bf16,bf16/f16", "--out", tmp_path / "text")[0] == 0
    kl = {t["spec"]: t["divergence"]["kl"]["value"] for t in result(tmp_path / "text")["text"]}
    assert kl["off"] == 0 < kl["off@bf16/f16"] != kl["off@bf16"] and 0 < kl["off@bf16"] < kl[f"{OF_THE_FILE}@bf16"]


# so that it is interrupted before it has measured everything, however busy the machine is
SLOW_EVAL = """
import time
from lt_gguf.cli import main
from lt_gguf.evaluation.results import Journal

add = Journal.add
Journal.add = lambda *what, **values: (add(*what, **values), time.sleep(0.2))
main()
"""


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(evaluate, hybrid_file, text, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert evaluate(*SMALL, "--out", whole)[0] == 0

    arguments = ["eval", hybrid_file, "--text", text, *SMALL, *QUICK, "--out", stopped]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_EVAL, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    journal = stopped / "records.jsonl"
    end = time.monotonic() + 60
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 4) and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=60)
    measured = records(stopped)
    assert process.returncode == 130 and 3 <= len(measured) < len(records(whole)) == 18
    message = f"interrupted: {len(measured)} of 18 prompts are measured and kept in {stopped}: run the same command to go on\n"
    assert err == message and "single" in shown
    assert [path.name for path in stopped.iterdir()] == ["records.jsonl"]

    assert evaluate(*SMALL, "--out", stopped)[0] == 0
    assert dict(list(records(stopped).items())[: len(measured)]) == measured
    for key, record in records(whole).items():
        assert records(stopped)[key] == pytest.approx(record, abs=1e-3) if key[1] == "text" else records(stopped)[key] == record
    assert result(stopped)["scores"] == result(whole)["scores"]


def test_ctrl_c_without_a_folder(evaluate, monkeypatch):
    add = Journal.add

    def interrupted(journal, *arguments, **values):
        if len(journal.records) == 1:
            raise KeyboardInterrupt
        add(journal, *arguments, **values)

    monkeypatch.setattr(Journal, "add", interrupted)
    status, out, err = evaluate(*ONE_TASK)
    assert (status, err) == (130, "interrupted: 1 of 4 prompts are measured, none is kept without --out\n")
    assert "single" in out


def test_what_is_there_is_not_measured_again_and_more_can_be_added(evaluate, tmp_path, monkeypatch):
    out, other = tmp_path / "out", "layers=0;sink=2;window=30;prefill=full"
    both = [*ONE_TASK, *ONE_TEXT, "--tasks", "single,kl", "--streaming", OF_THE_FILE]
    assert evaluate(*both, "--out", out)[0] == 0
    before = (out / "records.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        for name in ("logprobs", "generate"):
            patched.setattr(Scorer, name, lambda scorer, requests, *_, **__: iter([*requests] and pytest.fail("measured again")))
        assert evaluate(*both, "--out", out)[0] == 0
    assert (out / "records.jsonl").read_bytes() == before
    assert evaluate(*ONE_TEXT, "--streaming", other, "--out", out)[0] == 0
    after = (out / "records.jsonl").read_bytes()
    assert after.startswith(before)
    first = {(spec, task) for spec in ("off", OF_THE_FILE) for task in ("single", "text")}
    assert {key[:2] for key in records(out)} == first | {(other, "text")}
    assert [model["name"] for model in result(out)["models"]] == ["full", "hybrid 1", "hybrid 2"]


def test_a_haystack_of_ones_own(evaluate, tmp_path, monkeypatch):
    book, out = tmp_path / "book.txt", tmp_path / "out"
    book.write_text("The grass is green. " * 30 + "\n\n" + "The sky is blue. " * 30)
    asked: list[str] = []
    generate = Scorer.generate

    def listening(scorer, requests, *arguments, **settings):
        for request in (requests := list(requests)):
            asked.append(scorer.detokenize(request[0]))
        return generate(scorer, requests, *arguments, **settings)

    monkeypatch.setattr(Scorer, "generate", listening)
    assert evaluate(*ONE_TASK, "--haystack", book, "--out", out)[0] == 0
    assert len(asked) == 4 and all(text.count("The grass is green.") + text.count("The sky is blue.") > 8 for text in asked)
    assert result(out)["settings"]["haystack"]["name"] == "book.txt"
    status, shown, err = evaluate(*ONE_TASK, "--out", out)
    assert (status, shown, err.count("\n")) == (1, "", 1) and "was measured with haystack = " in err
    status, shown, err = evaluate(*ONE_TASK, "--haystack", tmp_path / "none.txt")
    assert (status, shown, err.count("\n")) == (1, "", 1) and "none.txt" in err


def test_another_seed_needs_another_folder(evaluate, tmp_path):
    out = tmp_path / "out"
    assert evaluate(*ONE_TASK, "--out", out)[0] == 0
    status, shown, err = evaluate(*ONE_TASK, "--seed", 1, "--out", out)
    assert (status, shown, err.count("\n")) == (1, "", 1) and "was measured with seed = 0, this would be with 1" in err
    assert evaluate(*ONE_TASK, "--seed", 1, "--out", tmp_path / "other")[0] == 0
    one, other = ({record["prompt"] for record in records(folder).values()} for folder in (out, tmp_path / "other"))
    assert not one & other


def test_several_specs_are_compared_on_the_same_prompts(evaluate, tmp_path):
    specs = ["layers=1", "off", "layers=0,2;window=20", "auto:0.5;window=30"]
    arguments = [argument for spec in specs for argument in ("--streaming", spec)]
    status, shown, err = evaluate(*ONE_TASK, *arguments, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    # what a spec leaves out is the file's
    expected = ["off", OF_THE_FILE.replace("1,3", "1"), f"layers=0,2;sink={SINK};window=20;prefill=stream"]
    expected.append(f"auto=0.5;sink={SINK};window=30;w_last=16;lazy=min")
    assert [model["spec"] for model in result(tmp_path / "out")["models"]] == expected
    prompts = [[record["prompt"] for key, record in records(tmp_path / "out").items() if key[0] == spec] for spec in expected]
    assert prompts[0] and prompts == [prompts[0]] * 4
    assert "hybrid 3: auto=0.5" in shown


def test_without_the_full_model(evaluate, tmp_path):
    assert evaluate(*ONE_TASK[2:], "--tasks", "single,kl", "--no-full", "--text-samples", 2, "--out", tmp_path / "out")[0] == 0
    assert {key[0] for key in records(tmp_path / "out")} == {OF_THE_FILE}
    assert result(tmp_path / "out")["text"][0]["divergence"]["kl"]["value"] > 0  # which is to the full model all the same


def test_the_full_model_alone(evaluate, tmp_path):
    assert evaluate(*ONE_TEXT, "--streaming", "off", "--out", tmp_path / "alone")[0] == 0
    assert evaluate(*ONE_TEXT, "--out", tmp_path / "both")[0] == 0
    alone, both = (records(tmp_path / name) for name in ("alone", "both"))
    assert {key[0] for key in alone} == {"off"} and len(alone) == 3
    for key, record in alone.items():
        assert record == pytest.approx(both[key], abs=1e-4) and record["kl"] == 0


def test_the_environment_says_what_streams(evaluate, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_STREAMING", "layers=2")
    assert evaluate(*ONE_TASK, "--out", tmp_path / "out")[0] == 0
    assert result(tmp_path / "out")["models"][1]["spec"] == OF_THE_FILE.replace("1,3", "2")


def test_fast_scoring_is_not_mixed_with_generated_answers(evaluate, tmp_path):
    assert evaluate(*ONE_TASK, "--fast", "--out", tmp_path / "out")[0] == 0
    assert result(tmp_path / "out")["settings"]["scoring"] == "most likely tokens of the right answer"
    assert "was measured with scoring" in evaluate(*ONE_TASK, "--out", tmp_path / "out")[2]


def test_a_number_of_depths(evaluate, tmp_path):
    arguments = ["--tasks", "single", "--lengths", "300", "--samples", "1", "--streaming", "off", "--out", tmp_path / "out"]
    assert evaluate(*arguments, "--depths", 4)[0] == 0
    assert [key[3] for key in records(tmp_path / "out")] == [0, 0.333333, 0.666667, 1]


def test_without_out_nothing_is_written(evaluate, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = evaluate(*ONE_TASK)
    assert (status, err) == (0, "") and "single" in out
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--tasks", "single,twice"], '--tasks: "twice" is none, must be of single,multi-key,'),
        (["--lengths", "300,many"], '--lengths = "many": must be numbers of tokens, as in 1024,4096'),
        (["--lengths", "4096"], "--lengths: 4096 tokens, must be at most 2048, the model's context"),
        (["--lengths", "0"], "length = 0: must be at least 1 token"),
        (["--lengths", "100"], "a prompt of the task single takes"),
        ([*ONE_TASK, "--tasks", "single,multi-key"], "a prompt of the task multi-key takes"),
        (["--depths", "0,2"], '--depths = "0,2": must be numbers from 0 to 1, as in 0,0.5,1, or a number of depths'),
        (["--depths", "inf"], '--depths = "inf"'),
        (["--depths", "deep"], '--depths = "deep"'),
        (["--samples", "0"], "samples = 0: must be at least 1"),
        (["--text-samples", "0"], "samples of text = 0: must be at least 1"),
        (["--seed", "-1"], "seed = -1: must be at least 0"),
        (["--streaming", "layers=9"], 'layers = "9": must be'),
        (["--streaming", "auto:2"], "fraction = 2.0: must be a number from 0 to 1"),
        (["--parallel", "0"], "n_parallel = 0: must be an integer from 1"),
        (["--cache-type", "f8"], 'cache type = "f8": must be one of'),
        (["--cache-types", "q8_0/f8"], 'cache type = "f8": must be one of'),
        (["--text", "none.txt"], "none.txt: No such file"),
        ([*ONE_TEXT, "--lengths", "2000", "--text-samples", "9"], "text.txt: part 1 of 9 has"),
        (["--out", "TEXT"], "text.txt: is a file, must be a folder for the results"),
    ],
)
def test_an_error_is_one_line(evaluate, text, tmp_path, arguments, complaint):
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    status, out, err = evaluate(*arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ") and complaint in err


def test_a_file_without_streaming_layers(lt_gguf_command, tmp_path, text, monkeypatch):
    from support.small_gguf import write_small

    monkeypatch.delenv("LT_STREAMING", raising=False)
    (file,) = write_small(tmp_path / "plain.gguf")
    status, out, err = lt_gguf_command("eval", file, "--no-full")
    assert (status, out) == (1, "") and "the file has no streaming layers; give --streaming SPEC" in err


def test_what_is_no_model(lt_gguf_command, text):
    for file, complaint in (("none.gguf", "none.gguf: No such file or directory"), (text, "text.txt: is not a GGUF file")):
        status, out, err = lt_gguf_command("eval", file)
        assert (status, out, err.count("\n")) == (1, "", 1) and complaint in err


def test_a_missing_matplotlib_is_said_before_anything_is_measured(evaluate, tmp_path, monkeypatch):
    def check() -> None:
        raise ImportError("pictures need matplotlib: pip install 'lt-gguf[plot]'")

    monkeypatch.setattr(plots, "check", check)
    status, out, err = evaluate(*ONE_TASK, "--out", tmp_path / "out")
    assert (status, out) == (1, "") and "pictures need matplotlib" in err and not (tmp_path / "out").exists()
