"""Train the testbed model of `models/demo` from nothing, in one to three hours on a CPU.

    python scripts/testbed/train_testbed.py --work-dir build/testbed --out models/demo

trains a SentencePiece tokenizer and then a small Llama-architecture decoder on what `testbed_data.py` makes, logs to
`WORK_DIR/log.jsonl`, draws `WORK_DIR/training.png` and writes a Hugging Face checkpoint. An interrupted run goes on from its
last checkpoint when started again with the same arguments. `evaluate_testbed.py` measures the result. Needs the extra
`train` of this package.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import testbed_data as data
import torch
import typer
from draw_training import draw_training
from laziness_pressure import IMPLEMENTATION, LazinessPressure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from testbed_model import MAX_LENGTH, RowMaker, export, make_model, save_checkpoint, train_tokenizer
from transformers import LlamaForCausalLM

CHECKPOINT_EVERY = 50
LOG_EVERY = 10
PRESSURE_FROM = 450  # steps; until then heads find what they are good for


@dataclass(frozen=True)
class Phase:
    """A part of the training: `steps` optimizer steps with rows of `length` tokens, and how often each kind of document comes."""

    steps: int
    length: int
    shares: dict[str, float]


# dense lookups first, in short rows; then statements spread over longer and longer text
LONGER_AND_LONGER = (
    Phase(75, 256, {"map": 3, "repeat": 2, "alike": 3, "story": 1}),
    Phase(275, 256, {"map": 0.5, "repeat": 0.4, "alike": 5, "chat": 0.6, "story": 0.7, "python": 1.3}),
    Phase(400, 512, {"map": 0.4, "repeat": 0.3, "alike": 5, "chat": 0.4, "story": 0.6, "python": 1.3}),
    Phase(400, 1024, {"map": 0.3, "repeat": 0.2, "alike": 5, "chat": 0.3, "story": 0.4, "python": 1}),
    Phase(350, 2048, {"map": 0.2, "repeat": 0.2, "alike": 5, "chat": 0.2, "story": 0.3, "python": 0.8}),
    Phase(400, 4096, {"map": 0.2, "repeat": 0.2, "alike": 5, "chat": 0.2, "story": 0.2, "python": 0.6}),
)
# the same once more, at a lower rate, with numbers that begin alike
ONCE_MORE = (
    Phase(150, 512, {"map": 0.2, "repeat": 0.2, "closely alike": 5, "chat": 0.3, "story": 0.4, "python": 1}),
    Phase(200, 1024, {"map": 0.2, "repeat": 0.2, "closely alike": 5, "chat": 0.2, "story": 0.3, "python": 0.8}),
    Phase(200, 2048, {"map": 0.2, "repeat": 0.2, "closely alike": 5, "chat": 0.2, "story": 0.2, "python": 0.6}),
    Phase(250, 4096, {"map": 0.2, "repeat": 0.2, "closely alike": 5, "chat": 0.2, "story": 0.2, "python": 0.6}),
)
PHASES = LONGER_AND_LONGER + ONCE_MORE
STEPS = sum(phase.steps for phase in PHASES)


def plan(step: int) -> tuple[Phase, float]:
    """What is done in a step: its phase, and the learning rate as a share of the highest.

    The rate rises over 20 steps, is flat, and falls linearly to nearly nothing over the last 60 % of `LONGER_AND_LONGER`; then it
    begins again at 0.4 and falls over the whole of `ONCE_MORE`.
    """
    if not 0 <= step < STEPS:
        raise ValueError(f"step {step}: must be from 0 to {STEPS - 1}")
    ends = np.cumsum([phase.steps for phase in PHASES])
    first = int(ends[len(LONGER_AND_LONGER) - 1])
    falling = (first - step) / (0.6 * first) if step < first else 0.4 * (STEPS - step) / (STEPS - first)
    return PHASES[int(np.searchsorted(ends, step, side="right"))], min(1.0, (step + 1) / 20, max(0.02, falling))


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@dataclass
class Trainer:
    """The model, what is optimized, and how one step is made."""

    model: LlamaForCausalLM
    pressure: LazinessPressure
    device: torch.device
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.optimizers = make_optimizers(self.model)
        self._base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def set_learning_rate(self, factor: float) -> None:
        for optimizer, rate in zip(self.optimizers, self._base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor

    def step(self, ids: torch.Tensor, weights: torch.Tensor, pressure_weight: float) -> dict[str, float]:
        """One optimizer step on `ids` and their loss weights, both (rows, length).

        Returns the loss of plain text, that of looked-up answers (nats a token), the share of answer tokens that were the
        most likely ones, and the share of attention that goes far, of the laziest and of the least lazy layer.
        """
        ids, weights = ids.to(self.device), weights.to(self.device)
        self.pressure.begin(ids.shape[1], self.generator)
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            targets, w = ids[:, 1:].flatten(), weights[:, 1:].flatten()
            logits = self.model.lm_head(hidden)
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        far = self.pressure.take()
        loss = (losses * w).sum() / w.sum() + pressure_weight * far.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses, answers, text = losses.detach(), w >= data.ANSWER_WEIGHT, w == 1.0
        hits = (logits.detach().argmax(-1) == targets).float()
        return {
            "text": _mean(losses, text),
            "answer": _mean(losses, answers),
            "hits": _mean(hits, answers),
            "far": far.tolist(),
        }


def _mean(values: torch.Tensor, where: torch.Tensor) -> float:
    return (values * where).sum().item() / max(1, where.sum().item())


class Run:
    """What a run leaves in its folder: checkpoints, from which it goes on, and the log with its picture.

    Args:
        arguments: of the run; one that goes on must have the same.
    """

    def __init__(self, folder: Path, arguments: dict, trainer: Trainer) -> None:
        self.folder, self.arguments, self.trainer = folder, arguments, trainer
        self.checkpoint, self.log = folder / "checkpoint.pt", folder / "log.jsonl"
        self.recent: list[dict] = []  # what was measured since the last line of the log
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has taken, interruptions left out."""
        return time.monotonic() - self._began

    def resume(self) -> int:
        """Takes up the last checkpoint, if there is one. Returns the number of steps done.

        Raises:
            typer.BadParameter: it is one of a run with other arguments.
        """
        if not self.checkpoint.exists():
            self.log.write_text("")
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        if state["arguments"] != self.arguments:
            raise typer.BadParameter(f"{self.folder} holds a run with other arguments: give another --work-dir or remove it")
        self.trainer.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        logged = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("".join(line + "\n" for line in logged if json.loads(line)["step"] <= state["step"]))
        self._began -= state["seconds"]
        return state["step"]

    def write_log(self, **record) -> dict:
        """Appends `record` and the means of what was measured since the last time, which it returns."""
        means = {name: np.mean([measured[name] for measured in self.recent], axis=0).round(4).tolist() for name in self.recent[0]}
        self.recent.clear()
        with self.log.open("a") as file:
            file.write(json.dumps({**record, "seconds": round(self.seconds, 1), **means}) + "\n")
        return means

    def save(self, step: int) -> None:
        save_checkpoint(
            self.checkpoint,
            arguments=self.arguments,
            model=self.trainer.model.state_dict(),
            step=step,
            optimizers=[optimizer.state_dict() for optimizer in self.trainer.optimizers],
            seconds=self.seconds,
        )
        draw_training(self.log, self.folder / "training.png")


