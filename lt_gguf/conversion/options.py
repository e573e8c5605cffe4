"""What can be asked of a conversion: the fields of `Options` are keyword arguments in Python and options of the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lt_gguf.calibration import DEFAULT_FIELD, DEFAULT_LENGTH, DEFAULT_SAMPLES
from lt_gguf.evaluation.candidates import DEFAULT_QUESTIONS, check_questions
from lt_gguf.memory.sizes import parse_size
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.selection import DEFAULT_MAX_KL, DEFAULT_MAX_LOSS, Strategy, asked_strategy, parse_share, strategies
from lt_gguf.selection.base import SEARCH_HELP, SEARCHED_WINDOWS
from lt_gguf.selection.tolerance import Tolerance
from lt_gguf.selection.trained import Trained
from lt_gguf.spec import (
    DEFAULT_FRACTION,
    DEFAULT_PREFILL,
    DEFAULT_SINK,
    DEFAULT_W_LAST,
    DEFAULT_WINDOW,
    AutoSpec,
    CacheRecommendation,
    StreamingSpec,
    parse_layers,
)
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE
from lt_gguf.spec.in_config import KEY

OUTPUT_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")

_QUANTIZABLE = ("f32", "f16", "bf16", "auto")  # llama-quantize wants to see the weights as they were
_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS: how many there are is known when upstream has read the checkpoint

# Upstream's own options, which it gets as they are. Those that are left out: --vocab-only, --mmproj, --mtp, --dspark and
# --sentence-transformers-dense-modules write files that aren't a text model whose layers could stream; --target-model-dir is
# for draft models, which borrow another model's memory; --bigendian is for machines that our runtime isn't built for;
# --print-supported-models prints names of Python classes, and an unsupported one is refused by its name anyway.
_UPSTREAM_VALUES = ("outtype", "split_max_size", "split_max_tensors", "model_name", "metadata")
_UPSTREAM_FLAGS = (
    "no_tensor_first_split",
    "remote",
    "mistral_format",
    "disable_mistral_community_chat_template",
    "no_lazy",
    "use_temp_file",
    "no_mtp",
    "fuse_gate_up_exps",
    "fuse_qkv",
    "fp8_as_q8",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of `conversion.convert`; what each means is its help text."""

    outtype: Annotated[str, typer.Option(help=f"Type of the weights: {', '.join(OUTPUT_TYPES)}; auto: the checkpoint's own.")] = (
        "auto"
    )
    quantize: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Quantize in the same run: any type of llama-quantize, as in Q4_K_M.")
    ] = None
    imatrix: Annotated[Path | None, typer.Option(metavar="FILE", help="Importance matrix for --quantize.")] = None

    select: Annotated[
        str | None,
        typer.Option(metavar="STRATEGY", help=f"How the streaming layers are chosen: {', '.join(strategies())}."),
    ] = None
    fraction: Annotated[
        float | None,
        typer.Option(
            "--streaming-fraction",
            metavar="SHARE",
            help="Share of layers that stream; as many as lose no more than is tolerated by default, of other selections than loss "
            f"{DEFAULT_FRACTION}.",
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option("--streaming-layers", metavar="LAYERS", help="Layers that stream, as in 1,3,5-9, all or none (manual)."),
    ] = None
    threshold: Annotated[
        float | None, typer.Option(metavar="RATIO", help="Smallest lazy ratio of a streaming layer (threshold).")
    ] = None
    sink: Annotated[int, typer.Option(help="First positions that a streaming layer always sees.")] = DEFAULT_SINK
    window: Annotated[int, typer.Option(help="Last positions that a streaming layer sees.")] = DEFAULT_WINDOW
    search_window: Annotated[
        bool,
        typer.Option("--search-window", help=f"Try windows of {', '.join(map(str, SEARCHED_WINDOWS))}, too: {SEARCH_HELP} (loss)."),
    ] = False
    prefill: Annotated[str, typer.Option(help="How a prompt is read: stream, or full (full attention in all layers).")] = (
        DEFAULT_PREFILL
    )

    kv_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="As few streaming layers as let the KV cache of --ctx tokens fit in at its peak, as in 4GiB."
        ),
    ] = None
    ctx: Annotated[int | None, typer.Option("--ctx", "-c", metavar="TOKENS", help="Context size for --kv-budget.")] = None
    cache_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Type of the KV cache that the file recommends, and that --kv-budget counts with, as in q8_0, or q8_0/q4_0 for K and V; "
            f"it recommends none by default, and {DEFAULT_CACHE_TYPE} counts.",
        ),
    ] = None
    cache_keep: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="Layers whose KV cache stays in 16 bits, likewise: as in 0,2-3, all or none."),
    ] = None
    cache_breaks: Annotated[
        str | None,
        typer.Option(
            metavar="TYPES", help="Types of the KV cache that break the model, to warn of: as in q4_0,q8_0/q4_0, or none."
        ),
    ] = None

    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text or JSONL to measure on, like what the model will read; else built-in texts."),
    ] = None
    calibration_field: Annotated[
        str, typer.Option(metavar="NAME", help="Field of each line of a JSONL file: a text, or a list of messages.")
    ] = DEFAULT_FIELD
    samples: Annotated[int, typer.Option(help="Prompts that are cut out of the texts.")] = DEFAULT_SAMPLES
    calibration_length: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help=f"Length of each; {DEFAULT_LENGTH} by default, or the model's context if that is smaller."
        ),
    ] = None
    questions: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Conversations about long texts that the layers are chosen by, and twice as many that the choice is judged by, "
            "for selections that run the hybrid (loss, kl, kl-greedy, auto).",
        ),
    ] = DEFAULT_QUESTIONS
    max_loss: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            help="How much of what the full model finds may be lost, where no number of layers is asked for (loss).",
        ),
    ] = f"{DEFAULT_MAX_LOSS:.0%}"
    max_kl: Annotated[
        float, typer.Option(metavar="NATS", help="How far from the full model's its predictions may be (KL divergence), likewise.")
    ] = DEFAULT_MAX_KL
    w_last: Annotated[int, typer.Option(help="Last tokens of each sample whose attention is measured.")] = DEFAULT_W_LAST
    device: Annotated[str, typer.Option(help="Where to measure: auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads for selections that run the hybrid (loss, kl, kl-greedy, auto); 0: the physical cores that the process may "
            f"use, here {usable_cores()}."
        ),
    ] = 0
    dtype: Annotated[str, typer.Option(help="Type to measure in: auto, float32, bfloat16 or float16.")] = "auto"

    split_max_size: Annotated[
        str | None,
        typer.Option(metavar="N(K|M|G)", help="Split into files of at most this many bytes; with --quantize: before it."),
    ] = None
    split_max_tensors: Annotated[int | None, typer.Option(metavar="N", help="Split into files of at most N tensors.")] = None
    no_tensor_first_split: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="The first file of a split model holds no tensors.")
    ] = False
    model_name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the model.")] = None
    metadata: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file with general.* keys, such as the author.")] = None
    remote: Annotated[
        bool, typer.Option("--remote", help="Stream the weights from the hub; no lazy ratios can be measured then.")
    ] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code in the checkpoint's folder, which some tokenizers need.")
    ] = False
    mistral_format: Annotated[bool, typer.Option("--mistral-format", help="The checkpoint is in Mistral's own format.")] = False
    disable_mistral_community_chat_template: Annotated[
        bool, typer.Option("--disable-mistral-community-chat-template", help="Use mistral-common's tokenizer instead.")
    ] = False
    no_lazy: Annotated[bool, typer.Option("--no-lazy", help="Convert all weights before the first is written.")] = False
    use_temp_file: Annotated[bool, typer.Option("--use-temp-file", help="The same, but not in memory.")] = False
    no_mtp: Annotated[bool, typer.Option("--no-nextn", "--no-mtp", help="Leave out layers that only predict ahead.")] = False
    fuse_gate_up_exps: Annotated[bool, typer.Option("--fuse-gate-up-exps", help="One tensor for experts' gate and up.")] = False
    fuse_qkv: Annotated[bool, typer.Option("--fuse-qkv", help="One tensor for Q, K and V.")] = False
    fp8_as_q8: Annotated[bool, typer.Option("--fp8-as-q8", help="Write FP8 tensors as Q8_0.")] = False

    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write and measure nothing.")] = False
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the report and the model card; NAME-report beside the file by default."),
    ] = None
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log of upstream's converter.")] = False

    @property
    def strategy(self) -> Strategy:
        """Raises ValueError if there is none of the name `select`, or the other options don't go with it."""
        return asked_strategy(self.select, self.layers, self.threshold)

    def strategy_for(self, config: Mapping[str, Any]) -> Strategy:
        """`strategy`; where none is asked for, a checkpoint that was trained to stream has its own, which its config.json says.

        Raises:
            ValueError: as `strategy`, or a number of layers is asked for of such a checkpoint.
        """
        if KEY not in config or any(asked is not None for asked in (self.select, self.layers, self.threshold)):
            return self.strategy
        if self.fraction is not None:
            raise ValueError("the checkpoint was trained to stream in certain layers: must have --select with --streaming-fraction")
        return Trained()

    @property
    def share(self) -> float:
        return DEFAULT_FRACTION if self.fraction is None else self.fraction

    @property
    def windows(self) -> tuple[int, ...]:
        """Other windows to choose among."""
        return SEARCHED_WINDOWS if self.search_window else ()

    @property
    def tolerated_loss(self) -> float:
        """`max_loss` as a number. Raises ValueError if it isn't one."""
        return parse_share("--max-loss", self.max_loss)

    @property
    def budget(self) -> int | None:
        """`kv_budget` in bytes. Raises ValueError if it isn't a size."""
        if self.kv_budget is None:
            return None
        try:
            return parse_size(str(self.kv_budget))
        except ValueError as error:
            raise ValueError(f"--kv-budget: {error}") from None

    @property
    def kv_cache_type(self) -> str:
        return self.cache_type or DEFAULT_CACHE_TYPE

    def recommended(self, n_layer: int = _MOST_LAYERS, n_layer_main: int = _MOST_LAYERS) -> CacheRecommendation | None:
        """What a file of so many layers, the first ones of them in the main graph, recommends for the cache, `None`: nothing.

        Raises:
            ValueError: there is no such type or layer, or what is recommended breaks the model.
        """
        keep = None if self.cache_keep is None else self.kept_layers(n_layer_main)
        return CacheRecommendation.changed(None, n_layer, self.cache_type, keep, self.cache_breaks)

    def kept_layers(self, n_layer: int = _MOST_LAYERS) -> tuple[int, ...]:
        """`cache_keep` of a model of `n_layer` layers. Raises ValueError if it has no such layers."""
        return () if self.cache_keep is None else parse_layers(self.cache_keep, n_layer, "--cache-keep")

    @property
    def is_split(self) -> bool:
        return bool(self.split_max_tensors) or self.split_max_size not in (None, "0")

    def check(self) -> None:
        """Finds what is wrong before any work is done.

        Raises:
            ValueError: an option is out of range, or two don't go together.
        """
        if self.outtype not in OUTPUT_TYPES:
            raise ValueError(f'outtype = "{self.outtype}": must be one of {", ".join(OUTPUT_TYPES)}')
        AutoSpec(self.share, self.sink, self.window, self.w_last)
        StreamingSpec((), 1, self.sink, self.window, self.prefill)
        if self.samples < 1:
            raise ValueError(f"samples = {self.samples}: must be at least 1")
        if self.threads < 0:
            raise ValueError(f"threads = {self.threads}: must be at least 0")
        check_questions(self.questions)
        Tolerance(self.tolerated_loss, self.max_kl)
        self._check_selection()
        self._check_budget()
        self.recommended()
        if self.quantize is None and self.imatrix is not None:
            raise ValueError("--imatrix is for --quantize: give both or none")
        if self.quantize is not None and self.outtype not in _QUANTIZABLE:
            raise ValueError(f"outtype = {self.outtype}: must be one of {', '.join(_QUANTIZABLE)} with --quantize")
        if self.is_split and self.use_temp_file:
            raise ValueError("--use-temp-file: can't be used for a split model")
        if self.report is not None and self.no_report:
            raise ValueError("--report and --no-report: give one of them")

    def _check_selection(self) -> None:
        if self.layers is not None:
            parse_layers(self.layers, _MOST_LAYERS)
            if self.fraction is not None:
                raise ValueError(
                    "which layers stream: give either the layers, as in 1,3,5-9, or their fraction, as in 0.5, and not both"
                )
        chosen = self.strategy
        if self.search_window and not chosen.takes_tolerance:
            raise ValueError(f"selection {chosen.name}: takes no --search-window, only loss does")
        if self.fraction is not None and not chosen.counts:
            raise ValueError(f"selection {chosen.name}: decides itself how many layers stream, must not have --streaming-fraction")
        if chosen.needs_ratios and (self.remote or self.mistral_format):
            option, why = ("--remote", "streams the weights") if self.remote else ("--mistral-format", "is not transformers' own")
            raise ValueError(
                f"{option} {why}, so no lazy ratios can be measured: must have --select interleave-odd or "
                "--streaming-layers with it"
            )

    def _check_budget(self) -> None:
        if self.budget is None:
            if self.ctx is not None:
                raise ValueError("--ctx is for --kv-budget, which is missing")
            return
        if self.ctx is None:
            raise ValueError("--kv-budget needs --ctx, the number of tokens that the KV cache is to hold, as in 131072")
        if self.ctx < 1:
            raise ValueError(f"--ctx = {self.ctx}: must be at least 1")
        if self.fraction is not None:
            raise ValueError("--kv-budget chooses how many layers stream: must not have --streaming-fraction beside it")

    def upstream_arguments(self) -> list[str]:
        """The options that upstream's converter gets; not among them the checkpoint and --outfile."""
        arguments = []
        for name in _UPSTREAM_VALUES:
            if (value := getattr(self, name)) is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        return arguments + [f"--{name.replace('_', '-')}" for name in _UPSTREAM_FLAGS if getattr(self, name)]
