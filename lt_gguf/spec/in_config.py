"""The streaming spec in a checkpoint's config.json: a checkpoint that was trained to stream says in which layers.

    "lt_streaming": {"version": 1, "layers": [1, 3], "sink": 4, "window": 1020, "prefill": "stream", "selection": "frequency"}

`lazy_ratio`, one number a layer, and `calibration`, an object, may be there too; they mean what they mean in a GGUF file.
transformers keeps what it doesn't know in a config, so such a checkpoint loads like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from lt_gguf.spec.provenance import Provenance
from lt_gguf.spec.streaming import StreamingSpec

KEY = "lt_streaming"
FORMAT_VERSION = 1


def write_spec(config: Any, spec: StreamingSpec, provenance: Provenance) -> None:
    """Puts a spec into a transformers config, which `save_pretrained` writes."""
    content: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "layers": list(spec.layers),
        "sink": spec.sink,
        "window": spec.window,
        "prefill": spec.prefill,
        "selection": provenance.selection,
    }
    if provenance.lazy_ratio is not None:
        content["lazy_ratio"] = list(provenance.lazy_ratio)
    if provenance.calibration is not None:
        content["calibration"] = json.loads(provenance.calibration)
    setattr(config, KEY, content)


def read_spec(config: Mapping[str, Any], n_layer: int) -> tuple[StreamingSpec, Provenance] | None:
    """The spec of a config.json and how its layers were chosen, `None` if it has none.

    Args:
        config: content of config.json.
        n_layer: number of layers of the model; those that only predict ahead may be left out of `lazy_ratio`.

    Raises:
        ValueError: it is wrong; one line that names the key, its value and what is allowed.
    """
    content = config.get(KEY)
    if content is None:
        return None
    if not isinstance(content, Mapping):
        _bad("", content, "an object")
    if content.get("version") != FORMAT_VERSION:
        _bad(".version", content.get("version"), str(FORMAT_VERSION))
    layers = content.get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer < n_layer for layer in layers):
        _bad(".layers", layers, f"a list of layers from 0 to {n_layer - 1}")
    for key in ("sink", "window"):
        if type(content.get(key)) is not int:
            _bad(f".{key}", content.get(key), "an integer")
    selection = content.get("selection")
    if not isinstance(selection, str) or not selection:
        _bad(".selection", selection, "the name of what chose the layers, as in frequency")
    prefill: Any = content.get("prefill")  # note: StreamingSpec says what is wrong with it
    try:
        spec = StreamingSpec(tuple(layers), n_layer, content["sink"], content["window"], prefill)
    except ValueError as error:
        raise ValueError(f"config.json: {KEY}.{error}") from None
    calibration = content.get("calibration")
    if calibration is not None and not isinstance(calibration, Mapping):
        _bad(".calibration", calibration, "an object that describes the texts")
    text = None if calibration is None else json.dumps(calibration)
    return spec, Provenance(selection, _read_ratios(content.get("lazy_ratio"), n_layer), text)


def _read_ratios(ratios: Any, n_layer: int) -> tuple[float, ...] | None:
    if ratios is None:
        return None
    if (
        not isinstance(ratios, list)
        or not 0 < len(ratios) <= n_layer
        or not all(type(ratio) in (int, float) and 0 <= ratio <= 1 for ratio in ratios)
    ):
        _bad(".lazy_ratio", ratios, f"a list of {n_layer} numbers from 0 to 1, one a layer")
    return (*map(float, ratios), *[math.nan] * (n_layer - len(ratios)))


def _bad(key: str, value: Any, allowed: str) -> NoReturn:
    text = json.dumps(value, default=str)
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise ValueError(f"config.json: {KEY}{key} = {shown}: must be {allowed}")
