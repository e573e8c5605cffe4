"""The tables of a benchmark, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lt_gguf.bench.contender import DECODE, PROMPT, THROUGHPUT, Contender
from lt_gguf.bench.results import FIRST, MEMORY, PEAK, SPEED, Results, Spread
from lt_gguf.memory.sizes import format_bytes


class BenchTable(NamedTuple):
    """`rows` have texts; those of the first two columns are left-justified names and depths."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(results: Results) -> Iterator[BenchTable]:
    """One for each task that something was measured of."""
    first = results.first.name
    columns: dict[str, tuple[str, tuple[str, ...], Callable[[Results, Contender, int], tuple[str, ...]]]] = {
        DECODE: ("Decoding", ("tokens/s", f"÷ {first}", "predicted", "KV cache"), _decode_row),
        PROMPT: ("Reading a prompt", ("first token, s", "tokens/s", f"÷ {first}", "KV cache", "peak"), _prompt_row),
        THROUGHPUT: ("Throughput", ("sequences", "tokens/s", f"÷ {first}", "KV cache"), _throughput_row),
    }
    for task, (title, header, row) in columns.items():
        rows = [
            (f"{depth:,}", contender.name, *row(results, contender, depth))
            for depth in results.depths(task)
            for contender in results.contenders
            if results.value(contender, task, depth, SPEED)
        ]
        if rows:
            yield BenchTable(title, ("tokens", "", *header), rows)


def markdown(results: Results, pictures: list[str]) -> str:
    """A page with the tables, notes and these pictures."""
    lines = [f"# {results.model.path.name}", ""]
    for table in tables(results):
        lines += [f"## {table.title}", "", _row(table.header), _row(("--:", "---", *["--:"] * (len(table.header) - 2)))]
        lines += [*map(_row, table.rows), ""]
    lines += [f"![{name.rpartition('.')[0]}]({name})" for name in pictures]
    lines += ["", *(f"- {note}" for note in results.notes()), ""]
    return "\n".join(lines)


def _decode_row(results: Results, contender: Contender, depth: int) -> tuple[str, ...]:
    predicted = results.predicted(contender, depth)
    return (
        _shown(results.value(contender, DECODE, depth, SPEED), _speed),
        _ratio(results, contender, DECODE, depth),
        "" if predicted is None or contender == results.first else f"{predicted:.2f}",
        format_bytes(contender.context_bytes(results.model, depth) or _measured(results, contender, DECODE, depth, MEMORY)),
    )


def _prompt_row(results: Results, contender: Contender, depth: int) -> tuple[str, ...]:
    return (
        _shown(results.value(contender, PROMPT, depth, FIRST), lambda s: f"{s:.2f}"),
        _shown(results.value(contender, PROMPT, depth, SPEED), _speed),
        _ratio(results, contender, PROMPT, depth),
        _memory(results, contender, PROMPT, depth, MEMORY),
        _memory(results, contender, PROMPT, depth, PEAK),
    )


def _throughput_row(results: Results, contender: Contender, depth: int) -> tuple[str, ...]:
    n_seq = results.value(contender, THROUGHPUT, depth, "n_seq")
    return (
        f"{n_seq.median:.0f}" if n_seq else "",
        _shown(results.value(contender, THROUGHPUT, depth, SPEED), _speed),
        _ratio(results, contender, THROUGHPUT, depth),
        _memory(results, contender, THROUGHPUT, depth, MEMORY),
    )


def _ratio(results: Results, contender: Contender, task: str, depth: int) -> str:
    if contender == results.first:
        return ""
    return _shown(results.ratio(contender, results.first, task, depth), lambda ratio: f"{ratio:.2f}")


def _memory(results: Results, contender: Contender, task: str, depth: int, key: str) -> str:
    n_bytes = _measured(results, contender, task, depth, key)
    return format_bytes(n_bytes) if n_bytes else ""


def _measured(results: Results, contender: Contender, task: str, depth: int, key: str) -> int:
    spread = results.value(contender, task, depth, key)
    return int(spread.median) if spread else 0


def _speed(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _shown(spread: Spread | None, form: Callable[[float], str]) -> str:
    if spread is None:
        return ""
    median, low, high = map(form, spread)
    return median if low == high else f"{median} ({low} to {high})"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
