"""The choice of layers in models/smollm2/report.json, against the model that it is for."""

from __future__ import annotations

from dataclasses import replace

from lt_gguf.calibration import Texts
from lt_gguf.evaluation.candidates import open_candidates
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.gguf.file import read_model


def test_the_file_says_what_the_report_chose(hybrid, report):
    model = read_model(hybrid)
    assert model.spec == report.spec
    assert model.provenance.selection == report.selection.strategy == "loss"
    assert len(report.spec.layers) == model.n_layer // 2


def test_the_chosen_half_loses_less_than_the_other(smollm2, report, document):
    """On a prompt that it wasn't chosen by, and by more than a little: what the other half holds is what finds things."""
    spec = replace(report.spec, window=252)
    texts = Texts("stories", "", (document,) * 2)
    numbers = {"questions": 2, "length": 900}
    others = tuple(sorted(set(range(spec.n_layer)) - set(spec.layers)))
    with open_candidates(smollm2, spec, texts, **numbers, options=ScorerOptions(n_threads=1)) as candidates:
        chosen, other = (candidates.judging.measure(layers) for layers in (spec.layers, others))
    assert chosen.kl_answer < 0.5 * other.kl_answer, (chosen, other)
    assert chosen.kl_text < other.kl_text + 0.1
