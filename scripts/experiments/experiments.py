"""What a hybrid loses and what it doesn't, on the testbed model: all tables and pictures of docs/evidence/results.md.

    python scripts/experiments/experiments.py                            # all, some hours on 2 cores
    python scripts/experiments/experiments.py --only layers --samples 50 # a part of it, quickly

Each part keeps what it has measured in WORK_DIR and goes on there when it is started again. Hybrids that read the prompt with
full attention are asked in torch, where a prompt is read once for all of them; everything else on the patched runtime, and of
the former a sample too, to see that both agree. `experiments_report.py` makes the tables and pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from experiments_layers import Choice, choose
from experiments_report import Measured, write_report
from experiments_run import Progress, all_questions, ask_runtime, ask_shared, turn_of
from experiments_settings import AGREEMENT_SAMPLES, CACHE_TYPES, PER_PROMPT, SINK, SINKS, TRAINED, WEIGHT_TYPES, WINDOW, WINDOWS
from experiments_training import train, trained_spec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from lt_gguf.conversion import convert
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.results import Journal, model_hash
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.summary import FULL
from lt_gguf.hf.shared_prefill import CheckpointScorer

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("layers", "types", "stream", "train", "prompt", "agreement")

console = Console(highlight=False)


@dataclass
class Experiments:
    """What all parts need: the model in its forms, the questions, and what streams."""

    checkpoint: Path
    work: Path
    samples: int
    length: int
    threads: int
    progress: Progress

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.asked = all_questions(self.samples, self.length)
        self.file = self.gguf(self.checkpoint, "f16")
        self.scorer = CheckpointScorer(self.checkpoint)
        self.choice: Choice = choose(
            self.work / "layers.json",
            self.checkpoint,
            self.file,
            self.scorer,
            self.length,
            SINK,
            WINDOW,
            self.threads,
            self.progress,
        )
        self.measured = Measured(self.checkpoint, self.work, self.length, self.scorer.n_layer, self.choice)
        self.spec = self.measured.spec

    def gguf(self, checkpoint: Path, weights: str) -> Path:
        """The checkpoint as a GGUF file, converted when it is first needed."""
        file = self.work / f"{checkpoint.name}-{weights}.gguf"
        if not file.exists():
            quantize = None if weights == "f16" else weights
            convert(checkpoint, file, select="interleave-odd", outtype="f16", quantize=quantize, prefill="full")
        return file

    def journal(self, name: str, **settings) -> Journal:
        """Where records of one model are kept."""
        return Journal(self.work / f"{name}.jsonl", {"checkpoint": model_hash(self.file), **settings})

    def run(self, name: str, file: Path, specs: list[str], cache_type: str = "f16", n_parallel: int = 1, asked=None) -> None:
        """Asks on the runtime."""
        options = ScorerOptions(
            n_ctx=self.length,
            n_parallel=n_parallel,
            n_threads=self.threads,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
        )
        with Scorer(file, FULL, options) as scorer, self.journal(name, file=model_hash(file), cache=cache_type) as journal:
            ask_runtime(scorer, specs, asked or self.asked, journal, self.progress)

    # -- the parts

    def layers(self) -> None:
        """Every choice of layers in Test mode; sinks and windows with the layers that are measured best."""
        best = self.choice.layers["auto 50 %"]
        specs = {self.spec(layers): None for layers in self.choice.layers.values()}
        specs |= {self.spec(best, sink=sink): None for sink in SINKS} | {self.spec(best, window=window): None for window in WINDOWS}
        with self.journal("layers") as journal:
            ask_shared(self.scorer, [FULL, *specs], self.asked, journal, self.progress)

    def agreement(self) -> None:
        """The runtime beside torch."""
        names = ("auto 50 %", "lazy-ratio 50 %", "reverse of lazy-ratio", "interleave-odd")
        specs = [FULL, *(self.spec(self.choice.layers[name]) for name in names)]
        asked = [question for question in self.asked if turn_of(question) < AGREEMENT_SAMPLES]
        self.run("agreement", self.file, specs, "f16", asked=asked)

    def prompt(self) -> None:
        """Layers chosen for each prompt, as in the paper's Test mode and by a single look."""
        self.run("prompt", self.file, list(PER_PROMPT.values()))

    def types(self) -> None:
        """Types of the cache and of the weights, full and hybrid."""
        specs = [FULL, self.spec(self.choice.layers["auto 50 %"])]
        for cache_type in CACHE_TYPES:
            self.run(f"cache-{cache_type}", self.file, specs, cache_type)
        for weights in WEIGHT_TYPES:
            self.run(f"weights-{weights}", self.gguf(self.checkpoint, weights), specs)

    def stream(self) -> None:
        """Stream mode without training, at each share of the layers."""
        names = [f"{strategy} {percent} %" for percent in (25, 50, 75) for strategy in ("auto", "lazy-ratio")]
        self.run("stream", self.file, list(dict.fromkeys(self.spec(self.choice.layers[name], "stream") for name in names)))

    def train(self) -> None:
        """Stream mode after LightTransfer-Train, and before."""
        for select in TRAINED:
            trained = train(self.checkpoint, self.work, select, self.length, SINK, WINDOW, self.threads)
            spec = trained_spec(trained, self.scorer.n_layer)
            self.run("stream", self.file, [spec])
            self.run(f"trained-{select}", self.gguf(trained, "f16"), [FULL, spec])


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Shows what is being done, how much of it is done, of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what[:70], completed=done, total=total)


def main(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False)] = ROOT / "models" / "demo",
    work_dir: Annotated[
        Path,
        typer.Option(file_okay=False, help="what is measured; an earlier run here goes on"),
    ] = ROOT / "build" / "experiments",
    out: Annotated[Path, typer.Option(file_okay=False, help="folder of results.md and its pictures")] = ROOT / "docs" / "evidence",
    only: Annotated[list[str] | None, typer.Option(help=f"a part: {', '.join(PARTS)}; may be given several times")] = None,
    samples: Annotated[int, typer.Option(min=5, help="prompts of each task")] = 500,
    length: Annotated[int, typer.Option(min=512, help="tokens of a prompt and its answer, at most")] = 1024,
    threads: Annotated[int, typer.Option(min=1, help="of the CPU")] = 1,
    report_only: Annotated[bool, typer.Option("--report-only", help="write the report of what has been measured")] = False,
) -> None:
    """Run the experiments and write the report."""
    torch.set_num_threads(threads)
    if unknown := [part for part in only or () if part not in PARTS]:
        raise typer.BadParameter(f"part {unknown[0]!r}: must be one of {', '.join(PARTS)}")
    with progress_bar() as progress:
        experiments = Experiments(checkpoint, work_dir, samples, length, threads, progress)
        for part in () if report_only else only or PARTS:
            console.print(f"{part}: {getattr(Experiments, part).__doc__}")
            getattr(experiments, part)()
    write_report(experiments.measured, out)
    console.print(f"wrote {out / 'results.md'}")


if __name__ == "__main__":
    typer.run(main)
