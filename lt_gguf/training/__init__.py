"""LightTransfer-Train: `train` chooses lazy layers on the training data and fine-tunes a checkpoint that streams in them.

    from lt_gguf.training import Settings, train
    train("MODEL", Path("conversations.jsonl"), Path("OUT"), Settings(lora=True))

`settings` is what can be asked for; importing it, and this package, needs no torch.
"""

from __future__ import annotations

from typing import Any

from lt_gguf.training.settings import Settings

__all__ = ["Settings", "train"]


def __getattr__(name: str) -> Any:
    # note: imported when first asked for: the settings need no torch
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lt_gguf.training.trainer import train

    return train
