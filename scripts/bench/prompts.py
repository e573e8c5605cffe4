"""Measures what prompts cost that are read with full attention (prefill = full), and what comes after them.

    python scripts/bench/prompts.py [--depths 8192,32768] [--repeats 5] [--only memory,decode,prefill,auto,edit] [--model FILE.gguf]

For each depth a prompt of random tokens is really read by contexts that are alive at the same time: one with full attention, a
hybrid one, and one that chooses its layers for the prompt (auto). They take each batch in turn, so that what else the
machine does hits all of them; what comes after is repeated in turn as well. Prints Markdown tables: KV memory before, while and
after the prompt is read, decoding speed, the time to read the prompt and what its end costs, and the time to the first token
after the last message of a long conversation was edited. Without --model it takes a model with random weights
(16 layers of 8 KV heads of 64, half of them streaming). At 32768 tokens it needs 6 GiB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from prompt_reader import N_BATCH, N_ROOM, BenchError, End, Reader, TimedLog
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from support.native import Model

from lt_gguf import Llama
from lt_gguf.bench.contender import Contender
from lt_gguf.bench.shapes import random_model
from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.spec import DEFAULT_W_LAST, AutoSpec, StreamingSpec

PARTS = ("memory", "decode", "prefill", "auto", "edit")
N_LAST = DEFAULT_W_LAST  # tokens of the prompt's last batch: few, so that what its end costs isn't lost in its noise
N_AUTO = 4096  # the shorter of the paper's two prompts
N_TURNS, N_MESSAGE, N_ANSWER = 8, 256, 16  # of the conversation that is edited: turns, tokens of the last message, of each answer
MIB = 2**20


@dataclass
class Measured:
    """What was measured for one length of the prompt, by the reader's name."""

    n_tokens: int
    batches: dict[str, list[float]] = field(default_factory=dict)  # seconds of each batch
    ends: dict[str, list[End]] = field(default_factory=dict)
    speeds: dict[str, list[float]] = field(default_factory=dict)  # tokens per second
    specs: dict[str, StreamingSpec] = field(default_factory=dict)  # after the prompt
    memory: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # of the hybrid, by moment

    def prefill_ratio(self, name: str) -> str:
        """Of all batches together, and the quartiles of the single ones."""
        full, other = self.batches["full"], self.batches[name]
        ratios = [b / a for a, b in zip(full, other)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return f"{sum(other) / sum(full):.3f} | {middle:.3f} ({low:.3f} to {high:.3f})"

    def end_costs(self, name: str) -> list[float]:
        """What the end of the prompt costs more than with full attention, in seconds."""
        return [end.cost - full.cost for full, end in zip(self.ends["full"], self.ends[name])]


def in_turn(names: Iterable[str], i: int) -> Iterator[str]:
    """The names, from another one on each time."""
    names = list(names)
    return itertools.islice(itertools.cycle(names), i % len(names), i % len(names) + len(names))


def measure(
    model: Model, specs: dict[str, str], n_tokens: int, options: argparse.Namespace, timed_log: TimedLog, progress: Progress
) -> Measured:
    """Reads a prompt of `n_tokens` in a context for each spec, and measures what the parts ask for."""
    tokens = np.random.default_rng(n_tokens).integers(0, model.n_vocab, n_tokens).tolist()
    # note: two small batches at the end: before them a state is saved, and what a restored one still has to do falls to the first
    cuts = [*range(0, n_tokens - 2 * N_LAST, N_BATCH), n_tokens - 2 * N_LAST, n_tokens - N_LAST]
    measured = Measured(n_tokens, {name: [] for name in specs}, {name: [] for name in specs}, {name: [] for name in specs})
    task = progress.add_task(f"{n_tokens} tokens: {', '.join(specs)}", total=n_tokens**2)
    repeats_end = len(specs) > 1
    with ExitStack() as stack:
        readers = {
            name: stack.enter_context(Reader(model, spec, n_tokens, options.threads, timed_log)) for name, spec in specs.items()
        }
        if "hybrid" in readers:
            measured.memory["before"] = readers["hybrid"].kv_bytes()
        if not options.undeclared:
            for reader in readers.values():
                reader.context.prompt_begin(n_tokens)
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            if end == cuts[-1] and repeats_end:
                for reader in readers.values():
                    reader.save()
            for name in in_turn(readers, i):
                measured.batches[name].append(readers[name].read(tokens[begin:end], begin))
            progress.update(task, completed=end**2)
        if "hybrid" in readers:
            measured.memory["during"] = readers["hybrid"].kv_bytes()
        for i in range(options.repeats if repeats_end else 1):
            for name in in_turn(readers, i):
                reader = readers[name]
                if i > 0:
                    reader.restore()
                    reader.read(tokens[cuts[-2] : cuts[-1]], cuts[-2])
                measured.ends[name].append(reader.read_end(tokens[cuts[-1] :], cuts[-1]))
        for name, reader in readers.items():
            reader.remove(n_tokens)
            measured.batches[name].append(measured.ends[name][0].last)
            measured.specs[name] = reader.spec
        if "hybrid" in readers:
            measured.memory["after"] = readers["hybrid"].kv_bytes()
        for i in range(options.repeats if "decode" in options.only and "hybrid" in specs else 0):
            for name in in_turn(readers, i):
                measured.speeds[name].append(readers[name].decode(options.n_tokens, n_tokens))
        progress.update(task, completed=n_tokens**2)
    return measured


# ------------------------------------------------------------------------------------------ tables


def table(title: str, columns: str, rows: Iterable[str], note: str) -> None:
    print(f"\n### {title}\n\n| {columns} |\n|{' --: |' * (columns.count('|') + 1)}")
    print("\n".join(f"| {row} |" for row in rows))
    print(f"\n{note}", flush=True)


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def memory_table(model: GGUFModel, spec: StreamingSpec, results: Sequence[Measured]) -> None:
    token_bytes = [model.kv_shape.token_bytes(il) for il in range(model.n_layer_main)]
    rows = []
    for result in results:
        n_ctx = result.n_tokens + N_ROOM
        n_kept = min(n_ctx, spec.sink + spec.window)
        for moment, parts in result.memory.items():
            n_streaming = n_kept + (result.n_tokens if moment == "during" else 0)
            formula = sum(size * (n_streaming if spec.is_streaming(il) else n_ctx) for il, size in enumerate(token_bytes))
            cells = [f"{n / MIB:.1f}" for n in (*parts, sum(parts), formula, n_ctx * sum(token_bytes))]
            rows.append(f"{result.n_tokens} | {moment} | {' | '.join(cells)} | {sum(parts) / (n_ctx * sum(token_bytes)):.2f}")
    table(
        "KV memory of the hybrid, MiB",
        "prompt, tokens | moment | full part | streaming part | prompt part | together | formula | all layers full | together ÷ all full",
        rows,
        f"Formula: (prompt + {N_ROOM}) cells in each full layer, sink + window in each streaming one, and during the prompt (before its last "
        f"batch) as many more as it has tokens. What is allocated is larger by the micro-batch of {N_BATCH} and rounding up to 256 cells.",
    )


def decode_table(model: GGUFModel, results: Sequence[Measured], n_tokens: int) -> None:
    rows = []
    for result in results:
        depth = result.n_tokens + n_tokens // 2
        for name in (name for name, speeds in result.speeds.items() if speeds and name != "full"):
            spec = result.specs[name]
            ratios = [b / a for a, b in zip(result.speeds["full"], result.speeds[name])]
            full, other = (statistics.median(result.speeds[n]) for n in ("full", name))
            predicted = Contender("full").bytes_read(model, depth) / Contender(name, str(spec)).bytes_read(model, depth)
            share = statistics.median(ratios) / predicted
            rows.append(
                f"{result.n_tokens} | {name} ({len(spec.layers)} streaming) | {full:.1f} | {other:.1f} | {spread(ratios, '.2f')} | {predicted:.2f} | {share:.0%}"
            )
    table(
        "Decoding after the prompt",
        "prompt, tokens | hybrid | full, tokens/s | hybrid, tokens/s | hybrid ÷ full, median (range) | predicted from bytes | measured ÷ predicted",
        rows,
        f"Runs of {n_tokens} tokens in turn, each from the prompt's end. Goal: at least 90 % of the prediction.",
    )


def prefill_table(results: Sequence[Measured]) -> None:
    rows = []
    for result in results:
        full, hybrid = (sum(result.batches[name]) for name in ("full", "hybrid"))
        costs = result.end_costs("hybrid")
        rows.append(
            f"{result.n_tokens} | {full:.1f} | {hybrid:.1f} | {result.prefill_ratio('hybrid')} | "
            f"{spread([1000 * cost for cost in costs], '.1f')} | {statistics.median(costs) / full:.2%}"
        )
    table(
        "Reading the prompt, and its end",
        "prompt, tokens | full, s | hybrid, s | hybrid ÷ full, all batches | single batches, median (quartiles) | end of the prompt, ms more than full, "
        "median (range) | share of the prefill",
        rows,
        f"End of the prompt: its last llama_decode ({N_LAST} tokens), and what the first decoded token takes more than later ones; of the hybrid minus "
        "of the full context. It has the compaction. Goal: less than 1 % of the prefill at 32768 tokens.",
    )


def auto_table(results: Sequence[Measured]) -> None:
    rows = []
    for result in results:
        full = sum(result.batches["full"])
        costs = result.end_costs("auto")
        switches = [1000 * end.switch for end in result.ends["auto"]]
        firsts = [1000 * (b.first - b.later - a.first + a.later) for a, b in zip(result.ends["full"], result.ends["auto"])]
        rows.append(
            f"{result.n_tokens} | {full:.1f} | {result.prefill_ratio('auto')} | {spread([1000 * cost for cost in costs], '.1f')} | "
            f"{spread(switches, '.1f')} | {spread(firsts, '.1f')} | {statistics.median(costs) / full:.2%}"
        )
    table(
        "Layers chosen for the prompt (auto) beside full attention",
        "prompt, tokens | full, s | auto ÷ full, all batches | single batches, median (quartiles) | end of the prompt, ms more than full, median (range) | "
        "of it the switch | of it the first decoded token | share of the prefill",
        rows,
        "End of the prompt, as above: it has the measurement of the lazy ratios and the switch to the chosen layers (copying what they keep, freeing the rest; timed "
        "by llama.cpp's log), and what the first decoded token takes more than later ones because of it. Keeping the last queries of each batch is only in the ratios "
        "of the batches. Goal for the share: at most 0.6 % at 4096 tokens, 0.15 % at 32768.",
    )


# ----------------------------------------------------------------------------------------- editing


def measure_edit(path: Path, spec: StreamingSpec, options: argparse.Namespace, progress: Progress) -> None:
    """Has a conversation, edits its last message several times, and reads the last of these again from nothing."""
    n_before = max(options.edit_depth - N_MESSAGE, N_TURNS * (N_ANSWER + 1))
    random = np.random.default_rng(1)
    n_ctx = options.edit_depth + N_TURNS * N_ANSWER + 2 * N_BATCH
    settings = dict(n_ctx=n_ctx, n_batch=N_BATCH, n_ubatch=N_BATCH, flash_attn=True, verbose=False)
    threads = dict(n_threads=options.threads, n_threads_batch=options.threads)
    with closing(Llama(str(path), streaming=spec, **settings, **threads)) as llm:

        def message(n: int) -> list[int]:
            return random.integers(0, llm.n_vocab(), n).tolist()

        def first_token(prompt: list[int]) -> tuple[float, int]:
            """Seconds, and tokens that were read."""
            n_read, start = llm.n_read, time.perf_counter()
            next(llm.generate(prompt, temp=0))
            return time.perf_counter() - start, llm.n_read - n_read

        task = progress.add_task(f"conversation of {options.edit_depth} tokens", total=N_TURNS + options.repeats + N_TURNS)
        conversation: list[int] = []
        for turn in range(1, N_TURNS):
            conversation += message(n_before * turn // (N_TURNS - 1) - len(conversation) - N_ANSWER)
            conversation += itertools.islice(llm.generate(conversation, temp=0), N_ANSWER)
            progress.advance(task)
        n_unchanged = N_MESSAGE // 2
        asked = conversation + message(N_MESSAGE)
        list(itertools.islice(llm.generate(asked, temp=0), N_ANSWER))
        progress.advance(task)
        edits = []
        for _ in range(options.repeats):
            edited = asked[: len(conversation) + n_unchanged] + message(N_MESSAGE - n_unchanged)
            edits.append(first_token(edited))
            list(itertools.islice(llm.generate(edited, temp=0), N_ANSWER))
            progress.advance(task)
        held = f"{len(llm._snapshots)} snapshots of {llm._snapshots.n_bytes / MIB:.0f} MiB together"
        llm.reset()
        again, n_again = first_token(edited)
        progress.update(task, completed=2 * N_TURNS + options.repeats)
    seconds = [edit[0] for edit in edits]
    n_read = sorted({edit[1] for edit in edits})
    table(
        "Editing the last message",
        "conversation, tokens | after the edit, s to the first token, median (range) | tokens read | read from nothing, s | tokens read | times faster",
        [
            f"{len(edited)} | {spread(seconds, '.2f')} | {', '.join(map(str, n_read))} | {again:.1f} | {n_again} | {again / statistics.median(seconds):.0f}"
        ],
        f"{N_TURNS} turns with answers of {N_ANSWER} tokens; the second half of the last message, of {N_MESSAGE} tokens, is another one. {held}. Goal at 16384 tokens: at least 20 times.",
    )


# -------------------------------------------------------------------------------------------- main


def measure_prompts(path: Path, spec: StreamingSpec, options: argparse.Namespace, progress: Progress) -> None:
    model = read_model(path)
    in_auto = {min(N_AUTO, max(options.depths)), max(options.depths)} if "auto" in options.only else set()
    auto = AutoSpec(len(spec.layers) / model.n_layer_main, spec.sink, spec.window)
    results = []
    timed_log = TimedLog(time.thread_time if options.cpu_time else time.perf_counter)
    with Model(path) as loaded:
        for n_tokens in sorted({*options.depths, *in_auto}):
            specs = {"full": "off"} if options.only & {"decode", "prefill", "auto"} else {}
            if n_tokens in options.depths and options.only & {"memory", "decode", "prefill"}:
                specs["hybrid"] = str(spec)
            if n_tokens in in_auto:
                specs["auto"] = str(auto)
            if specs.keys() - {"full"}:
                results.append(measure(loaded, specs, n_tokens, options, timed_log, progress))

    hybrids = [result for result in results if "hybrid" in result.ends]
    if "memory" in options.only:
        memory_table(model, spec, hybrids)
    if "decode" in options.only:
        decode_table(model, hybrids, options.n_tokens)
    if "prefill" in options.only:
        prefill_table(hybrids)
    if "auto" in options.only:
        auto_table([result for result in results if "auto" in result.ends])


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (default: decode.py's, with random weights)")
    parser.add_argument(
        "--streaming",
        help="spec of the hybrid (default: the file's, else every other layer, sink 4, window 1020), always with prefill = full",
    )
    parser.add_argument(
        "--depths", type=numbers, default=[8192, 32768], help="lengths of the prompts, in tokens; auto has 4096 and the largest"
    )
    parser.add_argument("--edit-depth", type=int, default=16384, help="length of the conversation that is edited, in tokens")
    parser.add_argument("--repeats", type=int, default=5, help="of what isn't reading a prompt")
    parser.add_argument("--n-tokens", type=int, default=32, help="to decode in each run")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", type=lambda text: set(text.split(",")), default=set(PARTS), help=f"parts of {','.join(PARTS)}")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the processor instead of the clock, for a machine with other work; one thread",
    )
    parser.add_argument(
        "--undeclared", action="store_true", help="don't announce prompts (lt_prompt_begin), as llama.cpp's tools don't"
    )
    options = parser.parse_args()
    if unknown := options.only - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: must be of {', '.join(PARTS)}")
    if min(options.depths) < N_BATCH or options.edit_depth < 2 * N_BATCH:
        parser.error(f"--depths, --edit-depth: must be at least {N_BATCH} and {2 * N_BATCH} tokens")
    if options.cpu_time:
        options.threads = 1  # whose time can be told
    if options.repeats < 1 or not 1 <= options.n_tokens <= N_ROOM - N_LAST:
        parser.error(f"--repeats, --n-tokens: must be at least 1, --n-tokens at most {N_ROOM - N_LAST}")
    return options


def main() -> None:
    options = parse_arguments()
    try:
        path = options.model or random_model(Path("build/bench"), "16x8x64", weights="f16")
        model = read_model(path)
        if options.streaming:
            spec = StreamingSpec.parse(options.streaming, model.n_layer, model.spec)
        else:
            spec = model.spec or StreamingSpec.interleaved(model.n_layer, 0.5)
        spec = replace(spec, prefill="full")
        threads = "processor time of one thread" if options.cpu_time else f"{options.threads} threads"
        print(f"{path.name}, {spec}, f16 cache, flash attention, {threads}, batches of {N_BATCH} tokens, {options.repeats} repeats")
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            if options.only != {"edit"}:
                measure_prompts(path, spec, options, progress)
            if "edit" in options.only:
                measure_edit(path, spec, options, progress)
    except (BenchError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"bench/prompts: error: {error}")


if __name__ == "__main__":
    main()
