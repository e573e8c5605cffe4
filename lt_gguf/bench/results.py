"""What came of a benchmark: medians with their spread, ratios of what ran in the same round, and all of it as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from lt_gguf.bench.contender import DECODE, PROMPT, THROUGHPUT, Contender
from lt_gguf.bench.measure import Failure, Measurement, Plan
from lt_gguf.gguf.file import GGUFModel

SPEED, MEMORY, PEAK, FIRST = "tokens_per_second", "kv_bytes", "peak_bytes", "first_token_seconds"
# What a process that reads prompts and decodes after them says of the decoding.
_AFTER_PROMPT = "decode_tokens_per_second"


class Spread(NamedTuple):
    """A median, and the least and the largest of what it is the median of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """`None` where nothing was measured."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found)) if found else None


@dataclass
class Results:
    """All measurements so far; the first contender is what the others are compared with.

    Args:
        model: what ran.
        plan: how.
        contenders: in the order of tables.
        machine: it, in words.
    """

    model: GGUFModel
    plan: Plan
    contenders: Sequence[Contender]
    machine: str
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # peers that aren't there, a line each

    def add(self, result: Measurement | Failure) -> None:
        if isinstance(result, Failure):
            self.failures.append(result)
            return
        self.measurements.append(result)
        # note: who has no cache but one that was read decodes in the same process
        if result.task == PROMPT and _AFTER_PROMPT in result.values:
            values = {SPEED: result.values[_AFTER_PROMPT], MEMORY: result.values[MEMORY], PEAK: result.values[PEAK]}
            self.measurements.append(Measurement(result.contender, DECODE, result.depth, result.round, values))
        self.__dict__.pop("_by_key", None)

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, int], dict[int, dict[str, Any]]]:
        found: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
        for m in self.measurements:
            found.setdefault((m.task, m.contender, m.depth), {})[m.round] = m.values
        return found

    @property
    def first(self) -> Contender:
        return self.contenders[0]

    def depths(self, task: str) -> list[int]:
        """Those at which something was measured."""
        return sorted({depth for (its, _, depth) in self._by_key if its == task})

    def value(self, contender: Contender, task: str, depth: int, key: str) -> Spread | None:
        """Of the rounds."""
        rounds = self._by_key.get((task, contender.name, depth), {})
        return Spread.of(values[key] for values in rounds.values() if values.get(key))

    def ratio(self, contender: Contender, to: Contender, task: str, depth: int, key: str = SPEED) -> Spread | None:
        """How many times as much as `to`, round by round."""
        own, other = (self._by_key.get((task, c.name, depth), {}) for c in (contender, to))
        return Spread.of(own[i][key] / other[i][key] for i in own.keys() & other.keys())

    def predicted(self, contender: Contender, depth: int) -> float | None:
        """How many times as fast as the first one it would decode if reading bytes were all there is to it."""
        if contender.library != "llama.cpp":
            return None
        return self.first.bytes_read(self.model, depth) / contender.bytes_read(self.model, depth)

    def best_peer(self, task: str, depth: int) -> Contender | None:
        """Who decodes fastest at a depth of those who keep all of the conversation, as others have it."""
        speeds = {
            c.name: spread.median
            for c in self.contenders
            if c.is_peer and c.options is None and not c.shift_at and (spread := self.value(c, task, depth, SPEED))
        }
        return next((c for c in self.contenders if speeds and c.name == max(speeds, key=lambda name: speeds[name])), None)

    def notes(self) -> list[str]:
        """What a reader of the tables has to know."""
        tasks = {task for task, _, _ in self._by_key}
        lines = [f"{self.machine}; {self.plan}, medians (least to largest)"]
        if DECODE in tasks:
            lines.append(
                f"decoding: {self.plan.n_tokens} tokens after a cache that was filled without computing, which is as fast as one that was "
                "read; predicted: from the bytes of weights and cache that a token reads"
            )
        if PROMPT in tasks:
            lines.append(
                "prompts: random tokens, read by llama.cpp and lt-gguf for real; peak: of the process, the model's file included"
            )
        if THROUGHPUT in tasks:
            lines.append(
                "throughput: as many sequences as fit into the cache's limit are decoded at once, each with a cache of its own"
            )
        if any(c.is_peer and c.library == "llama.cpp" for c in self.contenders):
            lines.append(
                "llama.cpp: this library with no layer streaming and llama.cpp's own attention, which computes what stock does"
            )
        if any(c.shift_at for c in self.contenders):
            lines.append(
                "shifted: all layers forget what is behind its context; a shift's time is spread over the tokens between two"
            )
        if any(c.library != "llama.cpp" for c in self.contenders):
            lines.append(
                "transformers, kvpress: the same weights dequantized to 32 bits; the text is random, so SimLayerKV doesn't find the layers "
                "that are lazy in a text"
            )
        for depth in self.depths(DECODE)[-1:]:
            if best := self.best_peer(DECODE, depth):
                ours = [c for c in self.contenders if not c.is_peer]
                ratios = [f"{c.name} {r.median:.2f}" for c in ours if (r := self.ratio(c, best, DECODE, depth))]
                lines.append(
                    f"at {depth:,} tokens, times as fast as {best.name}, the fastest of llama.cpp's settings: {', '.join(ratios)}"
                )
        lines += [f"{f.contender}, {f.task}: not measured: {f.reason}" for f in self.failures]
        return lines + self.left_out

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model.path.name,
            "machine": self.machine,
            "plan": asdict(self.plan) | {"peer_python": None},  # note: a path of this machine
            "contenders": [asdict(c) for c in self.contenders],
            "measurements": [asdict(m) for m in self.measurements],
            "failures": [asdict(f) for f in self.failures],
            "notes": self.notes(),
        }
