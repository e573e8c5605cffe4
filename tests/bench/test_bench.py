"""`lt-gguf bench`: what is timed is what was asked for, and what came of it is told as it was."""

from __future__ import annotations

import json
import math
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.small_gguf import write_small

from lt_gguf.bench import shapes
from lt_gguf.bench.contender import DECODE, PROMPT, THROUGHPUT, Contender, Job, ours
from lt_gguf.bench.measure import Failure, Measurement, Plan, largest_batch, make_job, measure, run_job
from lt_gguf.bench.peers import find_peers, stock_peers, torch_peers
from lt_gguf.bench.results import SPEED, Results, Spread
from lt_gguf.bench.tables import markdown, tables
from lt_gguf.gguf.file import read_model
from lt_gguf.spec import StreamingSpec

SPEC = "layers=1,3;sink=4;window=60"
PLAN = Plan((128, 256), (128,), 0, 2, 2, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return read_model(write_small(tmp_path_factory.mktemp("bench") / "small.gguf")[0])


@pytest.fixture
def hybrid(model):
    return StreamingSpec.parse(SPEC, model.n_layer)


@pytest.fixture
def results(model, hybrid):
    """Two contenders, two rounds, in which the machine was slower the second time."""
    contenders = ours([hybrid], ["f16"], True)
    results = Results(model, PLAN, contenders, "a machine")
    for i, (full, own) in enumerate([(10.0, 20.0), (5.0, 15.0)]):
        results.add(Measurement(contenders[0].name, DECODE, 256, i, {SPEED: full, "kv_bytes": 100}))
        results.add(Measurement(contenders[1].name, DECODE, 256, i, {SPEED: own, "kv_bytes": 50}))
    return results


def test_a_job_arrives_as_it_was_sent(hybrid):
    job = Job("a.gguf", ours([hybrid], ["q8_0"], True)[1], THROUGHPUT, (1, 2), 3, 4, 5, (6, 7))
    assert Job.from_json(job.to_json()) == job


def test_names_tell_contenders_apart(hybrid):
    specs = [hybrid, replace(hybrid, prefill="stream"), replace(hybrid, window=30), replace(hybrid, layers=(0, 1))]
    names = [c.name for c in ours(specs, ["f16", "q4_0"], True)]
    assert len(set(names)) == len(names) == 10
    assert [c.name for c in ours([hybrid], ["f16"], True)] == ["full, f16", "2 of 4 stream, f16"]


@pytest.mark.slow
def test_what_is_measured(model, hybrid):
    """Each contender in each task at each depth and round, and the memory that the formulas say."""
    contenders = [*ours([hybrid], ["f16", "q8_0"], True), *stock_peers(["f16"], 64)]
    said = []
    found = list(measure(model, contenders, replace(PLAN, kv_limit=1 << 20, repeats=1), lambda *step: said.append(step)))
    assert not [f for f in found if isinstance(f, Failure)]
    keys = {(m.contender, m.task, m.depth) for m in found}
    names = [c.name for c in contenders]
    assert {k for k in keys if k[1] == DECODE} == {(name, DECODE, depth) for name in names for depth in PLAN.depths}
    assert {k for k in keys if k[1] == PROMPT} == {(name, PROMPT, 128) for name in names[:-1]}  # the last one's context is shorter
    by_key = {(m.contender, m.task, m.depth): m.values for m in found}
    for contender in contenders[:4]:
        measured = by_key[contender.name, DECODE, 256]
        assert measured["kv_bytes"] == contender.kv_bytes(model, 256 + 2 + 1)
        assert measured[SPEED] > 0 and measured["peak_bytes"] > model.n_bytes
        assert by_key[contender.name, PROMPT, 128]["first_token_seconds"] > 0
        batch = by_key[contender.name, THROUGHPUT, 256]
        assert batch["kv_bytes"] <= 1 << 20 < contender.kv_bytes(model, 256 + 2 + 1, batch["n_seq"] + 1) or batch["n_seq"] == 256
    assert said[-1][1] == said[-1][2] == len(said) - 1


def test_one_that_can_not_run_is_told_once_and_the_others_go_on(model):
    contenders = [
        Contender("quantized values without flash attention", type_k="q8_0", type_v="q8_0", flash_attn=False),
        Contender("full"),
    ]
    found = list(measure(model, contenders, replace(PLAN, prompts=()), lambda *_: None))
    failures = [f for f in found if isinstance(f, Failure)]
    assert len(failures) == 1 and "\n" not in failures[0].reason and failures[0].reason
    assert sum(isinstance(f, Measurement) for f in found) == 4


def test_a_job_says_which_attention_it_wants(model, tmp_path, monkeypatch):
    """The variable that chooses it, in the process's environment."""
    monkeypatch.setattr("lt_gguf.bench.measure.python", lambda module: [str(echo)])
    echo = script(tmp_path / "echo", "import json, os; print(json.dumps({'depth': 1, 'said': os.environ['LT_ATTENTION']}))")
    for contender, expected in [(Contender("ours"), "on"), (Contender("theirs", own_attention=False), "off")]:
        job = make_job(model, contender, DECODE, PLAN)
        assert [line["said"] for line in run_job(job, sys.executable)] == [expected]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by signal 9"),
        ("import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)", "its process ended with status 3: two"),
        ("import json; print(json.dumps({'error': 'no room'}))", "no room"),
    ],
)
def test_what_a_process_that_fails_says(model, tmp_path, monkeypatch, body, reason):
    monkeypatch.setattr("lt_gguf.bench.measure.python", lambda module: [str(script(tmp_path / "fails", body))])
    assert [line["error"] for line in run_job(make_job(model, Contender("full"), DECODE, PLAN), sys.executable)] == [reason]


