"""The process that converts the oracle's checkpoints with upstream's converter.

A process of its own, because upstream's code needs the gguf-py of the pinned source, which has the name of PyPI's `gguf`
that the tests' own process uses; one for all checkpoints, because importing torch and transformers takes seconds.

    python convert_worker.py UPSTREAM    requests on stdin, a line of JSON each; on stdout a line for each, empty or the error
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path


def convert(checkpoint: str, outfile: str, outtype: str, hparams: dict) -> None:
    """Converts `checkpoint`; `hparams` is added to what its config.json says."""
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import gguf

    file_types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
    load_hparams = ModelBase.load_hparams
    model_class = get_model_class(get_model_architecture(load_hparams(Path(checkpoint), False), ModelType.TEXT))
    changes = {"set_vocab": set_byte_vocabulary, "model_arch": model_class.model_arch}
    oracle_class = type(model_class.__name__, (model_class,), changes)
    if model_class.__name__ in ("Gemma3Model", "Gemma4Model"):
        write_word_list(Path(checkpoint))
    ModelBase.load_hparams = staticmethod(lambda *args, **kwargs: load_hparams(*args, **kwargs) | hparams)
    try:
        with torch.inference_mode():
            oracle_class(Path(checkpoint), file_types[outtype], Path(outfile)).write()
    finally:
        ModelBase.load_hparams = staticmethod(load_hparams)


def set_byte_vocabulary(converter) -> None:
    """Instead of a family's own vocabulary: a SentencePiece-like one of bytes, enough for tools that take text.

    The oracle compares logits by token id, and a random model has no tokenizer.
    """
    from conversion.base import SentencePieceTokenTypes as Kind

    n_vocab = converter.hparams["vocab_size"]
    vocabulary = [("<unk>", Kind.UNKNOWN), ("<s>", Kind.CONTROL), ("</s>", Kind.CONTROL)]
    vocabulary += [(f"<0x{byte:02X}>", Kind.BYTE) for byte in range(256)]
    vocabulary += [(f"word{i}", Kind.NORMAL) for i in range(n_vocab - len(vocabulary))]
    tokens, kinds = zip(*vocabulary)
    writer = converter.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * n_vocab)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_word_list(checkpoint: Path) -> None:
    """What the converter of Gemma 3 and 4 counts, to leave out embeddings that no word has: as many as there are or more."""
    n_vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    words = {"model": {"vocab": [""] * n_vocab}, "added_tokens": []}
    (checkpoint / "tokenizer.json").write_text(json.dumps(words))


def main(upstream: Path) -> None:
    sys.path[:0] = [str(upstream), str(upstream / "gguf-py")]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # what upstream prints must not get among them
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.ERROR)
    for line in sys.stdin:
        try:
            convert(**json.loads(line))
            error = ""
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}".replace("\n", " ")
        print(error, file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
