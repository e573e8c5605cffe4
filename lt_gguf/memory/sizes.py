"""Numbers of bytes as people read and write them."""

from __future__ import annotations

import re

_UNITS = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0))  # name, power of two


def format_bytes(n_bytes: int) -> str:
    """As llama.cpp writes memory: 544.00 MiB."""
    for unit, power in _UNITS[:-1]:
        if n_bytes >= 1 << power:
            return f"{n_bytes / (1 << power):.2f} {unit}"
    return f"{n_bytes} B"


def parse_size(text: str) -> int:
    """Reads a number of bytes: 512MiB, 1.5 GiB, 1048576.

    Raises:
        ValueError: the text is malformed.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]iB|B|)\s*", text, re.IGNORECASE)
    powers = {unit.lower(): power for unit, power in _UNITS} | {"": 0}
    if not found or ("." in found[1] and found[2].lower() in ("", "b")):
        raise ValueError(f'size = "{text}": must be a number of bytes, or of KiB, MiB, GiB or TiB, as in 512MiB')
    return round(float(found[1]) * 2 ** powers[found[2].lower()]) if "." in found[1] else int(found[1]) << powers[found[2].lower()]
