"""The experiments' questions, journals and tables, without the hours of measuring."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from lt_gguf.evaluation.results import Journal
from lt_gguf.evaluation.summary import FULL
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.report import plots
from lt_gguf.spec import StreamingSpec

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "experiments"))

import experiments
import experiments_report
from experiments_layers import Choice
from experiments_report import Measured
from experiments_run import all_questions, ask_shared, turn_of
from experiments_settings import SINK, TRAINED, WINDOW

N_LAYER = 4
GOOD, BAD = (0, 1), (2, 3)
ASKED = all_questions(10, 600)


@pytest.fixture
def measured(tmp_path):
    """Experiments in whose journals the good layers lose a tenth of the prompts, the bad ones all."""
    layers = {f"{name} {percent} %": GOOD for name in ("auto", "kl", "lazy-ratio") for percent in (25, 50, 75)}
    layers |= {
        "frequency 50 %": GOOD,
        "reverse of lazy-ratio": BAD,
        "interleave-odd": BAD,
        "interleave-even": GOOD,
        "w_last 8": GOOD,
    }

    def spec(layers, prefill="full", sink=SINK, window=WINDOW) -> str:
        return str(StreamingSpec(tuple(layers), N_LAYER, sink, window, prefill))

    def add(name: str, spec: str, score) -> None:
        with Journal(tmp_path / f"{name}.jsonl", {}) as journal:
            for i, question in enumerate(ASKED):
                journal.add(spec, question, score=score(i), prompt="")

    add("layers", FULL, lambda i: 1.0)
    add("layers", spec(GOOD), lambda i: float(i % 10 > 0))
    add("layers", spec(BAD), lambda i: 0.0)
    add("agreement", spec(GOOD), lambda i: float(i % 10 > 1))
    add("cache-q8_0", FULL, lambda i: 0.5)
    add("cache-q8_0", spec(GOOD), lambda i: 0.25)
    trained = tmp_path / f"demo-trained-{TRAINED[0]}"
    trained.mkdir()
    (trained / "training.json").write_text(json.dumps({"streaming": spec(GOOD, "stream")}))
    add("stream", spec(GOOD, "stream"), lambda i: 0.0)
    add(f"trained-{TRAINED[0]}", spec(GOOD, "stream"), lambda i: 1.0)
    choice = Choice(layers, {32: [0.9, 0.8, 0.7, 0.6]})
    return Measured(Path("demo"), tmp_path, 600, N_LAYER, choice)


def table(text: str, name: str) -> list[list[str]]:
    body = text.split(f"<!-- table {name} -->\n")[1].split("<!-- end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.strip().splitlines()][2:]


def test_the_tables(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda *_: [])
    out = tmp_path / "docs"
    out.mkdir()
    shutil.copy(ROOT / "docs" / "evidence" / "results.md", out)
    experiments_report.write_report(measured, out)
    text = (out / "results.md").read_text()
    assert text.split("<!-- table")[0] == (ROOT / "docs" / "evidence" / "results.md").read_text().split("<!-- table")[0]

    strategies = {row[0]: row for row in table(text, "strategies")}
    assert [strategies["full"][i] for i in (-3, -2, -1)] == ["**100.0**", "", "50"]
    assert strategies["auto 50 %"][1] == "0, 1" and strategies["auto 50 %"][-3:][0] == "**90.0**"
    assert strategies["auto 50 %"][-2].startswith("10.0 % (")
    assert strategies["reverse of lazy-ratio"][-2].startswith("100.0 % (")
    for lazy in ("mean", "min"):
        assert strategies[f"lazy-ratio of each prompt, {lazy}"][2] == "not measured"
    order = [row[0] for row in table(text, "strategies")]
    assert order.index("auto 50 %") < order.index("interleave-odd")

    types = {(row[0], row[1]): row for row in table(text, "types")}
    assert types["KV q8_0", "hybrid"][-2].startswith("50.0 % (")  # beside the full model with the same cache
    assert types["f16", "hybrid"][-2].startswith("10.0 % (") and types["KV q4_0", "full"][2] == "not measured"
    training = {(row[0], row[2]): row for row in table(text, "training")}
    assert training[TRAINED[0], "stream mode before"][-2].startswith("100.0 %")
    assert training[TRAINED[0], "stream mode after"][-3] == "**100.0**"
    assert training[TRAINED[1], "stream mode after"][3] == "not measured"
    assert table(text, "agreement") == [["auto 50 %", "50", "45"], ["lazy-ratio 50 %", "50", "45"]]
    assert table(text, "ratios") == [["lazy ratio", "0.900", "0.800", "0.700", "0.600"]]


def test_a_table_that_is_not_known_leaves_the_file_as_it_is(measured, tmp_path):
    file = tmp_path / "results.md"
    file.write_text(before := "<!-- table sinks -->\n<!-- end -->\n<!-- table colours -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="there is no table 'colours'"):
        experiments_report.write_report(measured, tmp_path)
    assert file.read_text() == before


def test_fewer_prompts_are_the_first_of_more():
    few = all_questions(20, 600)
    assert {task: sum(q.task == task for q in few) for task in TASKS} == dict.fromkeys(TASKS, 20)
    assert all_questions(40, 600)[: len(few)] == few and [turn_of(q) for q in few] == sorted(turn_of(q) for q in few)
    for task in ("single", "multi-key"):
        depths = [question.depth for question in few if question.task == task]
        assert {depth: depths.count(depth) for depth in depths} == dict.fromkeys((0.0, 0.25, 0.5, 0.75, 1.0), 4)


def test_what_has_been_asked_is_not_asked_again(tmp_path):
    from lt_gguf.hf.shared_prefill import CheckpointScorer

    scorer = CheckpointScorer(ROOT / "models" / "demo")
    specs = [FULL, str(StreamingSpec((0, 2), scorer.n_layer, SINK, WINDOW, "full"))]
    asked, shown, read = ASKED[:3], [], []
    logprobs = scorer.logprobs
    scorer.logprobs = lambda prompt, *rest: read.append(prompt) or logprobs(prompt, *rest)
    with Journal(tmp_path / "layers.jsonl", {}) as journal:
        ask_shared(scorer, specs, asked[:2], journal, lambda *_: None)
        first = dict(journal.records)
        ask_shared(scorer, specs, asked, journal, lambda _, done, total: shown.append((done, total)))
        assert set(journal.records) == {(spec, question) for spec in specs for question in asked}
        assert {key: journal.records[key] for key in first} == first
        assert len(read) == len(asked), "what was answered before isn't asked again"
        assert shown == [(1, 3), (2, 3), (3, 3)] and (tmp_path / "layers.jsonl").read_text().count("\n") == 1 + 6


def test_a_part_that_there_is_not():
    from typer.testing import CliRunner

    app = experiments.typer.Typer()
    app.command()(experiments.main)
    result = CliRunner().invoke(app, ["--only", "colours"])
    assert result.exit_code == 2 and "colours" in result.output
