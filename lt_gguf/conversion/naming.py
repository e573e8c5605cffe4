"""What the files of a conversion are called."""

from __future__ import annotations

import re

_PART = r"-\d{5}-of-\d{5}"


def fill(name: str, weights: str) -> str:
    """Upstream's `fill_templated_filename`: the type of the weights for {ftype}, {outtype} or {}, {FTYPE} in capitals.

    Raises:
        ValueError: there are braces in the name, and none of these.
    """
    lower, upper = weights.lower(), weights.upper()
    try:
        return name.format(lower, ftype=lower, outtype=lower, FTYPE=upper, OUTTYPE=upper)
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"{name}: a name with braces must have {{ftype}} in them, the type of the weights") from None


def with_type(name: str, weights: str) -> str:
    """What a file that upstream has named is called once its weights are quantized: as before, with their type."""
    return re.sub(rf"(?:-(?:F32|F16|BF16))?(?=(?:{_PART})?[.]gguf$)", f"-{weights}", name, count=1)


def whole(name: str) -> str:
    """The name of a model that isn't split, for that of a file of one that is."""
    return re.sub(rf"{_PART}(?=[.]gguf$)", "", name)
