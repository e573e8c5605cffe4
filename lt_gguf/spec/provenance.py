"""How a file's streaming layers were chosen: `Provenance`, and the keys that say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lt_gguf.spec.keys import CALIBRATION_KEY, FORMAT_VERSION, LAZY_RATIO_KEY, SELECTION_KEY, VERSION_KEY, Typed


@dataclass(frozen=True)
class Provenance:
    """How the streaming layers of a file were chosen (the `lighttransfer.*` keys).

    Args:
        selection: the strategy, for example `manual` or `interleave`.
        lazy_ratio: one number in [0, 1] a layer, if it was measured.
        calibration: JSON that describes the texts it was measured on.
    """

    selection: str
    lazy_ratio: tuple[float, ...] | None = None
    calibration: str | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Typed]) -> Provenance | None:
        if SELECTION_KEY not in metadata:
            return None
        ratios = metadata.get(LAZY_RATIO_KEY)
        calibration = metadata.get(CALIBRATION_KEY)
        return cls(
            str(metadata[SELECTION_KEY].value),
            tuple(ratios.value) if ratios and ratios.type == "array of float32" and ratios.value is not None else None,
            str(calibration.value) if calibration else None,
        )

    def to_metadata(self) -> dict[str, Typed]:
        metadata = {VERSION_KEY: Typed("uint32", FORMAT_VERSION), SELECTION_KEY: Typed("string", self.selection)}
        if self.lazy_ratio is not None:
            metadata[LAZY_RATIO_KEY] = Typed("array of float32", list(self.lazy_ratio))
        if self.calibration is not None:
            metadata[CALIBRATION_KEY] = Typed("string", self.calibration)
        return metadata
