"""`lt-gguf bench`: how fast a file runs with full attention and as a hybrid, and beside what others have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lt_gguf.bench.shapes import DEFAULT_WEIGHT_TYPE, SHAPES, WEIGHT_TYPES, random_model
from lt_gguf.cli import model as model_options
from lt_gguf.cli.progress import ProgressBar
from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.models.package import user_cache
from lt_gguf.models.remembered import chosen_for, recall
from lt_gguf.runtime.cpu import cpu_name, usable_cores
from lt_gguf.spec import DEFAULT_FRACTION, StreamingSpec
from lt_gguf.spec.cache_types import CACHE_TYPES, DEFAULT_CACHE_TYPE, cache_type
from lt_gguf.spec.fields import check_integer

if TYPE_CHECKING:
    from lt_gguf.bench.results import Results

DEFAULT_DEPTHS = (1024, 4096, 16384)
LONGEST_DEFAULT_PROMPT = 4096  # on two cores a small model reads it in half a minute
NONE = "none"
RESULTS, PAGE = "bench.json", "bench.md"


def bench(
    model: model_options.ModelOrDefault = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=model_options.one_of(SHAPES),
            help=f"Instead of a model: random weights of a known shape, made once and kept. {', '.join(SHAPES)}.",
        ),
    ] = None,
    shape_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Only so many layers of it, where this machine can't hold it.")
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="TYPE", help=f"Type of its weights: {', '.join(WEIGHT_TYPES)}.")
    ] = DEFAULT_WEIGHT_TYPE,
    depths: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens in the cache when decoding is timed, as in 1024,8192; by default "
            f"{', '.join(map(str, DEFAULT_DEPTHS))}, as far as the model's context goes.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help=f"Lengths of prompts whose reading is timed; none: none is; by default the depths up to {LONGEST_DEFAULT_PROMPT}.",
        ),
    ] = None,
    streaming: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Which layers stream, instead of what the file says: layers=1,3,5-9;sink=4;window=1020; or auto: what lt-gguf analyze has "
            "chosen for this file. Give it several times to compare several.",
        ),
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help="Hybrids of which such a share of the layers streams, whichever: as in 0.5,0.75."),
    ] = None,
    cache_types: Annotated[
        str, typer.Option(metavar="TYPES", help=f"Types of the KV cache, as in f16,q8_0: {', '.join(CACHE_TYPES)}.")
    ] = DEFAULT_CACHE_TYPE,
    throughput: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Also decode as many sequences at once as fit into a KV cache of that size, as in 1GiB."),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Beside llama.cpp as it is, transformers and kvpress.")] = False,
    peer_python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The Python that has transformers and kvpress; by default the one that runs this."),
    ] = None,
    n_tokens: Annotated[int, typer.Option("--n-tokens", "-n", help="Tokens that are decoded for a time.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds, in each of which everything is timed once, in turn.")] = 3,
    threads: model_options.Threads = 0,
    n_gpu_layers: model_options.GpuLayers = 0,
    flash_attn: model_options.FlashAttention = True,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for tables, pictures and all numbers as JSON.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
) -> None:
    """Measure speed and memory: full attention and hybrid beside each other, in one run, each in a process of its own."""
    from lt_gguf.bench.contender import ours
    from lt_gguf.bench.measure import Plan
    from lt_gguf.bench.peers import find_peers
    from lt_gguf.bench.results import Results

    check_integer("--n-tokens", n_tokens, 1)
    check_integer("--repeats", repeats, 1)
    check_integer("--threads", threads, 0)
    if out is not None:
        check_folder(out, overwrite)
    types = [name.strip() for name in cache_types.split(",")]
    for name in types:
        cache_type(name)
    described = read_model(find(model, shape, shape_layers, weights))
    specs = choose_specs(described, streaming, shares)
    longest = max(1, described.n_ctx_train - n_tokens - 1) if described.n_ctx_train else 0
    asked = parse_depths("--depths", depths, longest) or default_depths(longest)
    reads = parse_depths("--prompts", prompts, longest) if prompts else tuple(d for d in asked if d <= LONGEST_DEFAULT_PROMPT)
    limit = 0 if throughput is None else model_options.size_of("--throughput", throughput)
    python = str(peer_python or sys.executable)
    plan = Plan(asked, reads, limit, n_tokens, repeats, threads or usable_cores(), n_gpu_layers, python)
    contenders = ours(specs, types, flash_attn)
    others, absent = find_peers(described, contenders, plan) if peers else ([], [])
    results = Results(described, plan, [*contenders, *others], describe_machine(n_gpu_layers), left_out=absent)
    try:
        fill(results)
    except KeyboardInterrupt:
        show(results)
        raise
    show(results)
    if out is not None:
        write(results, out)


def fill(results: Results) -> None:
    """Measures. Raises ValueError: a type of cache doesn't fit the model."""
    from lt_gguf.bench.measure import measure

    with ProgressBar("Starting") as bar:
        for result in measure(results.model, results.contenders, results.plan, bar):
            results.add(result)


