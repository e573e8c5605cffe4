"""`lt-gguf train`: a model learns to do with sinks and a window in its lazy layers (LightTransfer-Train)."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from lt_gguf.cli import common, model
from lt_gguf.training.settings import Settings


@model.takes_options(Settings)
def train(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint, or its id on the hub.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help='JSONL file, each line {"messages": [{"role", "content"}, ...]}.')],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the new checkpoint into.")],
    options: Settings = Settings(),
) -> None:
    """Fine-tune a model with streaming attention in its lazy layers (LightTransfer-Train)."""
    try:
        import transformers
        from accelerate import PartialState

        from lt_gguf import training
    except ImportError as error:
        raise ImportError(f"training needs {error.name}: pip install 'lt-gguf[train]'") from None
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    record = training.train(checkpoint, data, out, options)
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


def main() -> None:
    """What `scripts/train_lt.py` runs, which `accelerate launch` can start."""
    app = common.new_app()
    app.command()(train)
    common.run_process(lambda: app, "train_lt.py", sys.argv[1:])
