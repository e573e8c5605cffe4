"""What is seen of a training: a progress bar while it runs, and the picture of its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from lt_gguf.report.plots import STREAMING_COLOUR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE_COLOUR, _FULL_COLOUR = "#D55E00", "#555555"  # Okabe and Ito's, as in `lt_gguf.report.plots`


@contextmanager
def bars(is_shown: bool) -> Iterator[Progress]:
    """Progress bars on stderr: in a terminal, and not in every process of several."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (is_shown and console.is_terminal)) as progress:
        yield progress


class ProgressBar(TrainerCallback):
    """Trainer's steps as a bar that says the last loss."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if self.task is not None and logs and "loss" in logs:
            self.progress.update(self.task, description=f"training, loss {logs['loss']:.3f}")


def loss_curve(history: Sequence[Mapping[str, float]], evaluation: Mapping[str, float], title: str) -> Figure:
    """The loss in training by step, and that on held-out conversations before and after.

    Args:
        history: entries with "step" and "loss", nats a token.
        evaluation: nats a token for "full" (before, with full attention), "before" and "after" (streaming); any may be missing.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    steps, losses = [entry["step"] for entry in history], [entry["loss"] for entry in history]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=STREAMING_COLOUR, linewidth=1.2, label="training")
    if "full" in evaluation:
        label = f"held out, full attention, before: {evaluation['full']:.3f}"
        axes.axhline(evaluation["full"], color=_FULL_COLOUR, linestyle="--", linewidth=1, label=label)
    last = max(steps, default=0)
    for key, step, colour, mark in (("before", 0, _BEFORE_COLOUR, "o"), ("after", last, STREAMING_COLOUR, "s")):
        if key in evaluation:
            label = f"held out, streaming, {key}: {evaluation[key]:.3f}"
            axes.plot([step], [evaluation[key]], mark, color=colour, label=label, markersize=7, clip_on=False, zorder=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title.replace("$", r"\$"), fontsize=11)  # note: $ would begin a formula
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure
