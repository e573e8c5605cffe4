"""`lt-gguf run`: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lt_gguf.cli import model
from lt_gguf.kv_memory import DEFAULT_CACHE_TYPE


def run(
    file: model.ModelFile,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; -: read it from stdin.")],
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens to generate; -1: until the context is full.")] = -1,
    temperature: model.Temperature = model.DEFAULT_TEMPERATURE,
    seed: model.Seed = -1,
    ctx: model.Context = model.DEFAULT_CONTEXT,
    streaming: model.Streaming = None,
    prompt_limit: model.PromptLimit = None,
    cache_type: model.CacheType = DEFAULT_CACHE_TYPE,
    threads: model.Threads = 0,
    n_gpu_layers: model.GpuLayers = -1,
    batch_size: model.BatchSize = model.DEFAULT_BATCH_SIZE,
    flash_attn: model.FlashAttention = True,
    verbose: model.Verbose = False,
) -> None:
    """Continue a prompt with a GGUF model; the text goes to stdout."""
    from lt_gguf.runtime.log import captured_errors

    text = sys.stdin.read() if prompt == "-" else prompt
    with captured_errors(forward=verbose):
        llm = model.load(
            file,
            ctx=ctx,
            streaming=streaming,
            prompt_limit=prompt_limit,
            cache_type=cache_type,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            batch_size=batch_size,
            flash_attn=flash_attn,
            seed=seed,
            verbose=verbose,
        )
        for chunk in llm(text, max_tokens=n_predict, temperature=temperature, stream=True):
            print(chunk["choices"][0]["text"], end="", flush=True)
        print()
