"""Which checkpoints can be analysed, decided by their config before a weight is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers import __version__ as transformers_version

from lt_gguf.checkpoint.weights import weight_files

LEAST_TRANSFORMERS = (5, 16)  # before it, masks and the loading of weights were other

# layer types of a config that mean full attention; "attention" is what older configs say
FULL_ATTENTION = ("full_attention", "attention")

# Models whose layers with a sliding window keep it in llama.cpp, which ignores that of others. What may stream in them is the layers
# with full attention.
_WITH_WINDOWS = ("cohere2", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "olmo3")

# how the name of a class ends that was trained to do something else than to continue text
_OTHER_TASKS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForPreTraining", "ForMultipleChoice")


def read_config(checkpoint: Path) -> PretrainedConfig:
    """The config of a checkpoint that can be analysed.

    Raises:
        ValueError: it can't; one line says why.
        OSError: a file can't be read.
    """
    if tuple(int(part) for part in transformers_version.split(".")[:2]) < LEAST_TRANSFORMERS:
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        raise ValueError(f"transformers {transformers_version}: is too old to measure lazy ratios, must be {least} or later")
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint}: must be a folder with a Hugging Face checkpoint")
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(f"{checkpoint}: has no config.json, must be a Hugging Face checkpoint")
    config = _parse(path)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{path}: {config.model_type} has an encoder and a decoder, must be a causal (decoder-only) model")
    trained_for = (getattr(config, "architectures", None) or [""])[0]
    # note: encoders such as BERT can be made decoders, which their config then says
    encodes = getattr(config, "is_decoder", None) is False and trained_for.endswith("Model") and "LMHead" not in trained_for
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or trained_for.endswith(_OTHER_TASKS) or encodes:
        raise ValueError(f"{path}: {trained_for or config.model_type} isn't a causal language model")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path}: the checkpoint is quantized: lazy ratios are measured on one that isn't")
    _check_layers(path, config)
    weight_files(checkpoint)
    return config


def check(checkpoint: Path) -> None:
    """Raises what `read_config` raises."""
    read_config(Path(checkpoint))


def full_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """The layers of a checkpoint that have full attention."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or FULL_ATTENTION[:1] * text.num_hidden_layers
    return tuple(il for il, layer_type in enumerate(types) if layer_type in FULL_ATTENTION)


def _parse(path: Path) -> PretrainedConfig:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: isn't JSON ({error})") from None
    try:
        return AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # note: transformers raises anything here, up to KeyError
        why = _first_line(error)
        if isinstance(content, dict) and "auto_map" in content:
            why = "it comes with code of its own, which isn't run"
        model_type = content.get("model_type") if isinstance(content, dict) else None
        raise ValueError(f"{path}: transformers can't read the config of this {model_type or 'model'}: {why}") from None


def _check_layers(path: Path, config: PretrainedConfig) -> None:
    text = config.get_text_config(decoder=True)
    may_slide = text.model_type in _WITH_WINDOWS and bool(full_layers(config))
    for layer, layer_type in enumerate(getattr(text, "layer_types", None) or ()):
        if layer_type not in FULL_ATTENTION and not (may_slide and layer_type == "sliding_attention"):
            raise ValueError(
                f"{path}: layer {layer} of this {text.model_type} is a {layer_type} layer: only models with full attention "
                "in all layers can be made hybrid, and some with full attention in some layers and a sliding window in the others "
                f"({', '.join(_WITH_WINDOWS)})"
            )
    model_class = _class_of(config)
    if getattr(model_class, "_is_stateful", False):
        raise ValueError(
            f"{path}: {text.model_type} has recurrent layers: only models with attention in all layers can be made hybrid"
        )
    window = getattr(text, "sliding_window", None)
    uses_window = hasattr(sys.modules[model_class.__module__], "create_sliding_window_causal_mask")
    without_types = not getattr(text, "layer_types", None)
    # note: a window that no prompt can outgrow is written by some models that have none
    cuts = isinstance(window, int) and 0 < window < (getattr(text, "max_position_embeddings", None) or sys.maxsize)
    if uses_window and without_types and cuts and getattr(text, "use_sliding_window", True) is not False:
        raise ValueError(
            f"{path}: all layers of this {text.model_type} have a sliding window of {window}: only models with full attention "
            "can be made hybrid; if the model was trained without it, set sliding_window to null"
        )


def _class_of(config: PretrainedConfig) -> type[Any]:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
