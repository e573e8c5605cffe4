"""Checks of what a `report.json` says: each fault is one line that names the key and what would be right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def get(content: Mapping[str, Any], key: str, allowed: str, is_right: Callable[[Any], bool]) -> Any:
    """What a key says. Raises ValueError: it is missing or wrong."""
    if key not in content:
        raise ValueError(f"{key}: is missing, must be {allowed}")
    if not is_right(content[key]):
        raise ValueError(f"{key} = {short(content[key])}: must be {allowed}")
    return content[key]


def short(value: Any) -> str:
    """As much of it as a message shows."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def is_string(value: Any) -> bool:
    return isinstance(value, str)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return is_integer(value) and value >= 1


def is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_integer, value))


def is_fraction(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
