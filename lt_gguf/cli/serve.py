"""`lt-gguf serve`: a page in the browser to talk about documents, and an address for programs that talk as to OpenAI's."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lt_gguf.cli import model
from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.memory.kv import cache_types_text
from lt_gguf.spec import AutoSpec, CacheTypes, StreamingSpec, runtime_text
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE, cache_type
from lt_gguf.spec.fields import is_auto

if TYPE_CHECKING:
    from lt_gguf.server.llama_server import ServerSettings

API_KEY_VARIABLE = "LT_GGUF_API_KEY"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_SWITCHING = 512  # MiB for conversations that have no slot at the moment


@model.takes_options(model.ChatOptions)
def serve(
    file: model.ModelOrDefault = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION]...", help="Further options, for llama-server itself.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this computer's own needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.")] = 0,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help=f"What requests must bring; better in {API_KEY_VARIABLE}, which others can't see."),
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", "-np", help="Conversations at a time; each has a context of its own (--ctx is of one).")
    ] = 1,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages from there may ask, too, as in http://localhost:3000; *: all."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    *,
    options: model.ChatOptions,
) -> None:
    """Serve a GGUF model: a page to talk with it about documents, and OpenAI's API for programs."""
    from lt_gguf.server.gateway import GatewaySettings
    from lt_gguf.server.serving import bind
    from lt_gguf.server.serving import serve as serve_until_stopped

    key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE) or None
    if parallel < 1:
        raise ValueError(f"--parallel = {parallel}: must be at least 1")
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port = {port}: must be from 0 to {(1 << 16) - 1}")
    if host not in _LOCAL and not key:
        raise ValueError(f"--host = {host}: others can reach it there, so it needs --api-key, or {API_KEY_VARIABLE}")
    listening = bind(host, port)
    with listening:
        file = model.find(file)
        settings, info = prepare(file, parallel, more or [], options)
        gateway = GatewaySettings(
            info,
            key,
            allow_origin or (),
            is_local=host in _LOCAL,
            keeps_beginnings=settings.saves_slot,
            reads_ahead=info["streaming"] is None and info["auto"] is None,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        def when_ready() -> None:
            context = f"context of {info['n_ctx']} tokens{f' for each of {parallel}' if parallel > 1 else ''}"
            types = "" if info["cache"] == DEFAULT_CACHE_TYPE else f", KV cache {info['cache']}"
            say(f"{info['model']}: {context}{types}")
            print(address, flush=True)
            say(f"the page is there; for programs: {address}/v1 (Ctrl-C ends it)")
            if open_page:
                typer.launch(address)

        say(f"loading {os.path.basename(file)}")
        asyncio.run(serve_until_stopped(settings, gateway, listening, say, say if options.verbose else None, when_ready))


def prepare(file: str, n_slots: int, more: list[str], options: model.ChatOptions) -> tuple[ServerSettings, dict[str, Any]]:
    """What llama-server runs with, and what the page is told. Raises ValueError: an option is out of range."""
    from lt_gguf.runtime.context_size import ContextSize, known_spec, largest_size
    from lt_gguf.server.llama_server import ServerSettings

    described = read_model(file)
    cache = model.cache_of(described, options.streaming, options.cache_type, options.cache_keep, options.flash_attn)
    streaming = cache.streaming
    if isinstance(streaming, str):
        check_spec(streaming, described)
    text = None if streaming is None else runtime_text(streaming)
    most = described.n_ctx_train
    if options.ctx is not None and options.ctx < 0:
        raise ValueError(f"--ctx = {options.ctx}: must be at least 0")
    if options.ctx is None:
        type_k, type_v = (cache_type(name).ggml_type for name in cache.types)
        kind: dict[str, Any] = {"type_k": type_k, "type_v": type_v, "flash_attn": options.flash_attn}
        size = largest_size(file, streaming, **kind, n_sequences=n_slots)
    else:
        size = ContextSize(min(options.ctx or most, most or options.ctx), 0)
    limit = size.prompt_limit if options.prompt_limit is None else model.size_of("--prompt-limit", options.prompt_limit)
    spec = known_spec(described, streaming, whole=False)
    # note: of others, nothing is dropped at a prompt's end that can't be kept in a checkpoint
    saves_slot = n_slots == 1 and spec is not None and bool(spec.layers) and spec.prefill == "full"
    settings = ServerSettings(
        file,
        size.n_ctx * n_slots,
        n_slots,
        streaming=text,
        prompt_limit=limit,
        cache_types=cache.types,
        n_threads=options.n_threads,
        n_gpu_layers=options.n_gpu_layers,
        n_batch=options.batch_size,
        flash_attn=options.flash_attn,
        saves_slot=saves_slot and not any(word.startswith("--slot-save-path") for word in more),
        more=["--alias", described.path.stem, "--cache-ram", str(_SWITCHING), *more],
    )
    return settings, describe(described, spec, text, size.n_ctx, n_slots, cache.types)


def check_spec(text: str, described: GGUFModel) -> None:
    """Raises ValueError if `--streaming` isn't a spec for this model."""
    try:
        if is_auto(text):
            AutoSpec.parse(text, described.spec)
        else:
            described.parse_spec(text)
    except ValueError as error:
        raise ValueError(f"--streaming: {error}") from None


def describe(
    described: GGUFModel, spec: StreamingSpec | None, text: str | None, n_ctx: int, n_slots: int, types: CacheTypes
) -> dict[str, Any]:
    """What `GET /lt/info` says."""
    shape = described.kv_shape if described.why_not_streaming is None else None
    streams = None if spec is None or not spec.layers else spec
    n_cached = len(shape.n_head_kv) if shape else 0
    # note: of each layer, as if it didn't stream and as if it did; which ones do may be chosen for the prompt
    full = StreamingSpec.off(described.n_layer) if spec is None else spec.without_streaming()
    is_chosen = text is not None and is_auto(text)  # they keep the types that they had
    within = full if is_chosen else replace(full, layers=tuple(range(described.n_layer)), type=streams.type if streams else None)

    is_quantized = types.is_quantized or (streams is not None and streams.type is not None and cache_type(streams.type).block > 1)

    def token_bytes(of: StreamingSpec) -> list[int] | None:
        if shape is None:
            return None
        return [shape.token_bytes(il, of.cache_type(il, types.k), of.cache_type(il, types.v)) for il in range(n_cached)]

    return {
        "model": described.name,
        "file": described.path.name,
        "architecture": described.architecture,
        "n_layer": n_cached or described.n_layer_main,
        "n_ctx": n_ctx,
        "n_slots": n_slots,
        "streaming": None
        if streams is None
        else {"layers": list(streams.layers), "sink": streams.sink, "window": streams.window, "prefill": streams.prefill},
        "own_window": None if described.own_window is None else described.own_window._asdict(),
        "auto": text if is_chosen else None,
        "cache_type_k": types.k,
        "cache_type_v": types.v,
        "cache_keep": list(full.cache_keep) if is_quantized else [],
        "cache": cache_types_text(str(types), full if streams is None else spec),
        "token_bytes": token_bytes(full),
        "streaming_token_bytes": token_bytes(within),
        "version": metadata.version("lt-gguf"),
    }