def test_the_process_ends_when_nobody_listens(model, tmp_path, monkeypatch):
    went_on = tmp_path / "went-on"
    body = f"import pathlib, time; print('{{\"depth\": 1}}', flush=True); time.sleep(10); pathlib.Path({str(went_on)!r}).touch()"
    monkeypatch.setattr("lt_gguf.bench.measure.python", lambda module: [str(script(tmp_path / "waits", body))])
    lines = run_job(make_job(model, Contender("full"), DECODE, PLAN), sys.executable)
    next(lines)
    lines.close()  # as Ctrl-C does; it waits for the process's end
    assert not went_on.exists()


def test_the_largest_batch_is_the_largest(model, hybrid):
    for contender in ours([hybrid], ["f16"], True):
        n = largest_batch(model, contender, 300, 2 << 20)
        assert contender.kv_bytes(model, 300, n) <= 2 << 20 < contender.kv_bytes(model, 300, n + 1)
    assert largest_batch(model, Contender("full"), 300, 1) == 0


def test_ratios_are_of_the_same_round(results):
    full, own = results.contenders
    assert results.value(own, DECODE, 256, SPEED) == Spread(17.5, 15.0, 20.0)
    assert results.ratio(own, full, DECODE, 256) == Spread(2.5, 2.0, 3.0)  # and not 17.5 / 7.5
    assert results.value(own, PROMPT, 256, SPEED) is None


def test_the_prediction_counts_what_a_token_reads(results, model):
    full, own = results.contenders
    cells = 256 * model.n_layer
    token = model.kv_shape.token_bytes(0)
    assert full.bytes_read(model, 256) == model.n_bytes + cells * token
    assert own.bytes_read(model, 256) == model.n_bytes + (2 * 256 + 2 * 64) * token
    assert results.predicted(own, 256) == pytest.approx(full.bytes_read(model, 256) / own.bytes_read(model, 256))
    quantized = replace(own, type_k="q8_0", type_v="q8_0")  # what streams stays in 16 bits
    small = model.kv_shape.token_bytes(0, "q8_0")
    assert quantized.bytes_read(model, 256) == model.n_bytes + 2 * 256 * small + 2 * 64 * token
    assert Contender("s", shift_at=64).bytes_read(model, 256) == model.n_bytes + 64 * model.n_layer * token


