"""The options of commands that take a model, with llama.cpp's names, and how the model is loaded with them."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lt_gguf import models
from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.memory.sizes import parse_size
from lt_gguf.models.remembered import chosen_for
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.spec import AutoSpec, CacheTypes, StreamingSpec, parse_layers
from lt_gguf.spec.cache_types import CACHE_TYPES, DEFAULT_CACHE_TYPE, cache_type

if TYPE_CHECKING:
    from lt_gguf.evaluation.context import ScorerOptions
    from lt_gguf.runtime.cache_choice import CacheChoice
    from lt_gguf.runtime.llama import Llama

MODEL_HELP = (
    f"GGUF file, the first one of a split model; or {', '.join(models.MODELS)}; or a model on the hub, as ORG/NAME, ORG/NAME:Q4_K_M or "
    "ORG/NAME:*q8_0*.gguf."
)


def one_of(words: Iterable[str]) -> Callable[[str], list[str]]:
    """How a shell completes a word that is probably one of these. For another one it looks among the files."""
    known = sorted(words)
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]  # note: typer looks at the name


_MODEL: dict[str, Any] = {"metavar": "MODEL", "help": MODEL_HELP, "autocompletion": one_of(models.MODELS)}
ModelFile = Annotated[str, typer.Argument(**_MODEL)]
ModelOrDefault = Annotated[str | None, typer.Argument(**_MODEL, show_default=models.DEFAULT_MODEL)]
Streaming = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        autocompletion=one_of(["off", "auto", "auto:0.5", "layers=", "prefill=full", "prefill=stream"]),
        help="Which layers stream, instead of what the file says: off, or layers=1,3,5-9;sink=4;window=1020; "
        "or auto: what lt-gguf analyze has chosen for this file; or auto:0.5, so that the laziest half is chosen for the prompt.",
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
_CACHE_TYPE: dict[str, Any] = {"metavar": "TYPE", "autocompletion": one_of(CACHE_TYPES)}
_CACHE_TYPE_HELP = f"Type of the KV cache: {', '.join(CACHE_TYPES)}; or those of K and V, as in q8_0/q4_0"
CacheType = Annotated[str, typer.Option(**_CACHE_TYPE, help=f"{_CACHE_TYPE_HELP}.")]
CacheTypeOrRecommended = Annotated[
    str | None,
    typer.Option(**_CACHE_TYPE, help=f"{_CACHE_TYPE_HELP}. By default what the file recommends, else {DEFAULT_CACHE_TYPE}."),
]
_CACHE_KEEP_HELP = "Layers whose KV cache stays in 16 bits whatever --cache-type is, as in 0,2-3, all or none"
CacheKeep = Annotated[str | None, typer.Option(metavar="LAYERS", help=f"{_CACHE_KEEP_HELP}.")]
CacheKeepOrRecommended = Annotated[
    str | None, typer.Option(metavar="LAYERS", help=f"{_CACHE_KEEP_HELP}. By default those that the file recommends.")
]
Context = Annotated[
    int, typer.Option("--ctx", "-c", help="Context size in tokens, at most what the model was trained for; 0: as much.")
]
LargeContext = Annotated[
    int | None,
    typer.Option(
        "--ctx",
        "-c",
        help="Context size in tokens, at most what the model was trained for; 0: as much. Else as much as memory allows, too.",
        show_default=False,
    ),
]
Temperature = Annotated[float, typer.Option("--temp", help="Temperature of sampling; 0: always the most likely token.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling; -1: another one each time.")]
Threads = Annotated[
    int,
    typer.Option("--threads", "-t", help=f"CPU threads; 0: the physical cores that the process may use, here {usable_cores()}."),
]
GpuLayers = Annotated[int, typer.Option("--n-gpu-layers", "-ngl", help="Layers to run on the GPU, if there is one; -1: all.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Tokens of a prompt that are read at once.")]
FlashAttention = Annotated[
    bool, typer.Option("--flash-attn/--no-flash-attn", help="Use flash attention; it rounds a cache of type f32 to f16.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show llama.cpp's log on stderr.")]

DEFAULT_CONTEXT = 4096
DEFAULT_TEMPERATURE = 0.8
DEFAULT_BATCH_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded: the options of the commands that take one, see `takes_options`."""

    threads: Threads = 0
    n_gpu_layers: GpuLayers = -1
    batch_size: BatchSize = DEFAULT_BATCH_SIZE
    flash_attn: FlashAttention = True
    verbose: Verbose = False

    @property
    def n_threads(self) -> int:
        """The number of CPU threads. Raises ValueError: it is negative."""
        if self.threads < 0:
            raise ValueError(f"--threads = {self.threads}: must be at least 0")
        return self.threads or usable_cores()


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(LoadOptions):
    """The same for commands that measure, where what isn't asked for is f16, whatever a file recommends."""

    cache_type: CacheType = DEFAULT_CACHE_TYPE
    cache_keep: CacheKeep = None


@dataclass(frozen=True, kw_only=True)
class TextOptions(LoadOptions):
    """The same for commands that generate text."""

    cache_type: CacheTypeOrRecommended = None
    cache_keep: CacheKeepOrRecommended = None
    streaming: Streaming = None
    prompt_limit: PromptLimit = None
    seed: Seed = -1


