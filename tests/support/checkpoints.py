"""Checkpoints of the oracle's families: saved in Hugging Face format, then through upstream's converter to GGUF."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator

from support.families import N_VOCAB, Family


def save_gguf(model, family: Family, directory: Path, outtype: str = "f32") -> Path:
    """Saves the transformers `model` under `directory` and converts it with upstream's converter.

    Returns the path of the GGUF file.
    """
    checkpoint = directory / "hf"
    model.save_pretrained(checkpoint)
    out = directory / f"model-{outtype}.gguf"
    with converter_for(family, checkpoint) as model_class:
        convert(model_class, checkpoint, out, outtype)
    return out


def convert(model_class: type, checkpoint: Path, outfile: Path, outtype: str) -> None:
    import torch
    from conversion.base import gguf  # upstream's own: the released one of the same version lacks names that it uses

    file_types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    with torch.inference_mode():
        model_class(checkpoint, file_types[outtype], outfile).write()


@contextlib.contextmanager
def converter_for(family: Family, checkpoint: Path) -> Iterator[type]:
    """The converter's class for `checkpoint`, changed inside the with block to what a random model needs.

    It writes a SentencePiece-like vocabulary of bytes, whatever the family: the oracle compares logits by token id,
    and a random model has no tokenizer. It finds the family's `hparams` in the configuration.
    """
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    load_hparams = ModelBase.load_hparams
    model_class = get_model_class(get_model_architecture(load_hparams(checkpoint, False), ModelType.TEXT))
    own_set_vocab = vars(model_class).get("set_vocab")
    ModelBase.load_hparams = staticmethod(lambda *a, **k: load_hparams(*a, **k) | family.hparams)
    model_class.set_vocab = set_byte_vocabulary
    try:
        yield model_class
    finally:
        ModelBase.load_hparams = staticmethod(load_hparams)
        if own_set_vocab is None:
            del model_class.set_vocab
        else:
            model_class.set_vocab = own_set_vocab


def set_byte_vocabulary(converter) -> None:
    """A method for the converter's classes: `N_VOCAB` tokens, of them every byte, enough for tools that take text."""
    from conversion.base import SentencePieceTokenTypes as Kind

    vocabulary = [("<unk>", Kind.UNKNOWN), ("<s>", Kind.CONTROL), ("</s>", Kind.CONTROL)]
    vocabulary += [(f"<0x{byte:02X}>", Kind.BYTE) for byte in range(256)]
    vocabulary += [(f"word{i}", Kind.NORMAL) for i in range(N_VOCAB - len(vocabulary))]
    tokens, kinds = zip(*vocabulary)
    writer = converter.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * N_VOCAB)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