def test_tables_and_json_say_the_same(results):
    (table,) = tables(results)
    assert table.rows[1][:4] == ("256", "2 of 4 stream, f16", "17.5 (15.0 to 20.0)", "2.50 (2.00 to 3.00)")
    page = markdown(results, ["speed.svg"])
    assert "| 256 | 2 of 4 stream, f16 | 17.5 (15.0 to 20.0) | 2.50 (2.00 to 3.00) |" in page and "![speed](speed.svg)" in page
    said = json.loads(json.dumps(results.to_json()))
    assert len(said["measurements"]) == 4 and said["plan"]["peer_python"] is None


def test_who_is_the_fastest_peer(results, model):
    stock, no_flash, *_, shifted = stock_peers(["f16", "q8_0"], 64)
    results.contenders = [*results.contenders, stock, no_flash, shifted, *torch_peers(True, 0.5, 60, 4)]
    for contender, speed in [(stock, 4.0), (no_flash, 8.0), (shifted, 50.0), (results.contenders[-1], 60.0)]:
        results.add(Measurement(contender.name, DECODE, 256, 0, {SPEED: speed}))
    assert results.best_peer(DECODE, 256) == no_flash  # who forgets, and who has other weights, isn't one to be compared with
    assert any(
        "times as fast as llama.cpp, f16, flash attention off" in line and "stream, f16 2.50" in line for line in results.notes()
    )


def test_peers_that_are_not_here_are_named(model, hybrid, tmp_path):
    contenders = ours([hybrid], ["f16", "q8_0"], True)
    bare = script(tmp_path / "bare", "import sys; sys.exit(1)")
    peers, absent = find_peers(model, contenders, replace(PLAN, peer_python=str(bare)))
    assert {c.type_k for c in peers} == {"f16", "q8_0"} and all(c.library == "llama.cpp" and not c.own_attention for c in peers)
    assert any("--peer-python" in line for line in absent) and any("MLX" in line for line in absent)
    everything = script(tmp_path / "everything", "import sys; sys.exit(0)")
    peers, absent = find_peers(model, contenders, replace(PLAN, peer_python=str(everything)))
    kept = contenders[1].kv_bytes(model, 128) / contenders[0].kv_bytes(model, 128)
    ratios = [c.options["arguments"].get("compression_ratio") for c in peers if c.options and c.options.get("press")]
    assert ratios == [None, pytest.approx(1 - kept, abs=1e-4), pytest.approx(1 - kept, abs=1e-4)]
    with pytest.raises(ValueError, match="--peer-python = .*: can't be run"):
        find_peers(model, contenders, replace(PLAN, peer_python=str(tmp_path / "nothing")))


def test_a_torch_peer_decodes_in_the_process_that_read(results):
    peer = torch_peers(False, 1, 60, 4)[0]
    results.contenders = [*results.contenders, peer]
    values = {SPEED: 7.0, "first_token_seconds": 1.0, "decode_tokens_per_second": 3.0, "kv_bytes": 9, "peak_bytes": 9}
    results.add(Measurement(peer.name, PROMPT, 256, 0, values))
    assert results.value(peer, DECODE, 256, SPEED).median == 3.0 and results.value(peer, PROMPT, 256, SPEED).median == 7.0