@dataclass(frozen=True, kw_only=True)
class RunOptions(TextOptions):
    """The same for a command whose context has a size of its own."""

    ctx: Context = DEFAULT_CONTEXT


@dataclass(frozen=True, kw_only=True)
class ChatOptions(TextOptions):
    """The same for a command whose context is as large as can be."""

    ctx: LargeContext = None


def takes_options(options_class: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a typer command: its parameter `options`, an object of that dataclass, becomes one option for each field."""
    # note: typer reads options off a function's signature and has no groups of them
    hints = get_type_hints(options_class, include_extras=True)
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(options_class)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "options"]

        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            shared = {option.name: given.pop(option.name) for option in options}
            command(**given, options=options_class(**shared))

        with_options.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
        return with_options

    return decorate


def find(model: str | None) -> str:
    """The GGUF file that a command's argument stands for, `None` for the default model; what isn't here is downloaded.

    Raises:
        ValueError, OSError, ImportError: as `models.resolve` does.
    """
    if model is None:
        model = models.DEFAULT_MODEL
        print(f"no model is named, taking {model} ({models.MODELS[model].title})", file=sys.stderr)
    return str(models.resolve(model))


def streaming_of(file: str, streaming: str | None) -> str | StreamingSpec | AutoSpec | None:
    """What `--streaming` means for a file: of auto what was chosen for it; if that isn't known, it is said, and nothing streams."""
    found, unknown = chosen_for(file, streaming)
    if unknown:
        print(unknown, file=sys.stderr)
    return found


def cache_of(
    described: GGUFModel, streaming: str | None, cache_type: str | None, cache_keep: str | None, flash_attn: bool = True
) -> CacheChoice:
    """What `--streaming`, `--cache-type`, `--cache-keep` and `--no-flash-attn` mean for a model; what has to be known of it is said.

    Raises:
        ValueError: there is no such type, or the model has no such layers as are to be kept in 16 bits.
    """
    from lt_gguf.runtime.cache_choice import choose_cache

    file = str(described.path)
    check_cache_keep(cache_keep, file)
    types = None if cache_type is None else CacheTypes.parse(cache_type)
    choice = choose_cache(described, streaming_of(file, streaming), types, cache_keep, flash_attn)
    for note in choice.notes:
        print(note, file=sys.stderr)
    return choice


def check_cache_keep(cache_keep: str | None, file: str) -> None:
    """Raises ValueError if `--cache-keep` names no layers of a file's model."""
    if cache_keep is not None:
        parse_layers(cache_keep, read_model(file).n_layer_main, "--cache-keep")


def load(file: str, options: RunOptions | ChatOptions, snapshot_limit: str | None = None) -> Llama:
    """The model as the options ask for it. A context is never larger than the model was trained for.

    Raises:
        ValueError: an option is out of range, or the file can't be loaded so.
    """
    from lt_gguf.runtime.cache_choice import CacheTypeWarning
    from lt_gguf.runtime.llama import Llama

    if options.ctx is not None and options.ctx < 0:
        raise ValueError(f"--ctx = {options.ctx}: must be at least 0")
    _check_batch_size(options)
    described = read_model(file)
    n_ctx_train = described.n_ctx_train
    cache = cache_of(described, options.streaming, options.cache_type, options.cache_keep, options.flash_attn)
    settings: dict[str, Any] = {"n_threads": options.n_threads, "n_threads_batch": options.n_threads}
    if options.prompt_limit is not None:
        settings["prompt_limit"] = size_of("--prompt-limit", options.prompt_limit)
    if snapshot_limit is not None:
        settings["snapshot_limit"] = size_of("--snapshot-limit", snapshot_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheTypeWarning)  # said already, without Python's words around it
        return Llama(
            file,
            n_ctx="auto" if options.ctx is None else min(options.ctx or n_ctx_train, n_ctx_train or options.ctx),
            streaming=cache.streaming,
            n_batch=options.batch_size,
            n_gpu_layers=options.n_gpu_layers,
            flash_attn=options.flash_attn,
            type_k=cache_type(cache.types.k).ggml_type,
            type_v=cache_type(cache.types.v).ggml_type,
            seed=options.seed,
            verbose=options.verbose,
            **settings,
        )


def scorer_options(options: MeasureOptions, **more: Any) -> ScorerOptions:
    """The same for `evaluation.scorer.Scorer`; `more` are fields of its own. Raises ValueError: an option is out of range."""
    from lt_gguf.evaluation.context import ScorerOptions

    _check_batch_size(options)
    types = CacheTypes.parse(options.cache_type)
    return ScorerOptions(
        n_batch=options.batch_size,
        n_threads=options.n_threads,
        n_gpu_layers=options.n_gpu_layers,
        cache_type_k=types.k,
        cache_type_v=types.v,
        cache_keep=options.cache_keep,
        flash_attn=options.flash_attn,
        **more,
    )


def describe_threads(n: int) -> str:
    return f"{n} CPU thread{'' if n == 1 else 's'}"


def _check_batch_size(options: LoadOptions) -> None:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size = {options.batch_size}: must be at least 1")


def size_of(option: str, text: str) -> int:
    """The bytes that an option's text means. Raises ValueError: it is no size."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
