"""The process that converts checkpoints twice: as upstream does, and as `lt_gguf.conversion.worker` does.

One process for all of them, because importing torch and transformers takes seconds. A random checkpoint has no tokenizer
that upstream would know, so both get a vocabulary of bytes.

    python convert_both.py UPSTREAM    requests on stdin, a line of JSON each: checkpoint, folder, arguments, metadata, and hparams
                                       to add to its config; on stdout a line for each, empty or the error.
                                       The files: upstream*.gguf and ours*.gguf in folder.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from convert_worker import set_byte_vocabulary  # beside this file

from lt_gguf.conversion import worker as conversion_worker


class Parent:
    """What the worker takes for its parent: answers with the metadata to add."""

    def __init__(self, hidden: Path, metadata: dict[str, Any]) -> None:
        self.hidden, self.metadata = hidden, metadata
        self.messages: list[dict[str, Any]] = []

    def send(self, **message: Any) -> None:
        self.messages.append(message)

    def answer(self) -> dict[str, Any]:
        return self.metadata


def convert(
    upstream: Path, checkpoint: str, folder: str, arguments: list[str], metadata: dict[str, Any], hparams: dict[str, Any]
) -> str:
    import gguf
    import gguf.utility
    import tqdm
    from conversion import ModelBase

    load_hparams = ModelBase.load_hparams
    patched = (gguf, "GGUFWriter"), (gguf.utility.LocalTensor, "mmap_bytes"), (tqdm, "tqdm")
    stock = [getattr(owner, name) for owner, name in patched]
    ModelBase.load_hparams = staticmethod(lambda *args, **kwargs: load_hparams(*args, **kwargs) | hparams)
    try:
        sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", f"{folder}/upstream.gguf", *arguments]
        runpy.run_path(str(upstream / "convert_hf_to_gguf.py"), run_name="__main__")
        arguments = [checkpoint, "--outfile", f"{folder}/ours.gguf", *arguments]
        request = {"upstream": str(upstream), "arguments": arguments, "verbose": False, "trust_remote_code": False}
        return conversion_worker._convert(request, Parent(Path(folder), metadata))
    finally:
        ModelBase.load_hparams = staticmethod(load_hparams)
        for (owner, name), value in zip(patched, stock):
            setattr(owner, name, value)


def use_byte_vocabulary() -> None:
    import conversion

    get_model_class = conversion.get_model_class

    def with_bytes(*args: Any, **kwargs: Any) -> type:
        model_class = get_model_class(*args, **kwargs)
        changes = {"set_vocab": set_byte_vocabulary, "model_arch": model_class.model_arch}
        return type(model_class.__name__, (model_class,), changes)

    conversion.get_model_class = with_bytes


def main(upstream: Path) -> None:
    sys.path[:0] = [str(upstream), str(upstream / "gguf-py")]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # what upstream prints must not get among them
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    use_byte_vocabulary()
    for line in sys.stdin:
        try:
            error = convert(upstream, **json.loads(line))
        except (Exception, SystemExit) as exception:
            error = f"{type(exception).__name__}: {exception}".replace("\n", " ")
        print(error, file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
