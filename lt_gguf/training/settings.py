"""What can be asked of a training. Nothing here needs torch, so that the command's help doesn't either."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lt_gguf.evaluation.candidates import DEFAULT_QUESTIONS
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_SINK, DEFAULT_W_LAST, DEFAULT_WINDOW, StreamingSpec

LOSSES = ("assistant", "all")
STRATEGIES = ("frequency", "loss", "lazy-ratio", "interleave-odd", "interleave-even", "manual", "trained")
DEFAULT_STRATEGY = "frequency"
LEARNING_RATES = {False: 1e-5, True: 2e-4}  # by whether only LoRA's matrices are trained: usual ones, not tuned here


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be asked for; what each means is its help text."""

    eval_data: Annotated[Path | None, typer.Option(help="JSONL file of held-out conversations; else some of DATA's.")] = None
    eval_share: Annotated[float, typer.Option(help="Share of DATA's conversations that is held out.")] = 0.05
    loss: Annotated[str, typer.Option(help="On which tokens: assistant (the answers) or all.")] = "assistant"
    max_length: Annotated[int, typer.Option(help="Tokens of a conversation that are read.")] = 8192

    select: Annotated[
        str | None,
        typer.Option(help=f"How the layers are chosen: {', '.join(STRATEGIES)}; {DEFAULT_STRATEGY}, unless MODEL has its own."),
    ] = None
    streaming_fraction: Annotated[float, typer.Option(help="Share of layers that stream.")] = DEFAULT_FRACTION
    streaming_layers: Annotated[str | None, typer.Option(help="Layers that stream, as in 1,3,5-9 (manual).")] = None
    sink: Annotated[int, typer.Option(help="First positions that a streaming layer always sees.")] = DEFAULT_SINK
    window: Annotated[int, typer.Option(help="Last positions that a streaming layer sees.")] = DEFAULT_WINDOW
    questions: Annotated[
        int,
        typer.Option(
            help="Conversations about built-in texts that the layers are chosen by, and twice as many to judge by (loss)."
        ),
    ] = DEFAULT_QUESTIONS
    samples: Annotated[int, typer.Option(help="Training samples that lazy ratios are measured on.")] = 256
    w_last: Annotated[int, typer.Option(help="Last tokens of each whose attention is measured.")] = DEFAULT_W_LAST

    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA matrices only, add them to the weights at the end.")] = False
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA's matrices.")] = 16
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more work.")
    ] = False
    epochs: Annotated[float, typer.Option(help="Times that all data is read.")] = 1.0
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of --epochs.")] = None
    batch_size: Annotated[int, typer.Option(help="Samples on a device at a time.")] = 1
    accumulate: Annotated[int, typer.Option(help="Batches an optimizer step.")] = 8
    learning_rate: Annotated[float | None, typer.Option(help="The highest; by default 1e-5, with --lora 2e-4.")] = None
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.03
    log_every: Annotated[int, typer.Option(help="Steps between two logged losses.")] = 10
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 200
    seed: Annotated[int, typer.Option()] = 1

    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was interrupted.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False

    def check(self) -> None:
        """Raises ValueError if a setting is out of range, before anything is read."""
        StreamingSpec.interleaved(1, self.streaming_fraction, self.sink, self.window)
        for name, allowed in (("loss", LOSSES), ("select", (*STRATEGIES, None))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = "{getattr(self, name)}": must be one of {", ".join(filter(None, allowed))}')
        counts = ("samples", "w_last", "lora_rank", "batch_size", "accumulate", "log_every", "save_every")
        for name, least in {"max_length": 2, "steps": 1, **dict.fromkeys(counts, 1)}.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for name in ("eval_share", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be from 0 to less than 1")
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be more than 0")

    def asked(self) -> dict[str, Any]:
        """What decides the outcome, as JSON: a training that goes on must have been begun with the same."""
        return {key: value for key, value in asdict(self).items() if key not in ("eval_data", "resume", "overwrite")}
