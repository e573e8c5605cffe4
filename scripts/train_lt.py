"""LightTransfer-Train (arXiv 2410.13846, section 4): a model learns to do with sinks and a window in its lazy layers.

    python scripts/train_lt.py MODEL DATA.jsonl OUT [--lora] [--bf16] [--gradient-checkpointing] ...
    accelerate launch --multi_gpu scripts/train_lt.py ...     # several devices, each with the whole model

It chooses the layers that are lazy in most of the training samples, fine-tunes the model with streaming attention in them over
question and answer alike, and writes a checkpoint whose config.json says so: `lt-gguf convert OUT` needs no options then.
While it runs, OUT-training holds Trainer's checkpoints; the same command with --resume goes on from the last one.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import transformers
import typer
from accelerate import PartialState
from rich.progress import Progress
from train_lt_data import LOSSES, Samples, collate, make_samples
from train_lt_layers import DEFAULT_STRATEGY, STRATEGIES, choose_layers
from train_lt_log import ProgressBar, bars
from train_lt_model import add_lora, export, load_model, load_tokenizer
from train_lt_run import Run
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from lt_gguf.checkpoint import resolver
from lt_gguf.cli import common
from lt_gguf.cli.model import takes_options
from lt_gguf.hf import analysis, apply_streaming
from lt_gguf.hf.decoder import without_progress_bar
from lt_gguf.hf.streaming_attention import streaming_attention
from lt_gguf.report import plots
from lt_gguf.spec import DEFAULT_FRACTION, DEFAULT_SINK, DEFAULT_W_LAST, DEFAULT_WINDOW, StreamingSpec
from lt_gguf.spec.in_config import write_spec

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


def train(model: str, data: Path, out: Path, settings: Settings = Settings()) -> dict[str, Any]:
    """Trains a checkpoint and writes the new one.

    Args:
        model: folder of a Hugging Face checkpoint, or its id on the hub.
        data: JSONL file of conversations, see `train_lt_data`.
        out: folder to write; it appears when it is complete.

    Returns:
        what OUT/training.json says; losses are in nats a token, held-out ones the mean over batches.

    Raises:
        ValueError: a wrong setting, data that can't be used, or a model that can't stream; one line.
        OSError: a file can't be read or written.
        ImportError: what is needed isn't installed.
    """
    settings.check()
    plots.check()
    if out.exists() and not settings.overwrite:
        raise FileExistsError(f"{out}: exists, remove it or use --overwrite")
    checkpoint = resolver.resolve(model)
    analysis.check(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    arguments = training_arguments(settings, _work_folder(out))
    options = {"max_length": settings.max_length, "loss": settings.loss, "seed": settings.seed}
    samples = make_samples(data, settings.eval_data, settings.eval_share, tokenizer, **options)
    config = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    asked = settings.asked() | {"data": list(samples.sha256), "model": config}
    run = Run(_work_folder(out), asked, settings.resume, arguments.process_index == 0)
    with bars(run.is_main) as progress, without_progress_bar():
        if not run.is_begun:
            _choose(run, checkpoint, samples, settings, arguments, progress)
        trainer = make_trainer(checkpoint, run, samples, settings, arguments, progress)
        record = {
            "model": checkpoint.resolve().name if Path(model).is_dir() else model,
            "data": samples.name,
            "examples": {"training": len(samples.training), "held_out": len(samples.held_out)},
            "settings": asked,
            "streaming": str(run.chosen().spec),
            "selection": run.chosen().provenance.selection,
            "reason": run.chosen().reason,
        } | _train(trainer, run)
    if run.is_main:
        export(trainer.accelerator.unwrap_model(trainer.model), checkpoint, out, record, settings.overwrite)
        run.remove()
    return record


def training_arguments(settings: Settings, work: Path) -> TrainingArguments:
    """transformers' own settings."""
    rate = LEARNING_RATES[settings.lora] if settings.learning_rate is None else settings.learning_rate
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        bf16=settings.bf16,
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
        **checkpointing,
    )


def make_trainer(
    checkpoint: Path, run: Run, samples: Samples, settings: Settings, arguments: TrainingArguments, progress: Progress
) -> Trainer:
    """A Trainer of the model, which streams already. Raises ValueError if accelerate would cut the model into pieces."""
    transformers.set_seed(settings.seed)  # of LoRA's first matrices
    chosen = run.chosen()
    model = load_model(checkpoint, as_bfloat16=settings.bf16 and settings.lora)
    write_spec(model.config, chosen.spec, chosen.provenance)
    apply_streaming(model, chosen.spec)
    trainer = Trainer(
        model=add_lora(model, settings.lora_rank) if settings.lora else model,
        args=arguments,
        train_dataset=samples.training,
        eval_dataset=samples.held_out or None,
        data_collator=collate,
        callbacks=[ProgressBar(progress)],
    )
    trainer.remove_callback(PrinterCallback)  # note: it prints every log entry
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("accelerate: cuts the model into pieces, must give each device all of it, as launch --multi_gpu does")
    return trainer


def _choose(
    run: Run, checkpoint: Path, samples: Samples, settings: Settings, arguments: TrainingArguments, progress: Progress
) -> None:
    bar = progress.add_task("choosing the layers", total=None)
    # note: the other processes find in the cache what the first one has measured
    with arguments.main_process_first(desc="choosing the layers"):
        chosen = choose_layers(
            checkpoint,
            samples,
            select=settings.select,
            fraction=settings.streaming_fraction,
            layers=settings.streaming_layers,
            sink=settings.sink,
            window=settings.window,
            n_samples=settings.samples,
            w_last=settings.w_last,
            seed=settings.seed,
            progress=lambda what, done, total: progress.update(bar, description=f"measuring {what}", completed=done, total=total),
        )
    progress.remove_task(bar)
    run.begin(chosen)


def _train(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Trains, and returns the losses: in training, and the held-out ones before and after."""
    losses = run.losses
    if trainer.eval_dataset and not losses:
        model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
        with streaming_attention(model, None):
            losses["full"] = trainer.evaluate()["eval_loss"]
        losses["before"] = trainer.evaluate()["eval_loss"]
        run.save()
    last = run.last_checkpoint()
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except KeyboardInterrupt:
        print(f"stopped: --resume goes on from the last checkpoint in {run.folder}", file=sys.stderr)
        raise
    after = {"after": trainer.evaluate()["eval_loss"]} if trainer.eval_dataset else {}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "held_out_loss": losses | after,
        "training_loss": [{key: entry[key] for key in ("step", "loss", "learning_rate")} for entry in history],
    }


def _work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-training")


@takes_options(Settings)
def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint, or its id on the hub.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help='JSONL file, each line {"messages": [{"role", "content"}, ...]}.')],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the new checkpoint into.")],
    options: Settings = Settings(),
) -> None:
    """Fine-tune a model with streaming attention in its lazy layers (LightTransfer-Train)."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    record = train(model, data, out, options)
    if not PartialState().is_main_process:  # of several
        return
    losses = record["held_out_loss"]
    print(f"{out}: {record['streaming']}")
    print(f"{record['selection']}: {record['reason']}")
    if losses:
        print(
            f"held-out loss in nats a token: {losses['full']:.4f} with full attention, streaming {losses['before']:.4f} before "
            f"and {losses['after']:.4f} after {record['steps']} steps"
        )


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line, and exits."""
    app = common.new_app()
    app.command()(main)
    common.run(app, "train_lt.py", arguments)


if __name__ == "__main__":
    run()
