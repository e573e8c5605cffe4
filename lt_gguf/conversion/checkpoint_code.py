"""Python code that a checkpoint brings along isn't run unless somebody asks for it, whatever upstream's converter asks for.

Upstream loads the tokenizers of several families with `trust_remote_code=True`, and a checkpoint says itself of which family it
is. So a folder that somebody else has made could run anything, with `--dry-run` too.
"""

from __future__ import annotations

from typing import Any, NoReturn


def forbid() -> None:
    """From here on, transformers runs no code of a checkpoint in this process. To be called before it has loaded a model's parts.

    What asks for such code gets transformers' own class instead; where there is none, it fails with a ValueError of one line.
    """
    from transformers import dynamic_module_utils

    # note: the parts of transformers take these two from there when they are imported
    dynamic_module_utils.resolve_trust_remote_code = _resolve
    # the one place that all such code passes on its way to run, whoever asks for it
    dynamic_module_utils.get_class_in_module = _refuse


def _resolve(trust_remote_code: Any, model_name: Any, has_local_code: bool, has_remote_code: bool, *_: Any, **__: Any) -> bool:
    """In place of transformers' function of that name, which says whether the checkpoint's code is taken."""
    if has_remote_code and not has_local_code:
        _refuse()
    return False


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("brings Python code of its own, which isn't run: --trust-remote-code runs it, if you trust whoever wrote it")
