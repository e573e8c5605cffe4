"""A checkpoint that brings Python code along: it isn't run, unless it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_checkpoint import write_checkpoint

from lt_gguf.conversion import convert
from lt_gguf.conversion.upstream import ConversionError

# A tokenizer's class that upstream loads with trust_remote_code=True, in whatever model it is.
TOKENIZER = "HybridDNATokenizer"
CODE = f"""
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({{trace!r}}).write_text("run")

class {TOKENIZER}(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """One whose code leaves a trace where it was run."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_checkpoint(tmp_path / "model")
    (folder / "tokenization.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    said = {"tokenizer_class": TOKENIZER, "auto_map": {"AutoTokenizer": ["tokenization." + TOKENIZER] * 2}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dry_run", [False, True])
def test_its_code_is_not_run(checkpoint, tmp_path, dry_run):
    with pytest.raises(ConversionError, match="brings Python code of its own, which isn't run: --trust-remote-code runs it"):
        convert(checkpoint, tmp_path / "out.gguf", layers="1", dry_run=dry_run)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out.gguf").exists()


@pytest.mark.slow
def test_it_is_run_where_somebody_trusts_it(checkpoint, tmp_path):
    try:
        convert(checkpoint, tmp_path / "out.gguf", layers="1", dry_run=True, trust_remote_code=True)
    except ConversionError as error:  # the tiny model's vocabulary isn't one for that class
        assert "--trust-remote-code" not in str(error)
    assert (tmp_path / "trace").read_text() == "run"