def find(model: str | None, shape: str | None, n_layer: int | None, weights: str) -> str:
    """The file that is timed. Raises ValueError, OSError as `models.resolve` and `random_model` do."""
    if shape is None:
        if n_layer is not None:
            raise ValueError("--shape-layers: is for --shape NAME, a model has the layers that it has")
        return model_options.find(model)
    if model is not None:
        raise ValueError(f"{model}, --shape {shape}: must be one of them, a model or a shape")
    with ProgressBar("") as bar:
        bar(f"random weights of {shape}", 0, 1)
        return str(random_model(user_cache() / "shapes", shape, n_layer, weights))


def choose_specs(model: GGUFModel, streaming: list[str] | None, shares: str | None) -> list[StreamingSpec]:
    """The hybrids: what is asked for, else what the file says, what was chosen for it, or every other layer; none where none can.

    Raises:
        ValueError: one is malformed, or the model can't stream so.
    """
    specs = [_parse_spec(text, model) for text in streaming or []]
    for text in (shares or "").split(",") if shares else []:
        try:
            share = float(text)
        except ValueError:
            raise ValueError(f'--shares = "{text}": must be numbers from 0 to 1, as in 0.5,0.75') from None
        specs.append(_spread(model, share))
    if not specs and not model.why_not_streaming:
        specs = [model.spec or recall(model.path) or _spread(model)]
    specs = [StreamingSpec(s.layers, model.n_layer, s.sink, s.window, s.prefill, s.type) for s in dict.fromkeys(specs) if s.layers]
    for spec in specs:
        model.check_can_stream(spec)
    return specs


def _spread(model: GGUFModel, share: float = DEFAULT_FRACTION) -> StreamingSpec:
    """A share of the layers that may stream, spread evenly."""
    layers = (model.may_stream[place] for place in StreamingSpec.interleaved(len(model.may_stream) or 1, share).layers)
    return StreamingSpec(tuple(layers), model.n_layer)


def describe_machine(n_gpu_layers: int) -> str:
    """The processor, and where layers run on them the GPUs."""
    from lt_gguf.runtime.build_info import backends

    gpus = [device for backend in backends() if backend.name != "CPU" for device in backend.devices] if n_gpu_layers else []
    return ", ".join([cpu_name(), *gpus])


def show(results: Results) -> None:
    """Prints tables and notes."""
    from rich.console import Console
    from rich.table import Table

    from lt_gguf.bench.tables import tables

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for table in tables(results):
        shown = Table(*table.header, title=table.title)
        for column in (shown.columns[0], *shown.columns[2:]):
            column.justify = "right"
        previous = None
        for row in table.rows:
            if previous and row[0] != previous:
                shown.add_section()
            shown.add_row(row[0] if row[0] != previous else "", *row[1:])
            previous = row[0]
        console.print(shown)
    for note in results.notes():
        console.print(note, soft_wrap=not console.is_terminal, markup=False)  # whole words in a terminal, whole lines elsewhere


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ValueError or ImportError if no results could or should be written into it: long before there are any."""
    from lt_gguf.report import plots

    plots.check()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, must be a folder for the results")
    if not overwrite and (existing := [name for name in (PAGE, RESULTS) if (folder / name).exists()]):
        raise ValueError(f"{folder / existing[-1]}: exists, remove it, name another folder or use --overwrite")


def write(results: Results, folder: Path) -> None:
    """Tables, pictures and numbers, each file as a whole. Raises OSError."""
    from lt_gguf.bench.pictures import figures
    from lt_gguf.bench.tables import markdown
    from lt_gguf.evaluation.results import write_text
    from lt_gguf.report import plots

    folder.mkdir(parents=True, exist_ok=True)
    files = [file for name, figure in figures(results) for file in plots.save(figure, folder / name)]
    files.append(write_text(folder / PAGE, markdown(results, [file.name for file in files if file.suffix == ".svg"])))
    files.append(write_text(folder / RESULTS, json.dumps(results.to_json(), indent=2) + "\n"))
    print(f"{folder}: {', '.join(file.name for file in files)}")


def parse_depths(option: str, text: str | None, longest: int) -> tuple[int, ...]:
    """Numbers of tokens, ascending; empty where nothing or "none" is said. `longest`: 0 if there is no limit.

    Raises:
        ValueError: one isn't a number of tokens, or is too large.
    """
    if text is None or text.strip() == NONE:
        return ()
    numbers = []
    for item in text.split(","):
        if not item.strip().isdecimal() or not int(item):
            raise ValueError(f'{option} = "{text}": must be numbers of tokens, as in 1024,8192')
        if longest and int(item) > longest:
            raise ValueError(f"{option}: {int(item)} tokens, must be at most {longest}, so that the model's context holds them")
        numbers.append(int(item))
    return tuple(sorted(set(numbers)))


def default_depths(longest: int) -> tuple[int, ...]:
    # note: not to the last token, as a context is padded
    most = longest - longest % 256 if longest else DEFAULT_DEPTHS[-1]
    return tuple(sorted({min(depth, most or longest) for depth in DEFAULT_DEPTHS}))


def _parse_spec(text: str, model: GGUFModel) -> StreamingSpec:
    asked, unknown = chosen_for(model.path, text)
    if unknown:
        raise ValueError(unknown)
    if asked is None:
        assert model.spec is not None  # else nothing would have been found
        return model.spec
    return model.parse_spec(str(asked))
