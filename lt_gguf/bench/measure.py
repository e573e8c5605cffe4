"""Runs the contenders in turn, again and again, each time in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lt_gguf.bench.contender import DECODE, PROMPT, THROUGHPUT, Contender, Job
from lt_gguf.gguf.file import GGUFModel
from lt_gguf.runtime.supervised import python, signal_of

MAX_SEQ = 256  # llama.cpp's most
_ATTENTION = "LT_ATTENTION"
_PEER_SCRIPT = Path(__file__).with_name("peer_torch.py")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        depths: tokens in the cache when decoding is timed, ascending.
        prompts: tokens of the prompts whose reading is timed, ascending.
        kv_limit: bytes that the KV cache may take where as many sequences as fit are decoded at once; 0: they aren't.
        n_tokens: that are decoded for a time.
        repeats: of everything; the contenders take turns.
        n_threads: on the CPU.
        n_gpu_layers: on the GPU.
        peer_python: the Python that has transformers and kvpress.
    """

    depths: tuple[int, ...]
    prompts: tuple[int, ...]
    kv_limit: int
    n_tokens: int
    repeats: int
    n_threads: int
    n_gpu_layers: int = 0
    peer_python: str = field(default=sys.executable)

    def __str__(self) -> str:
        threads = f"{self.n_threads} CPU thread{'' if self.n_threads == 1 else 's'}"
        return f"{threads}, {self.repeats} round{'' if self.repeats == 1 else 's'}"


@dataclass(frozen=True)
class Measurement:
    """What one process said of one depth; `values` are tokens_per_second, kv_bytes, peak_bytes and what else the task has."""

    contender: str
    task: str
    depth: int
    round: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A contender that can't run, and why in one line."""

    contender: str
    task: str
    reason: str


def measure(
    model: GGUFModel, contenders: Sequence[Contender], plan: Plan, on_progress: Callable[[str, int, int], None]
) -> Iterator[Measurement | Failure]:
    """Each measurement as soon as it is there. A contender that fails in a task isn't asked again for it.

    Args:
        on_progress: called with what is being run, processes done and processes in all.
    """
    jobs = [(c, job) for task in (DECODE, PROMPT, THROUGHPUT) for c in contenders if (job := make_job(model, c, task, plan))]
    failed: set[tuple[str, str]] = set()
    done, total = 0, len(jobs) * plan.repeats
    for i in range(plan.repeats):
        for contender, job in jobs:
            on_progress(f"{contender.name}: {job.task}", done, total)
            done += 1
            if (contender.name, job.task) in failed:
                continue
            for values in run_job(job, plan.peer_python):
                if "error" in values:
                    failed.add((contender.name, job.task))
                    yield Failure(contender.name, job.task, values["error"])
                else:
                    yield Measurement(contender.name, job.task, values.pop("depth"), i, values)
    on_progress("done", total, total)


def make_job(model: GGUFModel, contender: Contender, task: str, plan: Plan) -> Job | None:
    """What the plan asks of a contender in a task; `None`: nothing.

    Raises:
        ValueError: a cache type doesn't fit the model.
    """
    depths = plan.prompts if task == PROMPT else plan.depths
    n_seq: tuple[int, ...] = ()
    if task == THROUGHPUT:
        if not plan.kv_limit or contender.library != "llama.cpp" or contender.shift_at:
            return None
        fitting = {depth: largest_batch(model, contender, depth + plan.n_tokens + 1, plan.kv_limit) for depth in depths}
        depths = tuple(depth for depth, n in fitting.items() if n)
        n_seq = tuple(fitting[depth] for depth in depths)
    elif task == PROMPT and contender.shift_at:
        return None  # note: it can't read what is longer than its context
    elif task == DECODE and contender.library != "llama.cpp":
        return None  # note: its prompts' job decodes, too, as it has no cache but one that was read
    if not depths:
        return None
    return Job(str(model.path), contender, task, depths, plan.n_tokens, plan.n_threads, plan.n_gpu_layers, n_seq)


def largest_batch(model: GGUFModel, contender: Contender, n_ctx: int, kv_limit: int) -> int:
    """The most sequences of `n_ctx` tokens, up to 256, whose KV cache takes no more than that."""
    low, high = 0, MAX_SEQ
    while low < high:
        middle = (low + high + 1) // 2
        if contender.kv_bytes(model, n_ctx, middle) <= kv_limit:
            low = middle
        else:
            high = middle - 1
    return low


def run_job(job: Job, peer_python: str) -> Iterator[dict[str, Any]]:
    """What the job's process prints; where it fails, `error` with a line at the end."""
    contender = job.contender
    environment = {**os.environ, _ATTENTION: "on" if contender.own_attention else "off"}
    is_torch = contender.library != "llama.cpp"
    command = [peer_python, str(_PEER_SCRIPT)] if is_torch else python("lt_gguf.bench.worker")
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,  # note: no pipe, which would have to be emptied meanwhile
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # note: Ctrl-C reaches this process alone, which then ends it
        ) as process,
    ):
        assert process.stdin and process.stdout
        last: dict[str, Any] = {}
        try:
            process.stdin.write(job.to_json() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                last = json.loads(line)
                yield last
            status = process.wait()
        finally:
            process.kill()
        said.seek(0)
        lines = said.read().strip().splitlines()
    if status and "error" not in last:
        signal = signal_of(status)
        ended = f"its process was ended by signal {signal}" if signal else f"its process ended with status {status}"
        yield {"error": f"{ended}: {lines[-1]}" if lines else ended}
