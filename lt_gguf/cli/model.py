"""The options of commands that take a model, with llama.cpp's names, and how the model is loaded with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lt_gguf.cli.common import parse_size
from lt_gguf.gguf_file import read_model
from lt_gguf.kv_memory import CACHE_TYPES
from lt_gguf.kv_memory import cache_type as cache_type_of

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama

ModelFile = Annotated[str, typer.Argument(metavar="FILE", help="GGUF file, the first one of a split model.")]
Streaming = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Which layers stream, instead of what the file says: off, or layers=1,3,5-9;sink=4;window=1020; "
        "or auto:0.5, so that the laziest half is chosen for the prompt.",
    ),
]
PromptLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory that streaming layers may take besides while a long prompt is read with full attention, "
        "as in 512MiB; 0: no limit.",
    ),
]
CacheType = Annotated[str, typer.Option(help=f"Type of the KV cache: {', '.join(CACHE_TYPES)}.")]
Context = Annotated[
    int, typer.Option("--ctx", "-c", help="Context size in tokens, at most what the model was trained for; 0: as much.")
]
Temperature = Annotated[float, typer.Option("--temp", help="Temperature of sampling; 0: always the most likely token.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling; -1: another one each time.")]
Threads = Annotated[int, typer.Option("--threads", "-t", help="CPU threads; 0: half of the machine's.")]
GpuLayers = Annotated[int, typer.Option("--n-gpu-layers", "-ngl", help="Layers to run on the GPU, if there is one; -1: all.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Tokens of a prompt that are read at once.")]
FlashAttention = Annotated[bool, typer.Option("--flash-attn/--no-flash-attn", help="Use flash attention.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log on stderr.")]

DEFAULT_CONTEXT = 4096
DEFAULT_TEMPERATURE = 0.8
DEFAULT_BATCH_SIZE = 512


def load(
    file: str,
    *,
    ctx: int,
    streaming: str | None,
    cache_type: str,
    threads: int,
    n_gpu_layers: int,
    batch_size: int,
    flash_attn: bool,
    seed: int,
    verbose: bool,
    prompt_limit: str | None = None,
    snapshot_limit: str | None = None,
) -> Llama:
    """The model as the options ask for it. A context is never larger than the model was trained for.

    Raises:
        ValueError: an option is out of range, or the file can't be loaded so.
    """
    from lt_gguf.runtime.llama import Llama

    if ctx < 0:
        raise ValueError(f"--ctx = {ctx}: must be at least 0")
    if batch_size < 1:
        raise ValueError(f"--batch-size = {batch_size}: must be at least 1")
    n_ctx_train = read_model(file).n_ctx_train
    ggml_type = cache_type_of(cache_type).ggml_type
    settings: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads} if threads > 0 else {}
    if prompt_limit is not None:
        settings["prompt_limit"] = _parse_size("--prompt-limit", prompt_limit)
    if snapshot_limit is not None:
        settings["snapshot_limit"] = _parse_size("--snapshot-limit", snapshot_limit)
    return Llama(
        file,
        streaming=streaming,
        n_ctx=min(ctx or n_ctx_train, n_ctx_train or ctx),
        n_batch=batch_size,
        n_gpu_layers=n_gpu_layers,
        flash_attn=flash_attn,
        type_k=ggml_type,
        type_v=ggml_type,
        seed=seed,
        verbose=verbose,
        **settings,
    )


def _parse_size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
