"""Smaller types of the KV cache beside streaming: what each way to save memory costs, alone and together, and which is worth it.

Quantizing and streaming multiply: layers that stream are small, so they stay in 16 bits, and the smaller type goes where the cache grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lt_gguf.memory.kv import KVShape, kv_memory
from lt_gguf.selection.base import LONGEST_COMPARED, Selection
from lt_gguf.selection.evidence import Candidates, Evidence
from lt_gguf.selection.tolerance import Tolerance
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import PLAIN, CacheTypes


@dataclass(frozen=True)
class CachePoint:
    """A way to hold the cache, and what it costs.

    Args:
        types: of the layers whose cache grows.
        layers: that stream, in 16 bits.
        n_bytes: of the KV cache at `LONGEST_COMPARED` tokens.
        evidence: beside the full model with a cache in 16 bits, on questions that nothing was chosen by.
    """

    types: CacheTypes
    layers: tuple[int, ...]
    n_bytes: int
    evidence: Evidence


@dataclass(frozen=True)
class Caches:
    """What was measured of types of the cache, and what follows.

    Args:
        points: some in 16 bits, the chosen layers' among them.
        recommended: for the layers that grow, where the chosen ones stream.
        breaking: what the full model itself loses more with than is tolerated.
    """

    points: tuple[CachePoint, ...]
    recommended: CacheTypes
    breaking: tuple[CacheTypes, ...] = ()


def check_cache_types(types: Sequence[CacheTypes], shape: KVShape) -> None:
    """Raises ValueError if the model's heads can't be held so."""
    for k, v in types:
        shape.token_bytes(0, k, v)


def measure_caches(
    types: Sequence[CacheTypes], selection: Selection, n_layer: int, shape: KVShape, judge: Candidates, tolerance: Tolerance
) -> Caches:
    """Measures the full model and the chosen layers with each type, beside what was measured in 16 bits when they were chosen.

    Args:
        selection: by `loss`, which has measured sets of several sizes.
        shape: of the model's cache.
        judge: with the selection's window.

    Raises:
        ValueError: as `check_cache_types`, or the model can't be run so.
    """
    check_cache_types(types, shape)

    def point(types: CacheTypes, layers: tuple[int, ...], evidence: Evidence) -> CachePoint:
        spec = replace(selection.spec(n_layer), layers=layers)
        return CachePoint(types, layers, cache_bytes(shape, spec, types), evidence)

    # note: the full model is the one of size 0
    judged = [each for each in selection.candidates if each.name.startswith(f"{selection.strategy}, ")]
    points = [point(PLAIN, each.layers, each.evidence) for each in judged]
    sets = list(dict.fromkeys([(), selection.layers]))
    judge.announce_caches(len(types) * len(sets))
    points += [point(each, layers, judge.judge_with_cache(each, layers)) for each in types for layers in sets]
    return Caches(tuple(points), _recommended(points, selection.layers, tolerance), _breaking(points, tolerance))


def cache_bytes(shape: KVShape, spec: StreamingSpec, types: CacheTypes, n_ctx: int = LONGEST_COMPARED) -> int:
    """Bytes of the KV cache at `n_ctx` tokens."""
    return kv_memory(shape, spec if spec.layers else None, n_ctx, type_k=types.k, type_v=types.v).total


def _recommended(points: Sequence[CachePoint], layers: tuple[int, ...], tolerance: Tolerance) -> CacheTypes:
    """The types with which the cache is smallest when these layers stream, and no more is lost than is tolerated beside them in 16 bits.

    Beside them, because their number was chosen by that tolerance: a set that is just within it would leave nothing for any type.
    """
    own = [point for point in points if point.layers == layers]
    (plain,) = (point.evidence for point in own if point.types == PLAIN)

    def is_tolerated(evidence: Evidence) -> bool:
        lost = evidence.loss.value - plain.loss.value if plain.is_informed else 0.0
        return lost <= tolerance.max_loss and evidence.kl - plain.kl <= tolerance.max_kl

    return min((point for point in own if is_tolerated(point.evidence)), key=lambda point: point.n_bytes).types


def _breaking(points: Sequence[CachePoint], tolerance: Tolerance) -> tuple[CacheTypes, ...]:
    """The types with which the full model itself is sure to lose more than is tolerated."""
    alone = [point for point in points if not point.layers and point.types != PLAIN]
    return tuple(
        point.types
        for point in alone
        if point.evidence.kl > tolerance.max_kl or (point.evidence.is_informed and point.evidence.loss.low > tolerance.max_loss)
    )
