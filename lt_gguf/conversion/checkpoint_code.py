"""Python code that a checkpoint brings along isn't run unless somebody asks for it, whatever upstream's converter asks for.

Upstream loads the tokenizers of several families with `trust_remote_code=True`, and a checkpoint says itself of which family it
is. So a folder that somebody else has made could run anything, with `--dry-run` too.
"""

from __future__ import annotations

from typing import Any, NoReturn


def forbid() -> None:
    """From here on, transformers runs no code of a checkpoint in this process.

    What asks for it fails with a ValueError of one line, if transformers has no class of its own to use instead.
    """
    import transformers
    from transformers import dynamic_module_utils

    for auto_class in (transformers.AutoConfig, transformers.AutoTokenizer):
        auto_class.from_pretrained = _without_code(auto_class.from_pretrained)  # type: ignore[method-assign]
    # note: the one place that all such code passes on its way to run, should something else ask for it
    dynamic_module_utils.get_class_in_module = _refuse


def _without_code(from_pretrained: Any) -> Any:
    def load(*arguments: Any, **settings: Any) -> Any:
        try:
            return from_pretrained(*arguments, **(settings | {"trust_remote_code": False}))
        except ValueError as error:
            if "trust_remote_code" in str(error):
                _refuse()
            raise

    return load


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("brings Python code of its own, which isn't run: --trust-remote-code runs it, if you trust whoever wrote it")
