"""Pictures of what is lost: over the share of the layers that streams, and with each layer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lt_gguf.report.plots import FULL_COLOUR, STREAMING_COLOUR, layer_figure, new_figure
from lt_gguf.report.report import Report
from lt_gguf.selection.evidence import Candidate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_CTX = 32_768  # tokens at which memory is shown
_STYLES = (("o-", STREAMING_COLOUR), ("s--", "#D55E00"), ("^:", "#009E73"), ("d-.", "#CC79A7"))  # Okabe and Ito's


def pictures_of_loss(report: Report) -> bool:
    """Whether the report has what the pictures show: sets of several sizes, and each layer alone."""
    return bool(_lines(report)) and bool(_alone(report))


def loss_curve(report: Report) -> Figure:
    """What is lost over the share of the layers that stream, one line a strategy, with 95 % intervals; the choice is marked."""
    n_layer = report.spec.n_layer
    figure, axes = new_figure(f"What {report.model} loses when layers stream", _measured_on(report, judging=True))
    for (name, candidates), (style, colour) in zip(_lines(report).items(), _STYLES):
        shares = [len(candidate.layers) / n_layer for candidate in candidates]
        losses = [candidate.evidence.loss for candidate in candidates]
        axes.plot(shares, [loss.value for loss in losses], style, color=colour, markersize=5, label=name)
        low, high = ([max(-0.1, min(1.0, getattr(loss, end))) for loss in losses] for end in ("low", "high"))
        axes.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
    share = len(report.spec.layers) / n_layer
    axes.axvline(share, color="#444444", linewidth=1, linestyle=":")
    # on the side where there is room
    side, shift = ("right", -4) if share > 0.6 else ("left", 4)
    chosen = f"chosen: {len(report.spec.layers)} of {n_layer}"
    axes.annotate(chosen, (share, 1), (shift, -4), textcoords="offset points", ha=side, va="top", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.1, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("layers that stream")
    axes.set_ylabel("lost of what the full model finds")
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    kept = (report.spec.sink + report.spec.window) / N_CTX

    def to_memory(share: Any) -> Any:
        return 1 - share * (1 - kept)

    def to_share(memory: Any) -> Any:
        return (1 - memory) / (1 - kept)

    memory = axes.secondary_xaxis(-0.24, functions=(to_memory, to_share))
    memory.xaxis.set_major_formatter("{x:.0%}")
    memory.set_xlabel(f"KV cache at {N_CTX:,} tokens, of the full model's")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.92), frameon=False, fontsize=9)
    return figure


def loss_strip(report: Report) -> Figure:
    """What is lost with each layer alone, in nats, above its lazy ratio if that has been measured."""
    alone = _alone(report)
    figure, axes = layer_figure(report.spec.n_layer, f"Each layer of {report.model} alone", _measured_on(report, judging=False))
    for candidate in alone:
        (il,) = candidate.layers
        streams = report.spec.is_streaming(il)
        style: dict[str, Any] = (
            {"color": STREAMING_COLOUR, "hatch": "///", "edgecolor": "white"}
            if streams
            else {"color": FULL_COLOUR, "edgecolor": "#888888"}
        )
        axes.bar(il, max(candidate.evidence.kl, 1e-5), width=0.8, linewidth=0.6, **style)
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence, nats")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    ratios = report.mean_ratios
    if ratios is not None:
        beside = axes.twinx()
        beside.plot(range(len(ratios)), ratios, "D", color="#D55E00", markersize=4, label="lazy ratio")
        beside.set_ylim(0, 1.02)
        beside.set_ylabel("lazy ratio (diamonds)")
        beside.spines["top"].set_visible(False)
    return figure


def _lines(report: Report) -> dict[str, list[Candidate]]:
    """The candidates that are called `STRATEGY, SIZE`, by strategy, by size."""
    lines: dict[str, list[Candidate]] = {}
    for candidate in report.selection.candidates:
        strategy, comma, size = candidate.name.partition(", ")
        if comma and size.isdigit() and candidate.evidence.known:
            lines.setdefault(strategy, []).append(candidate)
    return {name: sorted(found, key=lambda each: len(each.layers)) for name, found in lines.items() if len(found) > 1}


def _alone(report: Report) -> list[Candidate]:
    return [
        candidate for candidate in report.selection.candidates if candidate.name.startswith("layer ") and len(candidate.layers) == 1
    ]


def _measured_on(report: Report, judging: bool) -> str:
    found = report.selection.measurement
    if found is None:
        return ""
    if judging:
        asked = f"conversations: {found.judged}"
    else:
        asked = f"{found.conversations} conversations of {found.lengths[0]:,} tokens"
    return f"sink {report.spec.sink}, window {report.spec.window}; {asked}"
