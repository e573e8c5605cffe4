"""`lt-gguf eval`: what a hybrid loses, measured on one file."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lt_gguf.calibration import DEFAULT_FIELD, Texts, read_texts
from lt_gguf.cli import model as model_options
from lt_gguf.cli.progress import ProgressBar
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.evaluation.variants import variants
from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.models.remembered import chosen_for
from lt_gguf.spec import ENVIRONMENT_VARIABLE, AutoSpec, CacheTypes
from lt_gguf.spec.fields import is_auto

if TYPE_CHECKING:
    from lt_gguf.evaluation.evaluate import Plan
    from lt_gguf.evaluation.results import Journal
    from lt_gguf.evaluation.summary import Summary

RECORDS = "records.jsonl"
TEXT_TASKS = ("perplexity", "kl")  # measured together
DEFAULT_TASKS = ",".join((*TASKS, *TEXT_TASKS))
DEFAULT_LENGTHS = (1024, 2048, 4096)
DEFAULT_DEPTHS = "0,0.25,0.5,0.75,1"
DEFAULT_SAMPLES = 20
DEFAULT_TEXT_SAMPLES = 16
DEFAULT_PARALLEL = 4
WIDTH_OF_A_FILE = 120  # columns, where the output is no terminal


@model_options.takes_options(model_options.MeasureOptions)
def eval(  # noqa: A001 - a command's function has its name
    file: model_options.ModelFile,
    tasks: Annotated[str, typer.Option(metavar="TASKS", help="What is measured.")] = DEFAULT_TASKS,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help=f"Lengths of prompts and texts, as in 1024,4096; by default {', '.join(map(str, DEFAULT_LENGTHS))}, as far as "
            "the model's context goes.",
        ),
    ] = None,
    depths: Annotated[
        str,
        typer.Option(metavar="DEPTHS", help="Where needles stand, from 0, the beginning, to 1; or a number of depths, as in 11."),
    ] = DEFAULT_DEPTHS,
    samples: Annotated[int, typer.Option(help="Prompts for each task, length and depth.")] = DEFAULT_SAMPLES,
    streaming: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Which layers stream, instead of what the file says: layers=1,3,5-9;sink=4;window=1020; auto: what lt-gguf analyze has "
            "chosen for this file; or auto:0.5. "
            "Give it several times to compare several.",
        ),
    ] = None,
    cache_types: Annotated[
        str | None,
        typer.Option(
            metavar="TYPES",
            help="Compare these types of the KV cache, too, each with all of that, beside --cache-type: as in q8_0,q8_0/q4_0 (K/V).",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full/--no-full", help="Compare with the full model, where no layer streams.")] = True,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text or JSONL for perplexity and kl; else built-in texts.")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text or JSONL that needles and votes are hidden in; else made-up stories.")
    ] = None,
    text_field: Annotated[
        str,
        typer.Option(metavar="NAME", help="Field of each line of JSONL files (--text, --haystack): a text, or a list of messages."),
    ] = DEFAULT_FIELD,
    text_samples: Annotated[int, typer.Option(help="Samples of text for each length.")] = DEFAULT_TEXT_SAMPLES,
    fast: Annotated[
        bool, typer.Option("--fast", help="Give the model the right answers and look whether it would have said the same.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for results and pictures. Run it again to go on after an interruption."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    parallel: Annotated[int, typer.Option(help="Prompts that are worked on at a time; 1 with auto.")] = DEFAULT_PARALLEL,
    *,
    options: model_options.MeasureOptions,
) -> None:
    """Measure what a hybrid loses: tasks that need the far context, and how it predicts texts, beside the full model."""
    from lt_gguf.evaluation.results import Journal, model_hash

    file = model_options.find(file)
    model_options.check_cache_keep(options.cache_keep, file)
    described = read_model(file)
    others = [] if cache_types is None else [CacheTypes.parse(name) for name in cache_types.split(",")]
    usual = CacheTypes.parse(options.cache_type)
    specs = variants(choose_specs(described, streaming, full), dict.fromkeys(types for types in others if types != usual))
    plan = make_plan(described, tasks, lengths, depths, samples, text_samples, seed, fast)
    if haystack is not None:
        plan = replace(plan, haystack=read_texts(haystack, text_field))
    if out is not None:
        check_folder(out)
    texts = read_texts(text, text_field)
    settings = {"model": Path(file).name, "sha256": model_hash(Path(file)), "lt_gguf": version("lt-gguf"), **plan.settings(texts)}
    settings |= {"cache_type": options.cache_type, "flash_attn": options.flash_attn}
    if options.cache_keep is not None:
        settings["cache_keep"] = options.cache_keep
    with Journal(None if out is None else out / RECORDS, settings) as journal:
        try:
            measure(file, specs, plan, texts, journal, options, parallel)
        except KeyboardInterrupt:
            if journal.records:
                show(summarize(journal, specs))
            print(how_to_go_on(journal, specs, plan, out), file=sys.stderr)
            raise
        summary = summarize(journal, specs)
        show(summary)
        if out is not None:
            names = [path.name for path in summary.write(out)]
            print(f"{out}: {', '.join([*names, RECORDS])}")


def measure(
    file: str, specs: list[str], plan: Plan, texts: Texts, journal: Journal, options: model_options.MeasureOptions, parallel: int
) -> None:
    """Loads the model and measures what the journal doesn't have. Raises ValueError, OSError."""
    from lt_gguf.evaluation.evaluate import evaluate
    from lt_gguf.evaluation.scorer import Scorer
    from lt_gguf.runtime.log import captured_errors

    settings = model_options.scorer_options(options, n_parallel=1 if any(map(is_auto, specs)) else parallel)
    names = names_of(journal, specs)
    with (
        captured_errors(forward=options.verbose),
        ProgressBar("Loading") as bar,
        Scorer(file, "off", settings, reads_once=len(specs) > 1) as scorer,
    ):
        if sys.stderr.isatty():
            bar.announce(f"{Path(file).name}: {model_options.describe_threads(options.n_threads)}")

        def show_progress(spec: str | None, what: str, done: int, total: int) -> None:
            bar(what if spec is None else f"{names[spec]}: {what}", done, total)

        evaluate(scorer, specs, plan, texts, journal, show_progress)


