"""What was measured on the hybrid itself, as `report.json` says it: candidates, what they were measured on, and types of the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, fields
from typing import Any

from lt_gguf.report.fields import get, is_count, is_fraction, is_integer, is_integers, is_number, is_objects, is_string
from lt_gguf.selection.caches import CachePoint, Caches
from lt_gguf.selection.evidence import TEXT, WHERE, Candidate, Evidence, Measurement, Outcome
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import CACHE_TYPES, CacheTypes

_OUTCOME = tuple(field.name for field in fields(Outcome))


def describe_candidate(candidate: Candidate) -> dict[str, Any]:
    return {"name": candidate.name, "layers": list(candidate.layers), **_describe_evidence(candidate.evidence)}


def _describe_evidence(evidence: Evidence) -> dict[str, Any]:
    kl = {f"kl_{where}": _or_null(evidence.kl_where(where).value) for where in WHERE}
    said = {"loss": [_or_null(number) for number in evidence.loss], "accuracy": evidence.accuracy, **kl}
    return said | {"outcomes": [list(astuple(outcome)) for outcome in evidence.outcomes]}


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def read_candidates(content: Mapping[str, Any], n_layer: int) -> tuple[Candidate, ...]:
    # note: older reports have no such key
    if content.get("candidates") is None:
        return ()
    listed = get(content, "candidates", "null, or a list of objects", is_objects)
    # note: older reports don't say what became of each question; their layers are as good
    return tuple(_read_candidate(described, n_layer) for described in listed if "outcomes" in described)


def _read_candidate(described: Mapping[str, Any], n_layer: int) -> Candidate:
    try:
        name = get(described, "name", "a string", is_string)
        return Candidate(name, _read_layers(described, n_layer), _read_evidence(described))
    except ValueError as error:
        raise ValueError(f"candidates: {error}") from None


def _read_layers(described: Mapping[str, Any], n_layer: int) -> tuple[int, ...]:
    return StreamingSpec(tuple(get(described, "layers", "a list of layers", is_integers)), n_layer).layers


def _read_evidence(described: Mapping[str, Any]) -> Evidence:
    listed = get(described, "outcomes", f"a list of lists of {', '.join(_OUTCOME)}", _is_outcomes)
    return Evidence(tuple(Outcome(*outcome) for outcome in listed))


def read_measurement(content: Mapping[str, Any]) -> Measurement | None:
    described = content.get("measurement")
    if described is None:
        return None
    get(content, "measurement", "an object, or null", lambda value: isinstance(value, dict))
    if "conversations" not in described:  # an older report
        return None
    try:
        data = [get(described, key, "a string", is_string) for key in ("data", "sha256")]
        conversations = get(described, "conversations", "an integer of at least 1", is_count)
        lengths = tuple(get(described, "lengths", "a list of integers", is_integers))
        sets, read, computed = (get(described, key, "an integer", is_integer) for key in ("sets", "read", "computed"))
        long = get({"long": 0, **described}, "long", "an integer", is_integer)  # note: older reports don't say it
        return Measurement(data[0], data[1], conversations, lengths, sets, read, computed, long)
    except ValueError as error:
        raise ValueError(f"measurement: {error}") from None


def describe_measurement(measurement: Measurement) -> dict[str, Any]:
    return asdict(measurement) | {"lengths": list(measurement.lengths)}


def describe_caches(caches: Caches) -> dict[str, Any]:
    return {
        "recommended": list(caches.recommended),
        "breaking": [list(types) for types in caches.breaking],
        "points": [
            {"types": list(point.types), "layers": list(point.layers), "bytes": point.n_bytes, **_describe_evidence(point.evidence)}
            for point in caches.points
        ],
    }


def read_caches(content: Mapping[str, Any], n_layer: int) -> Caches | None:
    described = content.get("cache_types")
    if described is None:  # as in older reports
        return None
    try:
        if not isinstance(described, dict):
            raise ValueError("must be an object, or null")
        recommended = get(described, "recommended", "a list of two types", _is_types)
        breaking = get(described, "breaking", "a list of lists of two types", lambda value: _is_list_of(value, _is_types))
        points = get(described, "points", "a list of objects", is_objects)
        found = tuple(_read_point(point, n_layer) for point in points)
        return Caches(found, CacheTypes(*recommended), tuple(CacheTypes(*types) for types in breaking))
    except ValueError as error:
        raise ValueError(f"cache_types: {error}") from None


def _read_point(described: Mapping[str, Any], n_layer: int) -> CachePoint:
    types = CacheTypes(*get(described, "types", "a list of two types", _is_types))
    return CachePoint(
        types, _read_layers(described, n_layer), get(described, "bytes", "an integer", is_integer), _read_evidence(described)
    )


def _is_types(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_string(name) and name in CACHE_TYPES for name in value)


def _is_list_of(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_right, value))


def _is_outcomes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_outcome, value)) and any(outcome[0] != TEXT for outcome in value)


def _is_outcome(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != len(_OUTCOME):
        return False
    where, kind, length, prompt, kl, known, found, hit = value
    are_right = where in WHERE and is_string(kind) and is_count(length) and is_integer(prompt) and isinstance(hit, bool)
    return are_right and is_number(kl) and all(share is not None and is_fraction(share) for share in (known, found))
