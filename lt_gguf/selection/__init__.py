"""Strategies that choose the layers that stream: one file each, all with the interface of `base.Strategy`.

To add one: a file with a subclass of `Strategy` that has a `name` and `choose(request) -> Selection`, and its class in
`_STRATEGIES`. A strategy gets the facts of the model, the lazy ratios if it sets `needs_ratios`, and if it sets `measures_hybrid`
something that runs any set of layers and says how far that is from the full model (`evidence.Candidates`).
"""

from __future__ import annotations

from lt_gguf.selection.base import Model, Request, Selection, Strategy, fit_ratios, parse_share
from lt_gguf.selection.best import Auto
from lt_gguf.selection.frequency import Frequency
from lt_gguf.selection.interleave import InterleaveEven, InterleaveOdd
from lt_gguf.selection.kl import Kl, KlGreedy
from lt_gguf.selection.lazy_ratio import LazyRatio, laziest
from lt_gguf.selection.loss import Loss
from lt_gguf.selection.manual import Manual
from lt_gguf.selection.preset import PRESETS, Preset
from lt_gguf.selection.threshold import Threshold
from lt_gguf.selection.tolerance import DEFAULT_MAX_KL, DEFAULT_MAX_LOSS
from lt_gguf.selection.trained import Trained

__all__ = [
    "DEFAULT_MAX_KL",
    "DEFAULT_MAX_LOSS",
    "DEFAULT_STRATEGY",
    "LazyRatio",
    "Model",
    "Request",
    "Selection",
    "Strategy",
    "asked_strategy",
    "fit_ratios",
    "laziest",
    "parse_share",
    "strategies",
    "strategy",
]

_STRATEGIES: dict[str, type[Strategy]] = {
    each.name: each
    for each in (Loss, LazyRatio, Frequency, Threshold, InterleaveOdd, InterleaveEven, Kl, KlGreedy, Auto, Manual, Preset, Trained)
}
DEFAULT_STRATEGY = Loss.name


def strategies() -> tuple[str, ...]:
    """The names that `strategy` takes."""
    return (*_STRATEGIES, *(f"{Preset.name}:{name}" for name in PRESETS))


def strategy(name: str) -> Strategy:
    """The strategy of that name; `preset` alone recognises the checkpoint, `preset:NAME` takes that one.

    Raises:
        ValueError: there is none; the message lists them.
    """
    kind, colon, preset = name.partition(":")
    if colon and kind == Preset.name and preset in PRESETS:
        return Preset(preset)
    if colon or kind not in _STRATEGIES:
        raise ValueError(f'selection = "{name}": must be one of {", ".join(strategies())}')
    return _STRATEGIES[kind]()


def asked_strategy(name: str | None, layers: str | None, threshold: float | None) -> Strategy:
    """The strategy of that name; without one, what the other options are for.

    Raises:
        ValueError: there is none of that name, or the options don't go with it.
    """
    if name is None:
        name = Manual.name if layers is not None else Threshold.name if threshold is not None else DEFAULT_STRATEGY
    chosen = strategy(name)
    chosen.check_options(layers, threshold)
    return chosen
