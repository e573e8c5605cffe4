from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from support.oracle import Subject

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> Callable[..., Subject]:
    """The random model of a family, built and converted once a session: `subject("llama", n_layer=4)`."""
    built: dict[tuple[str, int], Subject] = {}

    def get(family: str, n_layer: int = 4) -> Subject:
        if (family, n_layer) not in built:
            built[family, n_layer] = Subject.build(family, n_layer, tmp_path_factory.mktemp(family))
        return built[family, n_layer]

    return get


@pytest.fixture
def measured(request) -> Callable[..., None]:
    """Records a difference for scripts/checks/oracle_report.py and asserts that it is within its bound."""

    def record(family: str, setting: str, difference: float, bound: float, **details) -> None:
        if path := request.config.getoption("--measurements"):
            row = dict(family=family, setting=setting, difference=difference, bound=bound, **details)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        assert difference <= bound, f"{family}, {setting}: logits differ by {difference:.2e}, allowed are {bound:.2e}"

    return record
