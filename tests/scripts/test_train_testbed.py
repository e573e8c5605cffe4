"""A training of the testbed model that was interrupted comes to the same weights as one that wasn't."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "testbed"))

import testbed_model
from laziness_pressure import IMPLEMENTATION, NEAR, SINK, LazinessPressure


def train(folder: Path, *options: str) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "testbed" / "train_testbed.py"
    small = ["--batch-tokens", "512"]  # an eighth of what it is trained with
    command = [sys.executable, script, "--work-dir", folder, "--out", folder / "out", *small, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path):
    """A work folder with a tokenizer: training one takes longer than all else here."""

    def make(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        shutil.copy(ROOT / "models" / "demo" / "tokenizer.model", made)
        return made

    return make


@pytest.mark.slow
def test_an_interrupted_training_goes_on(folder):
    whole, parts = folder("whole"), folder("parts")
    for path, steps in ((whole, 2), (parts, 1), (parts, 2)):
        done = train(path, "--steps", str(steps))
        assert done.returncode == 0, done.stderr
        if steps == 1:  # interrupted after a line of the log, before the checkpoint
            line = json.loads((path / "log.jsonl").read_text().splitlines()[-1])
            (path / "log.jsonl").open("a").write(json.dumps({**line, "step": 2, "text": -1.0}) + "\n")
    weights = [torch.load(path / "checkpoint.pt", weights_only=True)["model"] for path in (whole, parts)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (whole, parts)]
    assert (
        logs[0][-1]["step"] == 2
        and [line["step"] for line in logs[1]] == [1, 2]
        and logs[1][-1]["text"] > 0
        and (whole / "training.png").exists()
    )
    model = AutoModelForCausalLM.from_pretrained(whole / "out")
    tokenizer = AutoTokenizer.from_pretrained(whole / "out")
    assert model.config.num_hidden_layers == 12 and tokenizer("Hello").input_ids[0] == model.config.bos_token_id
    assert "other arguments" in (refused := train(parts, "--steps", "2", "--seed", "7")).stderr and refused.returncode


def test_the_pressure_is_the_attention_that_goes_far():
    """Against plain softmax of the model's own attention, at the drawn queries."""
    torch.manual_seed(1)
    model = testbed_model.make_model(1, 2)
    ids = torch.randint(3, 1000, (2, NEAR + 40))
    pressure = LazinessPressure()
    model.set_attn_implementation(IMPLEMENTATION)
    pressure.begin(ids.shape[1], torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(ids).logits
    found = pressure.take()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(ids, output_attentions=True)
    assert (plain.logits - logits).abs().max() < 1e-3
    queries = torch.randint(NEAR, ids.shape[1], (16,), generator=torch.Generator().manual_seed(5))
    p = torch.arange(ids.shape[1])
    for layer, weights in enumerate(plain.attentions):
        far = [weights[:, :, q, (p >= SINK) & (p <= q - NEAR)].sum(-1).mean() for q in queries]
        assert abs(torch.stack(far).mean() - found[layer]) < 1e-5


def test_the_first_weights_look_things_up():
    """Layer 0 looks one to four positions back, and the matching layers at what followed the same tokens before."""
    torch.manual_seed(1)
    model = testbed_model.make_model(1, 2)
    model.set_attn_implementation("eager")
    half = torch.randint(3, 1500, (1, 40))
    ids = torch.cat([torch.tensor([[1]]), half, half], dim=1)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    rows = torch.arange(20, ids.shape[1])
    for head in range(4):
        assert attentions[0][0, head, rows, rows - head - 1].mean() > 0.5, head
    second = torch.arange(45, ids.shape[1])  # where the sequence comes again
    for layer in testbed_model.MATCHING_LAYERS:
        assert attentions[layer][0, :, second, second - 39].mean() > 3 / 60, layer
