"""Lazy ratios of a Hugging Face checkpoint, and the tokenizer that its calibration samples are cut with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from lt_gguf.checkpoint.checks import check, read_config
from lt_gguf.checkpoint.weights import has_bad_values, weight_files
from lt_gguf.hf.analysis_state import AnalysisState, locked
from lt_gguf.hf.decoder import find_layers, without_progress_bar
from lt_gguf.hf.lazy_ratio import IMPLEMENTATION, Measure, measuring
from lt_gguf.models.package import user_cache

__all__ = ["Progress", "check", "load_tokenizer", "measure"]

Progress = Callable[[str, int, int], None]  # what is being done ("layer 3 of 32"), steps done, steps of the whole analysis

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

VERSION = 1  # raised when the same settings would give other ratios


def measure(
    checkpoint: Path,
    samples: Sequence[Sequence[int]],
    *,
    sink: int,
    window: int,
    w_last: int,
    device: str = "auto",
    dtype: str = "auto",
    layer_by_layer: bool = True,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The lazy ratio of every layer for every sample, read with full attention.

    Args:
        checkpoint: folder with config and weights, safetensors or PyTorch's, in one file or several.
        samples: token ids of each prompt.
        sink, window, w_last: see `lazy_ratio.Measure`.
        device: as torch names it; auto: an Nvidia GPU, else Apple's, else the CPU.
        dtype: float32, bfloat16, float16 or float64; auto: see `choose_dtype`.
        layer_by_layer: one layer's weights in memory at a time. Otherwise the whole model, which has to fit.
        work_dir: where a layer-by-layer analysis keeps what it needs to go on after an interruption; by default in the
            user's cache folder, under a name that is the same for the same analysis. A finished one leaves its ratios there,
            a few kilobytes, and isn't done again.
        progress: called before each sample of each layer, and at the end.

    Returns:
        float64 (len(samples), n_layer), each in [0, 1]

    Raises:
        ValueError: `check` refuses the checkpoint, a setting is out of range, weights are missing or hold NaN, ...
        OSError: a file can't be read or written.
    """
    checkpoint = Path(checkpoint)
    config = read_config(checkpoint)
    prompts = [[int(token) for token in sample] for sample in samples]
    _check_settings(config, prompts, sink, window, w_last)
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, config, torch_device)
    report = progress or (lambda *_: None)
    run = partial(Measure, sink, window, w_last)
    if not layer_by_layer:
        return _measure_whole(checkpoint, prompts, run(), torch_device, torch_dtype, report)
    fingerprint = _fingerprint(checkpoint, prompts, [sink, window, w_last, torch_device.type, str(torch_dtype)])
    folder = Path(work_dir) if work_dir is not None else user_cache() / "analysis" / fingerprint[:16]
    with locked(folder):
        n_layer = config.get_text_config(decoder=True).num_hidden_layers
        state = AnalysisState(folder, fingerprint, len(prompts), n_layer)
        if not state.is_finished:
            _measure_layers(checkpoint, config, prompts, run(), state, torch_device, torch_dtype, report)
    return state.ratios


def _measure_layers(
    checkpoint: Path,
    config: PretrainedConfig,
    samples: list[list[int]],
    what: Measure,
    state: AnalysisState,
    device: torch.device,
    dtype: torch.dtype,
    report: Progress,
) -> None:
    """Takes `state` from the layer where it is to the last one."""
    from lt_gguf.hf.layer_by_layer import LayerByLayer

    model = LayerByLayer(checkpoint, config, device, dtype)
    n_step = model.n_layer * len(samples)
    if not state.is_embedded:
        report("embedding", 0, n_step)
        for sample, hidden in enumerate(model.embed(samples)):
            _check_hidden(hidden, checkpoint, "the input embedding", sample)
            state.set_hidden(sample, hidden)
        state.embedding_done()
    while not state.is_finished:
        layer = state.n_done
        doing = f"layer {layer} of {model.n_layer}"
        report(doing, layer * len(samples), n_step)
        model.load(layer)
        for sample in range(len(samples)):
            report(doing, layer * len(samples) + sample, n_step)
            with measuring(what):
                hidden = model.run(layer, state.hidden(sample).to(device))
            state.ratios[sample, layer] = what.take(layer)
            _check_hidden(hidden, checkpoint, f"layer {layer}", sample)
            state.set_hidden(sample, hidden)
        model.drop(layer)
        state.layer_done()
    report(f"{model.n_layer} layers", n_step, n_step)


