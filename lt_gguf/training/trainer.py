"""LightTransfer-Train (arXiv 2410.13846, section 4): a model learns to do with sinks and a window in its lazy layers.

It chooses the layers that are lazy in most of the training samples, fine-tunes the model with streaming attention in them over
question and answer alike, and writes a checkpoint whose config.json says so: `lt-gguf convert OUT` needs no options then.
While it runs, OUT-training holds Trainer's checkpoints; the same command with --resume goes on from the last one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from lt_gguf.checkpoint import resolver
from lt_gguf.hf import analysis, apply_streaming
from lt_gguf.hf.decoder import without_progress_bar
from lt_gguf.hf.streaming_attention import streaming_attention
from lt_gguf.report import plots
from lt_gguf.spec.in_config import write_spec
from lt_gguf.training.data import Samples, collate, make_samples
from lt_gguf.training.layers import choose_layers
from lt_gguf.training.log import ProgressBar, bars
from lt_gguf.training.model import add_lora, disk_errors, export, load_model, load_tokenizer
from lt_gguf.training.run import Run
from lt_gguf.training.settings import LEARNING_RATES, Settings


def train(model: str, data: Path, out: Path, settings: Settings = Settings()) -> dict[str, Any]:
    """Trains a checkpoint and writes the new one.

    Args:
        model: folder of a Hugging Face checkpoint, or its id on the hub.
        data: JSONL file of conversations, see `data`.
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
    options: dict[str, Any] = {"max_length": settings.max_length, "loss": settings.loss, "seed": settings.seed}
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
            n_questions=settings.questions,
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
        with disk_errors(run.folder):
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