def main(
    work_dir: Annotated[
        Path,
        typer.Option(file_okay=False, help="tokenizer, checkpoints and log; an earlier run here goes on"),
    ] = Path("build/testbed"),
    out: Annotated[Path, typer.Option(file_okay=False, help="where the finished checkpoint goes")] = Path("models/demo"),
    steps: Annotated[int, typer.Option(min=1, max=STEPS, help="optimizer steps; fewer: stop earlier")] = STEPS,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens a step")] = MAX_LENGTH,
    pressure: Annotated[float, typer.Option(min=0, help="cost of looking far, in nats")] = 0.1,
    threads: Annotated[int, typer.Option(min=1, help="of the CPU")] = 1,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Train the testbed model and write it as a Hugging Face checkpoint."""
    if batch_tokens < (longest := max(plan(step)[0].length for step in range(steps))):
        raise typer.BadParameter(f"--batch-tokens = {batch_tokens}: must be at least {longest}, the longest row of these steps")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = {
        "batch_tokens": batch_tokens,
        "pressure": pressure,
        "seed": seed,
        "phases": [asdict(phase) for phase in PHASES],
    }
    texts, _ = data.python_texts()
    tokenizer_file = work_dir / "tokenizer.model"
    if not tokenizer_file.exists():
        train_tokenizer(tokenizer_file, texts, seed)
    rows = RowMaker(tokenizer_file, texts)
    model = make_model(rows.bos, rows.control[data.END]).to(device)
    far = LazinessPressure()
    model.set_attn_implementation(IMPLEMENTATION)
    trainer = Trainer(model, far, device, torch.Generator().manual_seed(seed))

    run = Run(work_dir, arguments, trainer)
    start = run.resume()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=start)
        for step in range(start, steps):
            phase, factor = plan(step)
            rng = np.random.default_rng((seed, 1, step))  # depends on the step alone: a resumed run sees the same rows
            ids, weights = rows.batch(rng, batch_tokens // phase.length, phase.length, phase.shares)
            trainer.set_learning_rate(factor)
            run.recent.append(trainer.step(ids, weights, pressure if step >= PRESSURE_FROM else 0.0))
            done = step + 1
            if done % LOG_EVERY == 0 or done == steps:
                means = run.write_log(step=done, tokens=done * batch_tokens, length=phase.length)
                progress.update(task, description=f"text {means['text']:.2f}  answer {means['answer']:.2f}")
            if done % CHECKPOINT_EVERY == 0 or done == steps:
                run.save(done)
            progress.update(task, completed=done)
    export(model, tokenizer_file, out)
    typer.echo(f"wrote {out}: {steps} steps, {steps * batch_tokens:,} tokens, {run.seconds / 60:.1f} minutes")


if __name__ == "__main__":
    typer.run(main)
