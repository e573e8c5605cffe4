"""Small random checkpoints in Hugging Face format, with a SentencePiece tokenizer, and a hybrid GGUF file made of one."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import pytest

N_LAYER = 4
N_VOCAB = 320

_TEXT = [
    "the quick brown fox jumps over the lazy dog and runs away",
    "attention layers of a language model look at the first tokens and at the last ones",
    "a cache of keys and values grows with every token that is read",
    "zero one two three four five six seven eight nine ten",
]


def write_checkpoint(folder: Path, family: str = "llama", **config: object) -> Path:
    """Writes a random model of the family (`llama`, `qwen2`, `gemma2`, ...) and its tokenizer into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": N_VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | config))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_writer=model,
        vocab_size=N_VOCAB,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


SINK, WINDOW = 2, 40  # of the hybrid file, whose odd layers stream


@functools.cache
def make_hybrid(folder: Path) -> Path:
    from lt_gguf.conversion import convert

    checkpoint = folder / "tiny-llama"
    checkpoint.mkdir()
    write_checkpoint(checkpoint)
    options = {"outtype": "f32", "select": "interleave-odd", "sink": SINK, "window": WINDOW, "prefill": "stream"}
    return convert(checkpoint, folder / "tiny.gguf", **options).files[0]


@pytest.fixture(scope="session")
def hybrid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid Llama with random weights; modules that import this fixture share the file."""
    return make_hybrid(tmp_path_factory.getbasetemp())
