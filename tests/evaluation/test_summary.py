"""What the records of an evaluation come to, in numbers, tables and pictures."""

from __future__ import annotations

import json

import pytest

from lt_gguf.evaluation.divergence import Means
from lt_gguf.evaluation.results import Records
from lt_gguf.evaluation.retrieval import Question
from lt_gguf.evaluation.summary import Summary, names_of
from lt_gguf.statistics import paired_difference, relative_loss, wilson

HYBRID, OTHER = "layers=1;sink=4;window=8;prefill=full", "layers=2;sink=4;window=8;prefill=full"
# scores of the same prompts, by task, length and depth
CELLS = [("single", 100, 0.0), ("single", 100, 1.0), ("single", 200, 0.0), ("votes", 100, None)]
FULL_SCORES = dict(zip(CELLS, ([1, 1, 1, 0], [1, 1], [1, 0], [1, 1])))
HYBRID_SCORES = dict(zip(CELLS, ([1, 0, 0, 0], [1, 1], [0, 1], [1, 0.5])))
FULL_NLL = [1.0, 1.2, 1.1, 1.3, 0.9, 1.0, 1.2, 1.1]
HYBRID_NLL = [1.1, 1.4, 1.2, 1.3, 1.1, 1.2, 1.3, 1.2]  # on average 0.125 more than 1.1


def records() -> Records:
    made: Records = {}
    for spec, scores in (("off", FULL_SCORES), (HYBRID, HYBRID_SCORES)):
        for (task, length, depth), several in scores.items():
            for i, score in enumerate(several):
                made[spec, Question(task, length, depth, i)] = {"score": score, "prompt": f"{task}{i}"}
    for i, (full, hybrid) in enumerate(zip(FULL_NLL, HYBRID_NLL)):
        made["off", Question("text", 100, None, i)] = Means(0, 1, full, full)._asdict() | {"prompt": "p"}
        made[HYBRID, Question("text", 100, None, i)] = Means(0.5 + i / 10, 0.75, full, hybrid)._asdict() | {"prompt": "p"}
    return made


def summary(made: Records | None = None, specs: tuple[str, ...] = ("off", HYBRID)) -> Summary:
    return Summary({"model": "m.gguf", "seed": 3}, names_of(specs), records() if made is None else made)


def test_scores_of_each_task_and_length():
    scores = {(s.task, s.length, s.spec): s for s in summary().scores()}
    lengths = (("single", 100), ("single", 200), ("votes", 100))
    assert list(scores) == [(task, length, spec) for task, length in lengths for spec in ("off", HYBRID)]
    full, hybrid = scores["single", 100, "off"], scores["single", 100, HYBRID]
    assert (full.n, hybrid.n) == (6, 6) and full.difference is None
    assert full.score == (5 / 6, *wilson(5 / 6, 6)) and hybrid.score == (0.5, *wilson(0.5, 6))
    assert hybrid.difference == paired_difference([1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1])
    assert hybrid.difference.value == pytest.approx(-2 / 6)  # below 0: worse
    assert scores["single", 200, HYBRID].difference.value == 0


def test_only_the_same_prompts_are_compared():
    made = records()
    for i in (1, 2):  # those that only the full model got right, as if the hybrid had been interrupted before them
        del made[HYBRID, Question("single", 100, 0.0, i)]
    by_key = {(s.task, s.length, s.spec): s for s in summary(made).scores()}
    assert by_key["single", 100, "off"].n == 6 and by_key["single", 100, HYBRID].n == 4
    assert by_key["single", 100, HYBRID].difference == paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
    without_full = {key: record for key, record in made.items() if key[0] == HYBRID}
    alone = summary(without_full)
    assert [s.difference for s in alone.scores()] == [None] * 3 and alone.losses() == {}


def test_the_relative_loss():
    hybrid_single, full_single = [1, 0, 0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1, 1, 0]
    expected = relative_loss({"single": full_single, "votes": [1, 1]}, {"single": hybrid_single, "votes": [1, 0.5]})
    assert summary().losses() == {HYBRID: expected}
    assert expected.value == pytest.approx(((1 - 4 / 6) + (1 - 0.75)) / 2)
    nothing_right = records() | {("off", Question("votes", 100, None, i)): {"score": 0} for i in (0, 1)}
    assert summary(nothing_right).losses() == {HYBRID: relative_loss({"single": full_single}, {"single": hybrid_single})}


def test_text_scores():
    full, hybrid = summary().text_scores()
    assert (full.spec, full.length, full.n) == ("off", 100, 8) and (hybrid.spec, hybrid.n) == (HYBRID, 8)
    assert hybrid.divergence.kl.value == pytest.approx(0.85) and hybrid.divergence.same_top.value == 0.75
    assert hybrid.divergence.full_perplexity == full.divergence.full_perplexity == full.divergence.hybrid_perplexity
    assert hybrid.divergence.hybrid_perplexity.value > full.divergence.hybrid_perplexity.value


def test_tables():
    tasks, text = summary().tables()
    assert [row[:4] for row in tasks.rows[:2]] == [("single", "100", "full", "6"), ("single", "100", "hybrid", "6")]
    low, high = wilson(5 / 6, 6)
    assert tasks.rows[0][4:] == (f"83.3 [{100 * low:.1f}, {100 * high:.1f}]", "")
    assert tasks.rows[1][4].startswith("50.0 [") and tasks.rows[1][5].startswith("-33.3 [-")
    assert tasks.rows[3][5].startswith("+0.0 [")
    assert text.rows[0][:3] == ("100", "full", "8") and text.rows[0][4:] == ("", "", "")
    perplexity, ratio, kl, same_top = text.rows[1][3:]
    assert perplexity.startswith("3.40 [") and ratio.startswith("+13.31 [+") and kl.startswith("0.8500 [")
    assert same_top == "75.0 [75.0, 75.0]"
    notes = summary().notes()
    assert notes[1:3] == ["full: no layer streams", f"hybrid: {HYBRID}"] and "95 % confidence" in notes[0]
    assert notes[3].startswith("hybrid: relative loss 29.2 [")


def test_an_interval_that_is_not_known_is_not_shown():
    one = {key: record for key, record in records().items() if key[1].index == 0}
    _, text = summary(one).tables()
    assert text.rows[1][3:6] == ("3.00", "+10.52", "0.5000")
    json.dumps(summary(one).to_json(), allow_nan=False)
    assert summary(one).to_json()["text"][1]["divergence"]["kl"] == {"value": 0.5, "low": 0.0, "high": None}


def test_nothing_was_measured():
    empty = summary({})
    assert (empty.tables(), empty.losses(), list(empty.figures())) == ([], {}, [])
    assert empty.notes() == ["full: no layer streams", f"hybrid: {HYBRID}"]


def test_names():
    assert names_of(["off"]) == {"off": "full"} and names_of([HYBRID]) == {HYBRID: "hybrid"}
    assert names_of(["off", HYBRID, OTHER]) == {"off": "full", HYBRID: "hybrid 1", OTHER: "hybrid 2"}
    assert names_of(["off", HYBRID, "off@q8_0/q4_0", f"{HYBRID}@q4_0"]) == {
        "off": "full", HYBRID: "hybrid", "off@q8_0/q4_0": "full, q8_0/q4_0", f"{HYBRID}@q4_0": "hybrid, q4_0",
    }  # fmt: skip


def test_records_of_other_specs_are_left_out():
    made = records() | {(OTHER, Question("single", 100, 0.0, 0)): {"score": 1}}
    assert summary(made).to_json() == summary().to_json()
    assert {score.spec for score in summary(made, ("off", HYBRID, OTHER)).scores()} == {"off", HYBRID, OTHER}


def test_the_files(tmp_path):
    files = summary().write(tmp_path / "out")
    pictures = [f"{name}.{suffix}" for name in ("scores", "depth_by_length", "kl") for suffix in ("png", "svg")]
    assert [path.name for path in files] == [*pictures, "results.md", "results.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in files)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["settings"] == {"model": "m.gguf", "seed": 3}
    assert content["models"] == [{"name": "full", "spec": "off"}, {"name": "hybrid", "spec": HYBRID}]
    cells = {(c["spec"], c["task"], c["length"], c["depth"]): (c["n"], c["score"]) for c in content["cells"]}
    for spec, scores in (("off", FULL_SCORES), (HYBRID, HYBRID_SCORES)):
        for key, several in scores.items():
            assert cells.pop((spec, *key)) == (len(several), pytest.approx(sum(several) / len(several)))
    assert not cells
    assert [row["spec"] for row in content["relative_loss"]] == [HYBRID]
    assert len(content["scores"]) == 6 and len(content["text"]) == 2

    page = (tmp_path / "out" / "results.md").read_text()
    assert page.startswith("# Evaluation of m.gguf\n") and "![depth by length](depth_by_length.png)" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 7 for line in rows[:8]) and rows[0].startswith("| task | length | model |")
    assert rows[1] == "| --- | --- | --- | ---: | ---: | ---: |"
    assert str(tmp_path) not in page + json.dumps(content)


def test_only_pictures_of_what_was_measured():
    def names(task: str, specs: tuple[str, ...] = ("off", HYBRID)) -> list[str]:
        made = {key: record for key, record in records().items() if key[1].task == task and key[0] in specs}
        return [name for name, _ in summary(made, specs).figures()]

    assert names("single") == ["scores", "depth_by_length"] and names("votes") == ["scores"]
    assert names("text") == ["kl"] and names("text", ("off",)) == []
