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
        """Whether a set loses no more: of what the full model finds, where it finds enough to say so, and in nats."""
        if evidence.kl > self.max_kl:
            return False
        # note: also at the length at which it loses most
        losses = [evidence.of_length(length).loss.value for length in evidence.lengths]
        return not evidence.is_informed or max(losses) <= self.max_loss

    def warning(self, evidence: Evidence, n: int, within: int | None = None) -> str | None:
        """What somebody has to know whose `n` streaming layers lose more; `None`: they don't.

        Args:
            within: how many layers would be within the tolerance, if that is known.
        """
        if (within is not None and n <= within) or self.allows(evidence):
            return None
        lost = f"{evidence.loss.value:.1%} of what the full model finds" if evidence.is_informed else f"{evidence.kl:.2g} nats"
        text = f"{n} streaming layers lose {lost} (KL {evidence.kl:.2g} nats); "
        if within is None:
            return text + f"tolerated are {self}: --select loss says how many layers are within that"
        return text + f"within the tolerance ({self}) are up to {within} layers"