@pytest.mark.slow
def test_transformers_as_a_peer(model):
    """For real, in the Python that runs the tests."""
    pytest.importorskip("transformers")
    peer = torch_peers(False, 1, 60, 4)[0]
    (line,) = run_job(make_job(model, peer, PROMPT, replace(PLAN, prompts=(64,))), sys.executable)
    assert "error" not in line, line
    assert line["first_token_seconds"] > 0 and line["decode_tokens_per_second"] > 0
    # 32 bits, the prompt and the tokens behind it not yet
    assert line["kv_bytes"] == 64 * 4 * 2 * model.n_layer * model.n_head_kv[0] * model.head_size_k


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_random_model_is_one(tmp_path, monkeypatch, is_tied):
    shape = shapes.Shape(2, 64, 4, 2, 16, 96, 160, is_tied)
    monkeypatch.setitem(shapes.SHAPES, "small", shape)
    path = shapes.random_model(tmp_path, "small")
    model = read_model(path)
    assert (model.n_layer, model.n_embd, model.n_head_kv, model.head_size_k) == (2, 64, (2, 2), 16)
    written = path.stat().st_mtime_ns
    assert shapes.random_model(tmp_path, "small") == path and path.stat().st_mtime_ns == written  # it was there
    assert read_model(shapes.random_model(tmp_path, "small", 1, "f16")).n_layer == 1
    found = list(measure(model, [Contender("full")], Plan((32,), (32,), 0, 2, 1, 1), lambda *_: None))
    assert [(m.task, m.depth) for m in found] == [(DECODE, 32), (PROMPT, 32)]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="don't fit, 1000 B are free"):
        shapes.random_model(tmp_path, "smollm2-135m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--depths", "a"], '--depths = "a": must be numbers of tokens, as in 1024,8192'),
        (["--depths", "99999999"], "--depths: 99999999 tokens, must be at most"),
        (["--prompts", "0"], '--prompts = "0": must be numbers of tokens'),
        (["--cache-types", "f16,q9"], 'cache type = "q9": must be one of'),
        (["--streaming", "layers=9"], "layers"),
        (["--shares", "half"], '--shares = "half": must be numbers from 0 to 1'),
        (["--shares", "1.5"], "1"),
        (["--throughput", "many"], '--throughput: size = "many"'),
        (["--repeats", "0"], "--repeats"),
        (["--shape", "llama-3.2-1b"], "must be one of them, a model or a shape"),
        (["--shape-layers", "2"], "--shape-layers: is for --shape NAME"),
    ],
)
def test_wrong_arguments(lt_gguf_command, model, arguments, reason):
    status, out, err = lt_gguf_command("bench", model.path, *arguments)
    assert status and not out and err.startswith("error: ") and err.count("\n") == 1 and reason in err


def test_a_shape_that_is_not_known(lt_gguf_command):
    status, _, err = lt_gguf_command("bench", "--shape", "llama-9")
    assert status == 1 and '--shape = "llama-9": must be one of' in err


@pytest.mark.slow
def test_the_command(lt_gguf_command, model, tmp_path):
    options = [
        "--streaming",
        SPEC,
        "--depths",
        "64,128",
        "--prompts",
        "64",
        "-n",
        "2",
        "--repeats",
        "1",
        "-t",
        "1",
        "--throughput",
        "1MiB",
    ]
    status, out, err = lt_gguf_command(
        "bench", model.path, *options, "--peers", "--peer-python", "/bin/false", "--out", tmp_path / "out"
    )
    assert status == 0, err
    for said in ("Decoding", "Reading a prompt", "Throughput", "2 of 4 stream, f16", "llama.cpp, context of 64, shifted", "MLX"):
        assert said in out
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {m["task"] for m in results["measurements"]} == {DECODE, PROMPT, THROUGHPUT}
    assert all(math.isfinite(m["values"][SPEED]) for m in results["measurements"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"bench.md", "speed.svg", "first_token.png", "throughput.png", "memory.svg"}


def test_results_that_are_there_stay(lt_gguf_command, model, tmp_path):
    (tmp_path / "bench.json").write_text("earlier")
    status, out, err = lt_gguf_command("bench", model.path, "--out", tmp_path)
    assert status == 1 and not out and "bench.json: exists, remove it, name another folder or use --overwrite" in err
    assert (tmp_path / "bench.json").read_text() == "earlier"


@pytest.mark.slow
def test_ctrl_c_shows_what_is_there(model, tmp_path):
    command = [sys.executable, "-c", "from lt_gguf.cli import main; main()", "bench", str(model.path), "--repeats", "500"]
    with subprocess.Popen(
        [*command, "--depths", "64", "--prompts", "none", "-n", "1", "-t", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(6)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Decoding" in out and "Traceback" not in err


def script(path: Path, body: str) -> Path:
    """A Python script that reads a line and runs `body`."""
    path.write_text(f"#!{sys.executable}\nimport sys\nif not sys.argv[1:]: sys.stdin.readline()\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
