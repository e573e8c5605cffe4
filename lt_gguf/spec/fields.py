"""Reads and checks the fields of a spec's text, with errors that name the field, its value and what is allowed."""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import Any, NoReturn

INT32_MAX = 2**31 - 1  # positions are int32 in llama.cpp
CACHE_KEEP = "cache_keep"  # the field of layers whose cache isn't quantized


def is_auto(text: str) -> bool:
    """True if the text of a spec asks for layers that are chosen for the prompt."""
    return re.match(r"\s*auto\s*[:=]", text) is not None


def split_fields(text: str, allowed: str) -> dict[str, str]:
    """The key=value pairs of a text with ; between them. Raises ValueError if it isn't `allowed`, or names a key twice."""
    fields: dict[str, str] = {}
    for item in text.split(";"):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f'"{item.strip()}": must be {allowed}')
        if key in fields:
            raise ValueError(f"{key}: is given twice")
        fields[key] = value
    return fields


def bad_value(what: str, value: str, allowed: str) -> NoReturn:
    raise ValueError(f"{what} = {value}: must be {allowed}")


def check_size(what: str, value: Any) -> int:
    """A number of bytes. Raises ValueError, which names it as `what`, if it isn't one."""
    return check_integer(what, value, 0, 2**63 - 1)


def check_integer(what: str, value: Any, minimum: int | None, maximum: int = INT32_MAX) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        bad_value(what, repr(value), "an integer")
    if minimum is not None and not minimum <= number <= maximum:
        bad_value(what, str(number), f"an integer from {minimum} to {maximum}")
    return number


def parse_integer(what: str, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        bad_value(what, f'"{text}"', "an integer")
    return int(text)


def parse_fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        bad_value("fraction", f'"{text}"', "a number from 0 to 1, the share of the layers that stream")


def check_fraction(value: float | Fraction) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)) or not 0 <= value <= 1:
        bad_value("fraction", str(value), "a number from 0 to 1, the share of the layers that stream")
    return Fraction(value).limit_denominator(10_000)
