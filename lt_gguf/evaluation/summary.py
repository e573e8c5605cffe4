"""What the records of an evaluation come to: scores with confidence intervals, tables, JSON and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lt_gguf.evaluation.divergence import Divergence, Means, summarize
from lt_gguf.evaluation.results import Records, write_text
from lt_gguf.evaluation.retrieval import Question
from lt_gguf.evaluation.variants import split_variant
from lt_gguf.statistics import Estimate, mean_score, paired_difference, relative_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = "off"  # the spec of the full model
TEXT = "text"  # the task of records that say how a text is predicted, not how a question is answered

RESULTS, REPORT = "results.json", "results.md"
BARS, HEAT_MAP, KL = "scores", "depth_by_length", "kl"  # pictures, .png and .svg

_INTERVALS = "95 % confidence intervals"


class Score(NamedTuple):
    """How well a model does a task.

    Args:
        spec: what streams.
        task: its name.
        length: of the prompts, in tokens.
        n: number of prompts.
        score: the mean, from 0 to 1.
        difference: to the full model on the same prompts, below 0: worse; `None` for the full model, or without one.
    """

    spec: str
    task: str
    length: int
    n: int
    score: Estimate
    difference: Estimate | None


class TextScore(NamedTuple):
    """How a model predicts the ends of `n` texts of `length` tokens."""

    spec: str
    length: int
    n: int
    divergence: Divergence


class Table(NamedTuple):
    """`n_left`: so many columns hold text, those after them numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    n_left: int


