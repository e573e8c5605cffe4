"""The tasks of the evaluation: one file a kind, all with the interface of `base.Task`.

They are those of RULER (arXiv 2404.06654), generated here for any length and tokenizer. To add one: a file with a subclass of
`Task`, and an instance of it in `TASKS`.
"""

from __future__ import annotations

from lt_gguf.evaluation.tasks.base import Task
from lt_gguf.evaluation.tasks.needles import N_KEYS, N_QUERIES, Needles
from lt_gguf.evaluation.tasks.variable_tracking import VariableTracking
from lt_gguf.evaluation.tasks.votes import Votes

__all__ = ["TASKS", "Task", "find_task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Needles("single", n_keys=1),
        Needles("multi-key", n_keys=N_KEYS),
        Needles("multi-query", n_keys=N_KEYS, n_queries=N_QUERIES),
        VariableTracking(),
        Votes(),
    )
}


def find_task(name: str) -> Task:
    """The task of that name. Raises ValueError if there is none; the message lists them."""
    if name not in TASKS:
        raise ValueError(f'task "{name}": must be one of {", ".join(TASKS)}')
    return TASKS[name]
