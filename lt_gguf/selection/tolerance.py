"""Whether a set of layers loses more than is tolerated, and how that is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lt_gguf.selection.evidence import Evidence

if TYPE_CHECKING:
    from lt_gguf.selection.base import Request


def is_within(request: Request, evidence: Evidence) -> bool:
    """Whether a set loses no more than is tolerated: of what the full model finds, where it finds enough to say so, and in nats."""
    if evidence.kl > request.max_kl:
        return False
    # note: also at the length at which it loses most
    losses = [evidence.of_length(length).loss.value for length in evidence.lengths]
    return not evidence.is_informed or max(losses) <= request.max_loss


def loss_warning(request: Request, evidence: Evidence, n: int, within: int | None = None) -> str | None:
    """What somebody has to know whose `n` streaming layers lose more than the model can spare; `None`: they don't.

    Args:
        within: how many layers would be within the tolerance, if that is known.
    """
    if (within is not None and n <= within) or is_within(request, evidence):
        return None
    lost = f"{evidence.loss.value:.1%} of what the full model finds" if evidence.is_informed else f"{evidence.kl:.2g} nats"
    tolerated = f"{request.max_loss:.3g} of what it finds and {request.max_kl:.3g} nats"
    text = f"{n} streaming layers lose {lost} (KL {evidence.kl:.2g} nats); "
    if within is None:
        return text + f"tolerated are {tolerated}: --select loss says how many layers are within that"
    return text + f"within the tolerance ({tolerated}) are up to {within} layers"
