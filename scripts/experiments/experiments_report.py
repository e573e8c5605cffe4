"""Tables and pictures of the experiments, put into docs/evidence/results.md.

The text there is written by hand; what stands between `<!-- table NAME -->` and `<!-- end -->` is replaced by what was measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experiments_layers import Choice
from experiments_settings import CACHE_TYPES, PER_PROMPT, SINK, SINKS, TRAINED, WEIGHT_TYPES, WINDOW, WINDOWS
from experiments_training import trained_checkpoint, trained_spec

from lt_gguf.evaluation.pictures import bars
from lt_gguf.evaluation.results import write_text
from lt_gguf.evaluation.retrieval import Question
from lt_gguf.evaluation.summary import FULL
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.report import plots
from lt_gguf.spec import StreamingSpec
from lt_gguf.statistics import Estimate, mean_score, relative_loss

Scores = Mapping[Question, float]

_TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """What was measured: of which model, with which layers, and the folder with its journals."""

    checkpoint: Path
    work: Path
    length: int
    n_layer: int
    choice: Choice

    def spec(self, layers: tuple[int, ...], prefill: str = "full", sink: int = SINK, window: int = WINDOW) -> str:
        """The text of a spec."""
        return str(StreamingSpec(layers, self.n_layer, sink, window, prefill))


class Records:
    """What the journals in a folder say, by journal and spec."""

    def __init__(self, work: Path) -> None:
        self._found: dict[str, dict[str, dict[Question, float]]] = {}
        for path in sorted(work.glob("*.jsonl")):
            lines = path.read_text().splitlines()
            if not lines or "settings" not in lines[0]:
                continue
            journal = self._found.setdefault(path.stem, {})
            for line in lines[1:]:
                record = json.loads(line)
                question = Question(*(record[field] for field in Question._fields))
                journal.setdefault(record["spec"], {})[question] = record["score"]

    def scores(self, journal: str, spec: str) -> Scores | None:
        """Of one spec, `None` if it wasn't measured."""
        return self._found.get(journal, {}).get(spec)


def write_report(measured: Measured, out: Path) -> None:
    """Replaces the tables of `out`/results.md, and the pictures beside it."""
    report = _Report(measured)
    path = out / "results.md"
    unknown: list[str] = []

    def table(match: re.Match[str]) -> str:
        make = getattr(report, match[2].replace("-", "_"), None)
        if make is None:
            unknown.append(match[2])
            return match[0]
        return f"{match[1]}{make()}\n{match[3]}"

    text = _TABLE.sub(table, path.read_text())
    if unknown:
        raise ValueError(f"{path}: there is no table {unknown[0]!r}")
    write_text(path, text)
    report.draw(out)