@dataclass(frozen=True)
class Summary:
    """All that is shown of an evaluation.

    Args:
        settings: of all records.
        names: a short name for each spec, in the order in which they are shown.
        records: as in `results.Journal`; those of other specs are left out.
    """

    settings: Mapping[str, Any]
    names: Mapping[str, str]
    records: Records

    def scores(self) -> list[Score]:
        """For each task, length and spec that has been measured, in this order."""
        result = []
        for task, by_spec in self._scores.items():
            for length in sorted({question.length for scores in by_spec.values() for question in scores}):
                full = _of_length(by_spec.get(FULL, {}), length)
                for spec, scores in by_spec.items():
                    if scores := _of_length(scores, length):
                        difference = _difference(scores, full) if spec != FULL else None
                        result.append(Score(spec, task, length, len(scores), mean_score([*scores.values()]), difference))
        return result

    def text_scores(self) -> list[TextScore]:
        """For each length and spec that has been measured, in this order."""
        found: dict[tuple[int, int], list[Means]] = {}
        specs = list(self.names)
        for (spec, question), record in self.records.items():
            if question.task == TEXT and spec in self.names:
                means = Means(*(record[field] for field in Means._fields))
                found.setdefault((question.length, specs.index(spec)), []).append(means)
        return [TextScore(specs[i], length, len(means), summarize(means)) for (length, i), means in sorted(found.items())]

    def losses(self) -> dict[str, Estimate]:
        """By spec, the share of the full model's score that is lost, averaged over the tasks in which it has any."""
        result = {}
        for spec in self.names:
            full: dict[str, list[float]] = {}
            own: dict[str, list[float]] = {}
            for task, by_spec in self._scores.items():
                pairs = _pairs(by_spec.get(FULL, {}), by_spec.get(spec, {}))
                if any(score for score, _ in pairs):
                    full[task], own[task] = map(list, zip(*pairs))
            if spec != FULL and full:
                result[spec] = relative_loss(full, own)
        return result

    def tables(self) -> list[Table]:
        """Those that have rows: scores in tasks, and on texts."""
        tasks = ("task", "length", "model", "prompts", "score, %", "to full, points")
        text = ("length", "model", "samples", "perplexity", "to full, %", "KL to full, nats", "same top token, %")
        task_rows = [
            (s.task, f"{s.length:,}", self.names[s.spec], f"{s.n:,}", _percent(s.score), _points(s.difference))
            for s in self.scores()
        ]
        text_rows = [
            (f"{t.length:,}", self.names[t.spec], f"{t.n:,}", *_text_cells(t.spec, t.divergence)) for t in self.text_scores()
        ]
        return [table for table in (Table("Tasks", tasks, task_rows, 3), Table("Text", text, text_rows, 2)) if table.rows]

    def notes(self) -> list[str]:
        """Lines that belong below the tables: what the models' names stand for, and what is lost on average."""
        lines = [f"in brackets: {_INTERVALS}"] if self.tables() else []
        lines += [f"{name}: {_described(spec)}" for spec, name in self.names.items()]
        for spec, loss in self.losses().items():
            lines.append(f"{self.names[spec]}: relative loss {_percent(loss)} %, the mean over tasks of 1 - score / full score")
        return lines

    def to_json(self) -> dict[str, Any]:
        """What `results.json` holds. Shares are from 0 to 1; an interval's end that isn't known is null."""
        return {
            "settings": dict(self.settings),
            "models": [{"name": name, "spec": spec} for spec, name in self.names.items()],
            "scores": [
                {**s._asdict(), "score": _numbers(s.score), "difference": s.difference and _numbers(s.difference)}
                for s in self.scores()
            ],
            "cells": [
                {"spec": spec, "task": task, "length": length, "depth": depth, "n": len(scores), "score": float(np.mean(scores))}
                for (task, spec, length, depth), scores in self._cells().items()
            ],
            "text": [
                {**t._asdict(), "divergence": {key: _numbers(value) for key, value in t.divergence._asdict().items()}}
                for t in self.text_scores()
            ],
            "relative_loss": [{"spec": spec, **_numbers(loss)} for spec, loss in self.losses().items()],
        }

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        """A page with the tables and these pictures."""
        lines = [f"# Evaluation of {self._model}"]
        for table in self.tables():
            marks = ["---"] * table.n_left + ["---:"] * (len(table.header) - table.n_left)
            lines += ["", f"## {table.title}", "", *map(_row, (table.header, marks, *table.rows))]
        lines += ["", *(f"- {note}" for note in self.notes()), ""]
        lines += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures]
        lines += ["", "Settings:", "", "```json", json.dumps(dict(self.settings), indent=2), "```", ""]
        return "\n".join(lines)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Names and pictures of what has been measured. Raises ImportError without matplotlib."""
        from lt_gguf.evaluation import pictures

        if self._scores:
            estimates = {
                name: {task: mean_score([*by_spec[spec].values()]) for task, by_spec in self._scores.items() if by_spec.get(spec)}
                for spec, name in self.names.items()
            }
            yield BARS, pictures.bars(estimates, f"Scores of {self._model}", f"means over all prompts, {_INTERVALS}")
        cells = {
            (task, spec, length, depth): float(np.mean(scores))
            for (task, spec, length, depth), scores in self._cells().items()
            if depth is not None
        }
        if cells:
            lengths, depths = sorted({key[2] for key in cells}), sorted({key[3] for key in cells})
            panels = {
                f"{task}, {self.names[spec]}": [
                    [cells.get((task, spec, length, depth), np.nan) for length in lengths] for depth in depths
                ]
                for task, spec in dict.fromkeys(key[:2] for key in cells)
            }
            yield HEAT_MAP, pictures.heat_map(panels, lengths, depths, f"Needles found by {self._model}")
        if divergences := self._kl_by_length():
            title, subtitle = f"How far {self._model} is from the full model", f"means over samples of text, {_INTERVALS}"
            yield KL, pictures.bars(divergences, title, subtitle, label="KL divergence, nats", percent=False)

    def write(self, folder: Path) -> list[Path]:
        """Writes pictures, Markdown and JSON into a folder, each file as a whole. Raises OSError, ImportError (matplotlib)."""
        from lt_gguf.report import plots

        folder.mkdir(parents=True, exist_ok=True)
        files = [file for name, figure in self.figures() for file in plots.save(figure, folder / name)]
        report = self.markdown([file.name for file in files if file.suffix == ".png"])
        content = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        return [*files, write_text(folder / REPORT, report), write_text(folder / RESULTS, content)]

    @property
    def _model(self) -> str:
        return self.settings["model"]

    @cached_property
    def _scores(self) -> dict[str, dict[str, dict[Question, float]]]:
        """By task, spec (in the order of their names) and question."""
        found: dict[str, dict[str, dict[Question, float]]] = {}
        for (spec, question), record in self.records.items():
            if question.task != TEXT and spec in self.names:
                by_spec = found.setdefault(question.task, {name: {} for name in self.names})
                by_spec[spec][question] = record["score"]
        return found

    def _cells(self) -> dict[tuple[str, str, int, float | None], list[float]]:
        """Scores by task, spec, length and depth."""
        cells: dict[tuple[str, str, int, float | None], list[float]] = {}
        for task, by_spec in self._scores.items():
            for spec, scores in by_spec.items():
                for question, score in scores.items():
                    cells.setdefault((task, spec, question.length, question.depth), []).append(score)
        return cells

    def _kl_by_length(self) -> dict[str, dict[str, Estimate]]:
        """By name of the hybrid."""
        found: dict[str, dict[str, Estimate]] = {}
        for t in self.text_scores():
            if t.spec != FULL:
                found.setdefault(self.names[t.spec], {})[f"{t.length:,} tokens"] = t.divergence.kl
        return found


def names_of(specs: Sequence[str]) -> dict[str, str]:
    """A short name for each spec: full, and hybrid, or hybrid 1, hybrid 2, ... where there are several."""
    # note: with each type of cache they have the same names
    streaming = list(dict.fromkeys(spec for spec, _ in map(split_variant, specs) if spec != FULL))
    names = {spec: f"hybrid {i}" if len(streaming) > 1 else "hybrid" for i, spec in enumerate(streaming, 1)} | {FULL: "full"}
    return {text: names[spec] + (f", {types}" if types else "") for text in specs for spec, types in [split_variant(text)]}


def _described(text: str) -> str:
    spec, types = split_variant(text)
    return ("no layer streams" if spec == FULL else spec) + (f", {types} cache" if types else "")


def _of_length(scores: Mapping[Question, float], length: int) -> dict[Question, float]:
    return {question: score for question, score in scores.items() if question.length == length}


def _pairs(full: Mapping[Question, float], own: Mapping[Question, float]) -> list[tuple[float, float]]:
    return [(full[question], score) for question, score in own.items() if question in full]


def _difference(own: Mapping[Question, float], full: Mapping[Question, float]) -> Estimate | None:
    pairs = _pairs(full, own)
    return paired_difference([score for _, score in pairs], [score for score, _ in pairs]) if pairs else None


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in estimate._asdict().items()}


def _percent(estimate: Estimate) -> str:
    return _shown(estimate, lambda share: f"{100 * share:.1f}")


def _points(difference: Estimate | None) -> str:
    return "" if difference is None else _shown(difference, lambda share: f"{100 * share:+.1f}")


def _text_cells(spec: str, divergence: Divergence) -> tuple[str, ...]:
    perplexity = _shown(divergence.hybrid_perplexity, lambda value: f"{value:.2f}")
    if spec == FULL:
        return perplexity, "", "", ""
    ratio = _shown(divergence.perplexity_ratio, lambda value: f"{100 * (value - 1):+.2f}")
    return perplexity, ratio, _shown(divergence.kl, lambda value: f"{value:.4f}"), _percent(divergence.same_top)


def _shown(estimate: Estimate, form: Callable[[float], str]) -> str:
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return form(estimate.value)  # too few samples for an interval
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
