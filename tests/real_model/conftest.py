"""SmolLM2-135M-Instruct, through pip or from the user cache, with the layers that models/smollm2/report.json chose for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.questions import FACT

from lt_gguf import models
from lt_gguf.evaluation.stories import story_sentences
from lt_gguf.gguf.flagging import flag
from lt_gguf.report.report import Report

REPORT = Path(__file__).parents[2] / "models" / "smollm2" / "report.json"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real_model)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return models.resolve("smollm2")


@pytest.fixture(scope="session")
def report() -> Report:
    return Report.read(REPORT)


@pytest.fixture(scope="session")
def hybrid(smollm2, report, tmp_path_factory) -> Path:
    """The model as a hybrid, as `lt-gguf flag --from` writes it."""
    return flag(smollm2, tmp_path_factory.mktemp("smollm2") / "hybrid.gguf", report.spec, report.provenance)[0]


@pytest.fixture(scope="session")
def document() -> str:
    """Some 900 tokens of stories, with a fact at their beginning that no model can know."""
    rng = np.random.default_rng(3)
    sentences = [sentence for _ in range(30) for sentence in story_sentences(rng)]
    return " ".join([*sentences[:2], FACT, *sentences[2:100]])
