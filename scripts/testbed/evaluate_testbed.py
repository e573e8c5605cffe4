"""Measure the testbed model for its card: retrieval by length and depth, and perplexity, on keys, wordings and texts that it
never saw.

    python scripts/testbed/evaluate_testbed.py models/demo --samples 100 --others 500

puts tables into the card, between `<!-- evaluation -->` and `<!-- end -->`, and a picture beside it. What is measured is kept in
WORK_DIR, where an interrupted run goes on. It runs on the patched runtime with full attention.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import testbed_data as data
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lt_gguf.calibration import Texts
from lt_gguf.conversion import convert
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.evaluate import Plan, evaluate
from lt_gguf.evaluation.results import Journal, model_hash, write_text
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.stories import story
from lt_gguf.evaluation.summary import FULL, Summary
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.report import plots

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXT_LENGTH, N_TEXTS = 512, 30
SEED = 2

_MARKED = re.compile(r"(<!-- evaluation -->\n).*?(<!-- end -->)", re.DOTALL)


def held_out_texts() -> dict[str, Texts]:
    """By kind; what `Texts.sha256` is for nobody asks here."""
    rng = np.random.default_rng(SEED)
    prose = data.python_texts()[1]
    stories = ["\n\n".join(story(rng) for _ in range(20)) for _ in range(N_TEXTS)]
    return {
        "Python's texts, held-out documents": Texts("python", "", tuple(prose)),
        "stories, new ones": Texts("stories", "", tuple(stories)),
    }


def main(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False)] = ROOT / "models" / "demo",
    work_dir: Annotated[
        Path,
        typer.Option(file_okay=False, help="what is measured; an earlier run here goes on"),
    ] = ROOT / "build" / "testbed-evaluation",
    samples: Annotated[int, typer.Option(min=1, help="prompts of single and of multi-key, of each length and depth")] = 100,
    others: Annotated[int, typer.Option(min=1, help="prompts of each other task and length")] = 500,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Retrieval and perplexity of the testbed model."""
    work_dir.mkdir(parents=True, exist_ok=True)
    file = work_dir / "testbed-f16.gguf"
    convert(checkpoint, file, select="interleave-odd", outtype="f16", overwrite=True, no_report=True)
    plans = {
        "needles": Plan(("single", "multi-key"), LENGTHS, DEPTHS, samples, seed=SEED, fast=True),
        "others": Plan([t for t in TASKS if t not in ("single", "multi-key")], LENGTHS, (), others, seed=SEED, fast=True),
    }
    texts = held_out_texts()
    on_text = Plan((), (TEXT_LENGTH,), (), 1, N_TEXTS, on_text=True, seed=SEED)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    parts, records = [], {}
    with (
        Progress(*columns) as bars,
        Scorer(file, FULL, ScorerOptions(n_ctx=max(LENGTHS), n_parallel=1, n_threads=threads)) as scorer,
    ):
        bar = bars.add_task("", total=None)
        show = lambda spec, what, done, total: bars.update(bar, description=what, completed=done, total=total)  # noqa: E731
        for name, plan in [*plans.items(), *((kind, on_text) for kind in texts)]:
            of_text = texts.get(name, Texts("", "", ()))
            settings = {"model": checkpoint.name, "sha256": model_hash(file), **plan.settings(of_text)}
            with Journal(work_dir / f"{name.split(',')[0]}.jsonl", settings) as journal:
                evaluate(scorer, [FULL], plan, of_text, journal, show)
                summary = Summary(settings, {FULL: "full"}, dict(journal.records))
            if name in plans:
                records |= journal.records
            else:
                (found,) = summary.text_scores()
                estimate = found.divergence.full_perplexity
                parts.append(f"| {name} | {estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}] |")
    summary = Summary({"model": "the testbed model", "seed": SEED}, {FULL: "full"}, records)
    for name, figure in summary.figures():
        if name == "depth_by_length":
            plots.save(figure, checkpoint / "retrieval")
    told = (
        f"Prompts of each length: {samples * len(DEPTHS)} of single and of multi-key ({samples} at each of {len(DEPTHS)} depths), "
        f"{others} of each other task. Most likely tokens, 95 % intervals:\n\n"
    )
    text = told + _table(summary) + "\n\n| text | perplexity [95 %] |\n| --- | --: |\n" + "\n".join(parts) + "\n"
    card = checkpoint / "README.md"
    write_text(card, _MARKED.sub(lambda match: match[1] + text + match[2], card.read_text()))
    Console().print(text)


def _table(summary: Summary) -> str:
    """Tasks down, lengths across."""
    lines = ["| task | " + " | ".join(f"{length:,}" for length in LENGTHS) + " |", "| --- |" + " --: |" * len(LENGTHS)]
    scores = {(score.task, score.length): score for score in summary.scores()}
    for task in TASKS:
        cells = [scores[task, length].score for length in LENGTHS]
        lines.append(
            f"| {task} | " + " | ".join(f"{100 * c.value:.1f} [{100 * c.low:.1f}, {100 * c.high:.1f}]" for c in cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
