"""LightTransfer-Train on the testbed model: its data, and the call of `train_lt.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "testbed"))

import testbed_data as data

from lt_gguf.evaluation.results import write_text
from lt_gguf.spec import StreamingSpec
from lt_gguf.training.model import RECORD

STEPS, BATCH, LEARNING_RATE = 150, 4, 3e-4
_SEED = 30_000  # of the data: neither that of the model's training nor that of an evaluation
_CHARS_PER_TOKEN = 3.3


def trained_checkpoint(checkpoint: Path, work: Path, select: str) -> Path:
    """Where the checkpoint is that was fine-tuned with the layers that `select` chooses."""
    return work / f"{checkpoint.name}-trained-{select}"


def trained_spec(trained: Path, n_layer: int) -> str:
    """How a fine-tuned checkpoint streams; empty if it isn't there."""
    record = trained / RECORD
    return str(StreamingSpec.parse(json.loads(record.read_text())["streaming"], n_layer)) if record.exists() else ""


def train(checkpoint: Path, work: Path, select: str, length: int, sink: int, window: int, threads: int) -> Path:
    """The folder of the fine-tuned checkpoint; made if it isn't there."""
    out = trained_checkpoint(checkpoint, work, select)
    if (out / RECORD).exists():
        return out
    file = work / "conversations.jsonl"
    if not file.exists():
        write_text(file, "".join(json.dumps({"messages": each}) + "\n" for each in conversations(STEPS * BATCH + 100, length)))
    script = ROOT / "scripts" / "train_lt.py"
    numbers = {
        "--sink": sink, "--window": window, "--max-length": length, "--steps": STEPS, "--batch-size": 1, "--accumulate": BATCH,
        "--learning-rate": LEARNING_RATE, "--samples": 100, "--eval-share": 0.1, "--save-every": 25,
    }  # fmt: skip
    begun = out.with_name(f"{out.name}-training").exists()
    options = (
        [str(part) for pair in numbers.items() for part in pair]
        + ["--loss", "all", "--select", select]
        + (["--resume"] if begun else [])
    )
    command = [sys.executable, str(script), str(checkpoint), str(file), str(out), *options]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return out


def conversations(n: int, length: int) -> list[list[dict[str, str]]]:
    """Chats about texts of up to `length` tokens, made as the model's own training data was."""
    texts, _ = data.python_texts()
    rng = np.random.default_rng(_SEED)
    found: list[list[dict[str, str]]] = []
    while len(found) < n:
        n_chars = int(_CHARS_PER_TOKEN * length * rng.uniform(0.5, 0.9))
        text = "".join(part for part, _ in data.puzzles(rng, n_chars, texts))
        if not text.startswith(data.USER):
            continue
        turns = [turn.split(data.END)[0] for turn in text.replace(data.ASSISTANT, data.USER).split(data.USER)[1:]]
        roles = ("user", "assistant")
        found.append([{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])
    return found
