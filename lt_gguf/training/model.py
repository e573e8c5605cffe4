"""The model that is trained: how it is loaded, given LoRA matrices, and written as a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lt_gguf.gguf.unfinished import unfinished_folder
from lt_gguf.hf.decoder import without_progress_bar
from lt_gguf.hf.streaming_attention import remove_streaming
from lt_gguf.report import plots
from lt_gguf.training.log import loss_curve

RECORD = "training.json"
CURVE = "loss"  # .png and .svg

# What a checkpoint's folder holds besides its config and its weights that the new one needs, too.
_KEPT = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        ValueError: it has none that transformers can read, or one that can't write chats or tell where a token stands.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # note: transformers raises anything here
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{checkpoint}: has no tokenizer that transformers can read: {why}") from None
    if not tokenizer.chat_template:
        raise ValueError(f"{checkpoint}: its tokenizer has no chat template, must have one to write conversations with")
    if not tokenizer.is_fast:
        raise ValueError(f"{checkpoint}: its tokenizer doesn't say where tokens stand in a text, must have a tokenizer.json")
    return tokenizer


def load_model(checkpoint: Path, as_bfloat16: bool) -> PreTrainedModel:
    """The model to train.

    Args:
        as_bfloat16: its weights are kept in bfloat16: only where they aren't trained themselves, small changes would be lost.
            Otherwise in float32.

    Raises:
        ValueError: weights are missing.
    """
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if as_bfloat16 else torch.float32, "attn_implementation": "sdpa"}
    with without_progress_bar():
        # note: a pair, as its info is asked for; transformers' types know of the model alone
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            checkpoint, output_loading_info=True, local_files_only=True, trust_remote_code=False, **settings
        )
    model, info = loaded
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{checkpoint}: {name} is missing in the checkpoint's files")
    return model


def add_lora(model: PreTrainedModel, rank: int) -> Any:
    """peft's model, in which only LoRA matrices beside every linear layer of the decoder are trained (arXiv 2106.09685).

    Raises:
        ImportError: peft isn't installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("--lora needs peft: pip install 'lt-gguf[train]'") from None
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Inside the with block a file that can't be written, as on a full disk, is an OSError that names `place`.

    safetensors and torch.save have errors of their own for it.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not any(words in str(error) for words in ("I/O error", "PytorchStreamWriter", "inline_container", "iostream error")):
            raise
        raise OSError(f"{place}: a checkpoint can't be written: {str(error).splitlines()[0]}") from error


def export(trained: Any, checkpoint: Path, out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Writes the finished checkpoint, as a whole or not at all.

    Args:
        trained: the model, or peft's, whose matrices are added to the weights.
        checkpoint: the one that it was made from: the type of its weights and its tokenizer are kept.
        record: what is written to `RECORD`, and drawn.
    """
    model = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    remove_streaming(model)
    said = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    model.config.use_cache = said.get("use_cache", True)  # note: Trainer turns it off
    dtype = said.get("dtype") or said.get("torch_dtype") or "float32"
    model.to(getattr(torch, dtype))
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(out.parent, ".training-") as hidden:
        unfinished = hidden / out.name
        with without_progress_bar(), disk_errors(out):
            model.save_pretrained(unfinished)
        for pattern in _KEPT:
            for file in checkpoint.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, unfinished / file.name)
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        title = f"{record['model']}: {record['streaming']}"
        plots.save(loss_curve(record["training_loss"], record["held_out_loss"], title), unfinished / CURVE)
        for file in unfinished.iterdir():
            file.chmod(0o644)  # note: safetensors' files can be read by their owner only
        if overwrite and out.exists():
            out.rename(hidden / "old")
        unfinished.rename(out)
