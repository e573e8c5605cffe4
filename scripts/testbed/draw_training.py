"""Draw the curves of a training run of the testbed model from its log.

    python scripts/testbed/draw_training.py build/testbed/log.jsonl models/demo/training.png

`train_testbed.py` does so too, at every checkpoint.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

SMOOTHED = 3  # log records that are averaged: each has few rows


def draw_training(
    log: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument()],
) -> None:
    """The losses of plain text and of looked-up answers, answers that are right, and how far each layer looks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text().splitlines()]
    if not records:
        return
    millions = np.array([r["tokens"] for r in records]) / 1e6
    figure, (losses, hits, far) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    losses.plot(millions, _smooth([r["text"] for r in records]), label="text")
    losses.plot(millions, _smooth([r["answer"] for r in records]), label="looked-up answers")
    losses.set(ylabel="loss (nats a token)", ylim=(0, None))
    losses.legend(frameon=False)
    hits.plot(millions, 100 * _smooth([r["hits"] for r in records]), color="tab:orange")
    hits.set(ylabel="answer tokens right (%)", ylim=(0, 101))
    shares = np.array([r["far"] for r in records]).T  # (layers, records)
    edges = np.concatenate([[0], millions])
    image = far.pcolormesh(edges, np.arange(len(shares) + 1) - 0.5, shares, cmap="Blues", vmin=0, rasterized=True)
    far.set(ylabel="layer", yticks=range(0, len(shares), max(1, len(shares) // 6)))
    figure.colorbar(image, ax=far, label="attention that goes far")
    for axes in (losses, hits, far):
        axes.set(xlabel="million tokens")
        for before, record in itertools.pairwise(records):
            if before["length"] != record["length"]:
                axes.axvline(before["tokens"] / 1e6, color="0.75", linewidth=0.8, zorder=3 if axes is far else 0)
        axes.spines[["top", "right"]].set_visible(False)
    lengths = [
        record["length"] for before, record in zip([{"length": 0}, *records], records) if before["length"] != record["length"]
    ]
    listed = ", ".join(map(str, lengths))
    figure.suptitle(f"Training of the testbed model (grey lines: rows of another length; {listed} tokens)", fontsize=10)
    partial = out.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    pyplot.close(figure)
    os.replace(partial, out)


def _smooth(values: list[float]) -> np.ndarray:
    """The mean of each value and the ones around it, as many on either side."""
    reach = SMOOTHED // 2
    return np.array([np.mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


if __name__ == "__main__":
    typer.run(draw_training)
