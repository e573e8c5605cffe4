"""`auto`: the best measured of several candidates, judged on prompts that none was chosen by, and never a clearly worse one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.candidates import Layers, candidates, evidence

from lt_gguf.report.model_card import streaming_section
from lt_gguf.report.report import Report
from lt_gguf.selection import Model, Request, Selection, strategy
from lt_gguf.selection.best import best
from lt_gguf.selection.evidence import Candidate, Evidence

N_LAYER = 6
RATIOS = np.array([[0.9, 0.8, 0.7, 0.1, 0.2, 0.4], [0.0, 0.9, 0.8, 0.7, 0.1, 0.6], [0.0, 0.9, 0.8, 0.7, 0.1, 0.6]])
CHOSEN = {
    "lazy-ratio": (1, 2, 5),
    "frequency": (1, 2, 3),
    "interleave-odd": (1, 3, 5),
    "interleave-even": (0, 2, 4),
    "kl": (3, 4, 5),
}


def choosing(layers: Layers) -> Evidence:
    return evidence(sum(0.1 * (N_LAYER - il) for il in layers))


def select(judging) -> tuple[Selection, object]:
    measured = candidates(choosing, judging)
    request = Request(Model("llama", "a model", N_LAYER, N_LAYER), ratios=RATIOS, candidates=measured)
    return strategy("auto").select(request), measured


@pytest.mark.parametrize("winner", CHOSEN)
def test_the_best_measured_is_taken(winner):
    found, measured = select(lambda layers: evidence(0.0 if layers in ((), CHOSEN[winner]) else 0.5))
    assert (found.strategy, found.layers) == ("auto", CHOSEN[winner])
    assert found.reason.startswith(f"as {winner} chooses, the best measured of 5 candidates: 100.0% of what 1 questions ask for")
    assert {candidate.name: candidate.layers for candidate in found.candidates} == {"full": ()} | CHOSEN
    # kl chooses by other prompts than those on which it is judged
    assert measured.judging.asked == [(), *CHOSEN.values()]
    assert measured.choosing.asked == [(), *((il,) for il in range(N_LAYER))]
    assert measured.announced == [(len(measured.choosing.asked), len(measured.judging.asked))]


def test_what_is_found_counts_before_the_divergence():
    def judging(layers: Layers) -> Evidence:
        if layers == CHOSEN["interleave-odd"]:
            return evidence(0.9, *[1.0] * 20)
        return evidence(0.1 if layers else 0.0, *[1.0, 0.0] * 10)

    assert select(judging)[0].layers == CHOSEN["interleave-odd"]


def test_within_noise_the_divergence_decides():
    ones = [1.0] * 19
    close = [Candidate("a", (0,), evidence(0.5, 1.0, *ones)), Candidate("b", (1,), evidence(0.1, 0.0, *ones))]
    assert best(close).name == "b" and best(close[::-1]).name == "b"
    # the same share over many questions is no noise any more
    clear = [Candidate("a", (0,), evidence(0.5, *[1.0, *ones] * 20)), Candidate("b", (1,), evidence(0.1, *[0.0, *ones] * 20))]
    assert best(clear).name == "a" and best(clear[::-1]).name == "a"


def test_where_nothing_is_found_the_divergence_decides():
    found, _ = select(lambda layers: evidence(0.0 if layers in ((), CHOSEN["kl"]) else 0.5, *[0.0] * 9))
    assert found.layers == CHOSEN["kl"]


def test_the_same_layers_are_judged_once():
    measured = candidates(lambda layers: evidence(sum(0.1 * (il not in (1, 3, 5)) for il in layers)))
    request = Request(Model("llama", "a model", N_LAYER, N_LAYER), ratios=RATIOS, candidates=measured)
    found = strategy("auto").select(request)
    assert found.layers == (1, 3, 5) and len(found.candidates) == 6
    assert measured.judging.asked.count((1, 3, 5)) == 1 and len(measured.judging.asked) == 5


def test_the_evidence_in_the_report_and_the_card():
    found, _ = select(lambda layers: evidence(0.1 * len(layers), *[1.0, 0.5, 1.0, 0.0] if layers else [1.0] * 4))
    report = Report("m.gguf", "llama", found.spec(N_LAYER), found, 0.5, ratios=tuple(map(tuple, RATIOS.tolist())))
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["strategy"] == "auto" == report.provenance.selection
    assert [described["name"] for described in content["candidates"]] == ["full", *CHOSEN]
    lazy = content["candidates"][1]
    assert (lazy["name"], lazy["layers"], lazy["accuracy"], lazy["kl_later"]) == ("lazy-ratio", [1, 2, 5], 0.5, None)
    assert (lazy["kl_text"], lazy["kl_first"]) == (pytest.approx(0.3), pytest.approx(0.3))
    assert lazy["loss"][0] == pytest.approx(0.375) and lazy["loss"][1] < 0.375 < lazy["loss"][2]
    assert lazy["outcomes"][2] == ["first", "number", 100, 1, pytest.approx(0.3), 1.0, 0.5, False]
    assert content["measurement"]["sets"] == 13
    assert Report.from_json(content) == report
    text = streaming_section(report)
    assert "| full | none | 0.0000 | 0.0000 | - | 0 % | 100.0% |  |" in text
    assert "| frequency | 1-3 | 0.3000 | 0.3000 | - | 37.5% (" in text
    table = text.split("| candidate |")[1]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.endswith("| streams |")] == ["lazy-ratio"]
    assert (
        "3 conversations to choose by, and 6 of 100 and 2 of 400 tokens to judge by, from book.txt (sha256 0123456789ab); 13 sets"
        in text
    )


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("candidates", 3, "candidates = 3: must be null, or a list of objects"),
        ("candidates", [3], "candidates = .3.: must be null, or a list of objects"),
        ("candidates", [{"name": "x", "outcomes": []}], "candidates: layers: is missing, must be a list of layers"),
        ("layers", [6], 'candidates: layers = "6": must be'),
        (
            "outcomes",
            [],
            r"candidates: outcomes = \[\]: must be a list of lists of where, kind, length, prompt, kl, known, found, hit",
        ),
        ("outcomes", [["first", "number", 100, 1, 0.3, 1.0, 2, True]], "candidates: outcomes = "),
        ("outcomes", [["text", "text", 100, 1, 0.3, 1.0, 1, True]], "candidates: outcomes = "),
        ("measurement", [], r"measurement = \[\]: must be an object, or null"),
        ("conversations", 0, "measurement: conversations = 0: must be an integer of at least 1"),
    ],
)
def test_wrong_evidence_in_a_report(key, value, complaint):
    found, _ = select(choosing)
    content = Report("m.gguf", "llama", found.spec(N_LAYER), found).to_json()
    part = content if key in content else content["candidates"][2] if key in content["candidates"][2] else content["measurement"]
    part[key] = value
    with pytest.raises(ValueError, match=complaint) as error:
        Report.from_json(content)
    assert "\n" not in str(error.value)


def test_an_older_report_has_no_evidence():
    found, _ = select(choosing)
    content = Report("m.gguf", "llama", found.spec(N_LAYER), found).to_json()
    del content["candidates"], content["measurement"]
    selection = Report.from_json(content).selection
    assert (selection.candidates, selection.measurement) == ((), None)