class _Report:
    def __init__(self, measured: Measured) -> None:
        self.measured, self.layers = measured, measured.choice.layers
        self.records = Records(measured.work)
        self.full = self.records.scores("layers", FULL)

    # -- tables, by the names that stand in results.md

    def strategies(self) -> str:
        """Half of the layers, Test mode, by each strategy."""
        names = [name for name in self.layers if name.endswith(" 50 %") or name.split()[0] in ("reverse", "random")]
        names += ["interleave-odd", "interleave-even"]
        rows = [("full", "", self._test_mode(None))]
        rows += sorted(
            ((name, _listed(self.layers[name]), self._test_mode(self.layers[name])) for name in names),
            key=lambda row: -_average(row[2]) if row[2] else 0,
        )
        for lazy, spec in PER_PROMPT.items():
            rows.append((f"lazy-ratio of each prompt, {lazy}", "differ", self.records.scores("prompt", spec)))
        return self._table(("layers chosen by", "streaming layers"), rows)

    def ratios(self) -> str:
        """The lazy ratio of each layer."""
        ratios = self.measured.choice.ratios[32]
        header = "| layer | " + " | ".join(map(str, range(len(ratios)))) + " |"
        line = "| --- " * (len(ratios) + 1) + "|"
        return "\n".join([header, line, "| lazy ratio | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |"])

    def fractions(self) -> str:
        """25, 50 and 75 % of the layers, Test and stream mode."""
        rows = [("full", "", self._test_mode(None))]
        for percent in (25, 50, 75):
            for strategy in ("auto", "lazy-ratio"):
                layers = self.layers[f"{strategy} {percent} %"]
                rows.append((f"{percent} %, {strategy}", "Test", self._test_mode(layers)))
                rows.append(
                    (f"{percent} %, {strategy}", "stream", self.records.scores("stream", self.measured.spec(layers, "stream")))
                )
        return self._table(("layers that stream", "mode"), rows)

    def sinks(self) -> str:
        """Test mode with other numbers of sinks."""
        best = self.layers["auto 50 %"]
        rows = [(str(n), self._test_mode(best, sink=n)) for n in SINKS]
        return self._table(("sinks",), [("full", self._test_mode(None)), *rows])

    def windows(self) -> str:
        """Test mode with other windows."""
        best = self.layers["auto 50 %"]
        rows = [(str(n), self._test_mode(best, window=n)) for n in WINDOWS]
        return self._table(("window",), [("full", self._test_mode(None)), *rows])

    def w_last(self) -> str:
        """Layers chosen by lazy ratios of the last 8 to 64 queries."""
        names = [name for name in self.layers if name.startswith("w_last")]
        rows = [(name.split()[1], _listed(self.layers[name]), self._test_mode(self.layers[name])) for name in names]
        return self._table(("w_last", "streaming layers"), [("full", "", self._test_mode(None)), *rows])

    def types(self) -> str:
        """Types of cache and weights, full beside hybrid."""
        hybrid = self.measured.spec(self.layers["auto 50 %"])
        runs = (
            {"f16": "layers"}
            | {f"KV {t}": f"cache-{t}" for t in CACHE_TYPES}
            | {f"weights {t}": f"weights-{t}" for t in WEIGHT_TYPES}
        )
        rows = []
        for name, journal in runs.items():
            full = self.records.scores(journal, FULL)
            rows += [(name, "full", full), (name, "hybrid", self.records.scores(journal, hybrid), full)]
        return self._table(("types", "attention"), rows)

    def training(self) -> str:
        """Stream mode before and after LightTransfer-Train."""
        rows = [("full", "", "", self._test_mode(None))]
        for select in TRAINED:
            trained, n_layer = trained_checkpoint(self.measured.checkpoint, self.measured.work, select), self.measured.n_layer
            spec = trained_spec(trained, n_layer)
            layers = _listed(StreamingSpec.parse(spec, n_layer).layers) if spec else ""
            rows += [
                (select, layers, "stream mode before", self.records.scores("stream", spec)),
                (select, layers, "stream mode after", self.records.scores(f"trained-{select}", spec)),
                (select, layers, "full attention after", self.records.scores(f"trained-{select}", FULL)),
            ]
        return self._table(("layers chosen by", "streaming layers", ""), rows)

    def agreement(self) -> str:
        """How often torch and the runtime score a prompt alike."""
        rows = ["| hybrid | prompts | scored alike |", "| --- | --: | --: |"]
        for name in (None, "auto 50 %", "lazy-ratio 50 %", "reverse of lazy-ratio", "interleave-odd"):
            spec = FULL if name is None else self.measured.spec(self.layers[name])
            torch, runtime = self.records.scores("layers", spec), self.records.scores("agreement", spec)
            if torch and runtime:
                both = [(torch[q], runtime[q]) for q in runtime if q in torch]
                rows.append(f"| {name or 'full'} | {len(both)} | {sum(a == b for a, b in both)} |")
        return "\n".join(rows)

    # -- pictures

    def draw(self, out: Path) -> None:
        """Strategies as bars."""
        names = {"full": None} | {
            name.removesuffix(" 50 %"): self.layers[name]
            for name in ("auto 50 %", "kl 50 %", "lazy-ratio 50 %", "interleave-even", "interleave-odd", "reverse of lazy-ratio")
        }
        estimates: dict[str, dict[str, Estimate]] = {}
        for name, layers in names.items():
            if scores := self._test_mode(layers):
                estimates[name] = {task: mean_score(of_task) for task, of_task in _by_task(scores).items()}
        if estimates:
            n = len(self.full or ()) // len(TASKS)
            subtitle = f"half of the layers stream, sink 4, window {WINDOW}, {self.measured.length} tokens, about {n} prompts a task, 95 % intervals"
            plots.save(bars(estimates, "Which layers stream", subtitle), out / "results-strategies")

    # -- parts of tables

    def _test_mode(self, layers: Sequence[int] | None, **changed: int) -> Scores | None:
        return self.records.scores("layers", FULL if layers is None else self.measured.spec(tuple(layers), **changed))

    def _table(self, left: Sequence[str], rows: Iterable[tuple]) -> str:
        """Rows: texts, scores, and what they are compared with if not the full model."""
        tasks = list(TASKS)
        header = [*left, *tasks, "average", "relative loss", "prompts"]
        lines = [f"| {' | '.join(header)} |", "| " + " | ".join(["---"] * len(left) + ["--:"] * (len(tasks) + 3)) + " |"]
        for row in rows:
            texts, scores, *against = row[: len(left)], *row[len(left) :]
            lines.append(f"| {' | '.join([*texts, *self._cells(scores, against[0] if against else self.full)])} |")
        return "\n".join(lines)

    def _cells(self, scores: Scores | None, full: Scores | None) -> list[str]:
        if not scores:
            return ["not measured"] + [""] * (len(TASKS) + 2)
        by_task = _by_task(scores)
        cells = [_interval(mean_score(by_task[task])) if task in by_task else "" for task in TASKS]
        cells.append(f"**{100 * _average(scores):.1f}**")
        if not full or full is scores:
            return [*cells, "", f"{len(scores):,}"]
        common = [question for question in scores if question in full]
        loss = relative_loss(*(_by_task({q: s[q] for q in common}) for s in (full, scores)))
        return [*cells, f"{100 * loss.value:z.1f} % ({100 * loss.low:.1f} to {100 * loss.high:.1f})", f"{len(scores):,}"]


def _by_task(scores: Scores) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for question in sorted(scores, key=lambda q: (list(TASKS).index(q.task), q.length, q.depth or 0, q.index)):
        found.setdefault(question.task, []).append(scores[question])
    return found


def _average(scores: Scores) -> float:
    return float(np.mean([np.mean(of_task) for of_task in _by_task(scores).values()]))


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ± {50 * (estimate.high - estimate.low):.1f}"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