def choose_specs(model: GGUFModel, streaming: list[str] | None, full: bool) -> list[str]:
    """The texts of the specs that are measured, each once, that of the full model first.

    Raises:
        ValueError: one is malformed, or the model can't stream so; or there is none.
    """
    from lt_gguf.evaluation.summary import FULL

    said = os.environ.get(ENVIRONMENT_VARIABLE) or (None if model.spec is None else str(model.spec))
    asked = streaming or ([said] if said else [])
    specs = [*([FULL] if full else []), *(_canonical(text, model) for text in asked)]
    if not specs:
        raise ValueError("--no-full: nothing is left to measure, the file has no streaming layers; give --streaming SPEC")
    return list(dict.fromkeys(specs))


def make_plan(
    model: GGUFModel, tasks: str, lengths: str | None, depths: str, samples: int, text_samples: int, seed: int, fast: bool
) -> Plan:
    """What the options ask for. Raises ValueError: one of them is malformed or out of range."""
    from lt_gguf.evaluation.evaluate import Plan

    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS and name not in TEXT_TASKS:
            raise ValueError(f'--tasks: "{name}" is none, must be of {DEFAULT_TASKS}')
    return Plan(
        [name for name in dict.fromkeys(names) if name in TASKS],
        _parse_lengths(lengths, model.n_ctx_train),
        _parse_depths(depths),
        samples,
        text_samples,
        any(name in TEXT_TASKS for name in names),
        seed,
        fast,
    )


def check_folder(folder: Path) -> None:
    """Raises ValueError or ImportError if no results could be written into it: long before there are any."""
    from lt_gguf.report import plots

    plots.check()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, must be a folder for the results")


def names_of(journal: Journal, specs: list[str]) -> dict[str, str]:
    """Names of these specs and of those that were measured before."""
    from lt_gguf.evaluation import summary

    every = dict.fromkeys([*(spec for spec, _ in journal.records), *specs])
    return summary.names_of(sorted(every, key=lambda spec: spec != summary.FULL))


def summarize(journal: Journal, specs: list[str]) -> Summary:
    from lt_gguf.evaluation.summary import Summary

    return Summary(journal.settings, names_of(journal, specs), journal.records)


def show(summary: Summary) -> None:
    """Prints tables and notes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    for table in summary.tables():
        shown = Table(*table.header, title=table.title)
        for column in shown.columns[table.n_left :]:
            column.justify = "right"
        previous: tuple[str, ...] = ()
        for row in table.rows:
            # note: what is as in the row above isn't repeated
            n_same = next((i for i in range(table.n_left) if row[: i + 1] != previous[: i + 1]), 0)
            if previous and not n_same:
                shown.add_section()
            shown.add_row(*[""] * n_same, *row[n_same:])
            previous = row
        console.print(shown)
    for note in summary.notes():
        console.print(note, soft_wrap=not console.is_terminal, markup=False)  # whole words in a terminal, whole lines elsewhere


def how_to_go_on(journal: Journal, specs: list[str], plan: Plan, out: Path | None) -> str:
    """A line after Ctrl-C."""
    n = sum(spec in specs for spec, _ in journal.records)
    done = f"interrupted: {n:,} of {plan.n_records(len(specs)):,} prompts are measured"
    return f"{done}, none is kept without --out" if out is None else f"{done} and kept in {out}: run the same command to go on"


def _canonical(text: str, model: GGUFModel) -> str:
    if is_auto(text):
        return str(AutoSpec.parse(text, model.spec))
    asked, unknown = chosen_for(model.path, text)
    if unknown:
        raise ValueError(unknown)
    spec = model.spec if asked is None else model.parse_spec(str(asked))
    assert spec is not None  # else nothing would have been found
    model.check_can_stream(spec)
    return str(spec)


def _parse_lengths(text: str | None, n_ctx_train: int) -> tuple[int, ...]:
    """`n_ctx_train`: 0 if the file doesn't say it."""
    if text is None:
        fitting = [length for length in DEFAULT_LENGTHS if length <= (n_ctx_train or length)]
        return tuple(fitting) or (n_ctx_train,)
    lengths = tuple(int(_number("--lengths", item, "numbers of tokens, as in 1024,4096", int)) for item in text.split(","))
    for length in lengths:
        if n_ctx_train and length > n_ctx_train:
            raise ValueError(f"--lengths: {length} tokens, must be at most {n_ctx_train}, the model's context")
    return tuple(dict.fromkeys(lengths))


def _parse_depths(text: str) -> tuple[float, ...]:
    allowed = "numbers from 0 to 1, as in 0,0.5,1, or a number of depths from 2 on"
    depths = [_number("--depths", item, allowed, float) for item in text.split(",")]
    if len(depths) == 1 and depths[0] >= 2 and depths[0].is_integer():
        n = int(depths[0])
        return tuple(round(i / (n - 1), 6) for i in range(n))
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f'--depths = "{text}": must be {allowed}')
    return tuple(dict.fromkeys(depths))


def _number(option: str, text: str, allowed: str, kind: type[Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f'{option} = "{text.strip()}": must be {allowed}') from None
