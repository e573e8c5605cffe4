"""Types of the KV cache beside streaming: what is recommended, what breaks a model, and how a report says it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.candidates import Layers, candidates, evidence

from lt_gguf.memory.kv import KVShape
from lt_gguf.report.folder import write_report
from lt_gguf.report.report import Report
from lt_gguf.report.tables import print_caches
from lt_gguf.selection import Model, Request, Selection, strategy
from lt_gguf.selection.caches import Caches, measure_caches
from lt_gguf.selection.evidence import Evidence
from lt_gguf.selection.tolerance import Tolerance
from lt_gguf.spec.cache_types import PLAIN, CacheTypes, parse_cache_types

N = 4
SHAPE = KVShape((2,) * N, 2, 64, 64)
Q8, MIXED, Q4 = CacheTypes("q8_0", "q8_0"), CacheTypes("q8_0", "q4_0"), CacheTypes("q4_0", "q4_0")
FOUND = {PLAIN: 0.99, Q8: 0.99, MIXED: 0.985, Q4: 0.9}  # where half of the layers stream


def with_cache(types: CacheTypes, layers: Layers) -> Evidence:
    """Four bits break the full model, and not so much the hybrid."""
    return evidence(0.01, *[FOUND[types] if layers else 0.2 if types == Q4 else 1.0] * 20)


def streaming(layers: Layers) -> Evidence:
    return evidence(0.001 * sum(layers) + 0.001 * len(layers), *[1.0 - 0.005 * len(layers)] * 20)


def chosen() -> Selection:
    measured = candidates(streaming)
    return strategy("loss").select(Request(Model("llama", "a model", N, N), candidates=measured, fraction=0.5))


def measure(types=(Q8, MIXED, Q4), judged=with_cache, tolerance: Tolerance | None = None) -> Caches:
    judge = replace(candidates(streaming), with_cache=judged)
    caches = measure_caches(types, chosen(), N, SHAPE, judge, tolerance or Tolerance())
    assert judge.caches_announced == 2 * len(types)
    return caches


def test_types_are_read():
    assert parse_cache_types("q8_0, q8_0/q4_0,q4_0,q8_0,f16") == (Q8, MIXED, Q4) and parse_cache_types("") == ()
    assert [str(types) for types in (Q8, MIXED)] == ["q8_0", "q8_0/q4_0"]
    with pytest.raises(ValueError, match='cache type = "q9": must be one of f32, f16'):
        parse_cache_types("q8_0/q9")
    with pytest.raises(ValueError, match="cache type = q4_0: its blocks of 32 elements don't divide this model's heads of 80"):
        measure_caches((Q4,), chosen(), N, KVShape((2,) * N, 2, 80, 80), candidates(streaming), Tolerance())


def test_the_smallest_cache_within_the_tolerance_is_recommended():
    """Beside the same layers in 16 bits, which lose a share that was accepted."""
    found = measure()
    assert found.recommended == MIXED and found.breaking == (Q4,)
    assert measure(tolerance=Tolerance(0.1)).recommended == Q4
    assert measure(tolerance=Tolerance(0.001)).recommended == Q8
    assert measure(tolerance=Tolerance(0.001, 0.001)).recommended == PLAIN  # of divergence each adds too much
    assert measure((Q4,)).recommended == PLAIN


def test_what_is_measured_and_what_it_takes():
    found = measure()
    half = chosen().layers
    assert [len(point.layers) for point in found.points if point.types == PLAIN] == [0, 1, 2, 3, 4]
    sets = {(point.types, point.layers): point.n_bytes for point in found.points if point.layers in ((), half)}
    assert list(sets) == [(types, layers) for types in (PLAIN, Q8, MIXED, Q4) for layers in ((), half)]
    full = sets[PLAIN, ()]
    assert full == 32768 * N * 2 * 2 * 64 * 2  # tokens, layers, K and V, heads, elements, bytes
    assert sets[Q8, ()] / full == 34 / 64 and sets[MIXED, ()] / full == (34 + 18) / 128
    streaming_bytes = sets[PLAIN, half] - full // 2
    assert sets[Q4, half] == full // 2 * 18 // 64 + streaming_bytes  # they keep 16 bits
    assert found.points[-1].evidence == with_cache(Q4, half)


def test_the_report_says_it(tmp_path, capsys):
    found = chosen()
    report = Report("m.gguf", "llama", found.spec(N), found, 0.5, caches=measure())
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Report.from_json(content) == report
    assert "loss_over_memory.svg" in {path.name for path in write_report(report, tmp_path / "report")}
    picture = (tmp_path / "report" / "loss_over_memory.svg").read_text()
    assert "KV cache at 32,768 tokens" in picture and "quantizing alone" in picture and "q8_0/q4_0" in picture
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| q8_0/q4_0 | 2 of 4 | " in text and "(loss_over_memory.png)" in text
    print_caches(report)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (recommended,) = (row for row in rows if row[-1:] == ["recommended"])
    assert recommended[:4] == ["q8_0/q4_0", "2", "of", "4"]
    assert [row[0] for row in rows if row[-2:] == ["breaks", "it"]] == ["q4_0"]


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("recommended", ["q8_0"], r'cache_types: recommended = \["q8_0"\]: must be a list of two types'),
        ("breaking", [["q8_0", 3]], r"cache_types: breaking = .*: must be a list of lists of two types"),
        ("points", [], r"cache_types: points = \[\]: must be a list of objects"),
    ],
)
def test_a_wrong_report(key, value, complaint):
    found = chosen()
    content = Report("m.gguf", "llama", found.spec(N), found, 0.5, caches=measure()).to_json()
    content["cache_types"][key] = value
    with pytest.raises(ValueError, match=complaint):
        Report.from_json(content)


def test_an_older_report_has_none():
    found = chosen()
    content = Report("m.gguf", "llama", found.spec(N), found, 0.5).to_json()
    del content["cache_types"]
    assert Report.from_json(content).caches is None
