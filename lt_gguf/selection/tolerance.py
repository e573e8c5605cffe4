"""What may be lost: whether a set of layers keeps to it, and how it is said if not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lt_gguf.selection.evidence import Evidence

DEFAULT_MAX_LOSS = 0.01
DEFAULT_MAX_KL = 0.1  # nats


@dataclass(frozen=True)
class Tolerance:
    """What may be lost.

    Args:
        max_loss: share of what the full model finds, from 0 to 1.
        max_kl: largest KL divergence from the full model, in nats.

    Raises:
        ValueError: one is out of range.
    """

    max_loss: float = DEFAULT_MAX_LOSS
    max_kl: float = DEFAULT_MAX_KL

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss <= 1:
            raise ValueError(f"max loss = {self.max_loss}: must be a share from 0 to 1, as in 1% or 0.01")
        if not 0 <= self.max_kl < math.inf:
            raise ValueError(f"max KL = {self.max_kl}: must be a number of nats of at least 0, as in 0.1")

    def __str__(self) -> str:
        return f"{self.max_loss:.3g} of what it finds and {self.max_kl:.3g} nats"

    def allows(self, evidence: Evidence) -> bool:
        """Whether a set loses no more: of what the full model finds, where it finds enough to say so, and in nats.

        All conversations together lose no more, and those of each length aren't sure to: there may be few of a length, and of few one
        word is a large share.
        """
        if evidence.kl > self.max_kl:
            return False
        return not evidence.is_informed or (evidence.loss.value <= self.max_loss and not self._beyond(evidence))

    def _beyond(self, evidence: Evidence) -> list[int]:
        """The lengths whose conversations are sure to lose more."""
        return [length for length in evidence.lengths if evidence.of_length(length).loss.low > self.max_loss]

    def warning(self, evidence: Evidence, n: int, within: int | None = None) -> str | None:
        """What somebody has to know whose `n` streaming layers lose more; `None`: they don't.

        Args:
            within: how many layers would be within the tolerance, if that is known.
        """
        if (within is not None and n <= within) or self.allows(evidence):
            return None
        text = f"{n} streaming layers lose {self._lost(evidence)}; "
        if within is None:
            return text + f"tolerated are {self}: --select loss says how many layers are within that"
        return text + f"within the tolerance ({self}) are up to {within} layers"

    def _lost(self, evidence: Evidence) -> str:
        if not evidence.is_informed:
            return f"{evidence.kl:.2g} nats"
        text = f"{evidence.loss.value:.1%} of what the full model finds (KL {evidence.kl:.2g} nats)"
        if evidence.loss.value <= self.max_loss and (beyond := self._beyond(evidence)):
            loss = evidence.of_length(beyond[-1]).loss
            text += f", {loss.value:.1%} ({loss.low:.1%} to {loss.high:.1%}) at {beyond[-1]:,} tokens"
        return text