def _measure_whole(
    checkpoint: Path,
    samples: list[list[int]],
    what: Measure,
    device: torch.device,
    dtype: torch.dtype,
    report: Progress,
) -> np.ndarray:
    report("weights", 0, 1)
    settings = {"dtype": dtype, "attn_implementation": IMPLEMENTATION, "local_files_only": True, "trust_remote_code": False}
    with without_progress_bar():
        # note: a pair, as its info is asked for; transformers' types know of the model alone
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            checkpoint, output_loading_info=True, **settings
        )
    model, info = loaded
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{checkpoint}: {name} is missing in the checkpoint's files")
    for name, parameter in model.named_parameters():
        if has_bad_values(parameter):
            raise ValueError(f"{checkpoint}: {name} has NaN or infinite values, must be finite: the checkpoint is damaged")
    decoder, layers = find_layers(model.to(device).eval())  # type: ignore[arg-type]  # a wrapper whose types take no self
    ratios = np.full((len(samples), len(layers)), np.nan)
    sample = 0

    def before(layer: int, *_: Any) -> None:
        report(f"sample {sample} of {len(samples)}, layer {layer}", sample * len(layers) + layer, ratios.size)

    def after(layer: int, _module: Any, _arguments: Any, output: Any) -> None:
        ratios[sample, layer] = what.take(layer)
        _check_hidden(output if isinstance(output, torch.Tensor) else output[0], checkpoint, f"layer {layer}", sample)

    for layer, module in enumerate(layers):
        module.register_forward_pre_hook(partial(before, layer))
        module.register_forward_hook(partial(after, layer))
    with torch.no_grad(), measuring(what):
        for sample, tokens in enumerate(samples):  # noqa: B007 (the hooks read it)
            decoder(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    report(f"{len(layers)} layers", ratios.size, ratios.size)
    return ratios


def load_tokenizer(checkpoint: Path) -> tuple[Callable[[str], list[int]], list[int]]:
    """The checkpoint's tokenizer, which adds no special tokens, and the tokens that begin a prompt (BOS or none).

    Raises:
        ValueError: the checkpoint has no tokenizer that transformers can read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # note: transformers raises anything here
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{checkpoint}: has no tokenizer that transformers can read: {why}") from None

    def tokenize(text: str) -> list[int]:
        # note: verbose: else it warns of texts longer than the model's context, which calibration texts are
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    plain, prompt = tokenize("a"), list(tokenizer.encode("a"))
    begin = next((i for i in range(len(prompt)) if prompt[i : i + len(plain)] == plain), 0)
    return tokenize, prompt[:begin]


def choose_device(name: str) -> torch.device:
    """Raises ValueError if torch doesn't know the device or doesn't have it."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: torch doesn't know it, use auto, cpu, cuda, cuda:1, mps, ...") from None
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (device.type == "mps" and not has_mps)
    if missing:
        raise ValueError(f"device {name!r}: torch finds none on this machine, use auto or cpu")
    return device


def choose_dtype(name: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's own; on a CPU float32 in place of float16, and of bfloat16 where the CPU has no instructions for it.

    Of 512x2048 by 2048x4096 on one core of a CPU that has them: 249 GFLOP/s in bfloat16, 47 in float32, 16 in float16; on one
    that hasn't, bfloat16 is emulated and slower than float32. It is asked for, not timed, so that an analysis that goes on
    after an interruption computes as before.

    Raises ValueError if there is no such dtype.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r}: must be one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    slow = [] if device.type != "cpu" else [torch.float16] if _has_bfloat16() else [torch.float16, torch.bfloat16]
    return own if own is not None and own in DTYPES.values() and own not in slow else torch.float32


def _has_bfloat16() -> bool:
    """True if this CPU multiplies bfloat16 matrices in hardware, as far as torch can tell."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _check_settings(config: PretrainedConfig, samples: list[list[int]], sink: int, window: int, w_last: int) -> None:
    for name, value, least in (("sink", sink, 0), ("window", window, 1), ("w_last", w_last, 1)):
        if value < least:
            raise ValueError(f"{name} = {value}: must be at least {least}")
    if not samples or not all(samples):
        raise ValueError("samples: must be one or more, of at least one token each")
    n_vocab = config.get_text_config(decoder=True).vocab_size
    for i, sample in enumerate(samples):
        if not 0 <= min(sample) <= max(sample) < n_vocab:
            wrong = min(sample) if min(sample) < 0 else max(sample)
            raise ValueError(f"sample {i}: has the token {wrong}, the model's tokens are 0 to {n_vocab - 1}")


def _check_hidden(hidden: torch.Tensor, checkpoint: Path, where: str, sample: int) -> None:
    if has_bad_values(hidden):
        raise ValueError(
            f"{checkpoint}: the hidden states that come out of {where} have NaN or infinite values (sample {sample}): try "
            "--dtype float32, or the checkpoint is damaged"
        )


def _fingerprint(checkpoint: Path, samples: list[list[int]], settings: list[Any]) -> str:
    """Of all that the ratios depend on. Files count by name, size and time: reading a big checkpoint takes minutes."""
    files = [checkpoint / "config.json", *weight_files(checkpoint)]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    versions = [VERSION, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps([stats, samples, settings, versions]).encode()).hexdigest()
