"""`lt-gguf doctor`: what it finds, and that a problem has something to do about it and another exit status."""

from __future__ import annotations

import json

import pytest
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

from lt_gguf.runtime import diagnosis, self_check
from lt_gguf.runtime.library import BINDING_VERSION, LibraryError


def listed(lt_gguf_command, *options: object) -> tuple[int, list[dict]]:
    status, out, _ = lt_gguf_command("doctor", "--json", *options)
    said = json.loads(out)
    assert said["problems"] == sum(finding["problem"] is not None for finding in said["findings"]) and status == (
        said["problems"] > 0
    )
    return status, said["findings"]


def of(findings: list[dict], what: str) -> list[dict]:
    return [finding for finding in findings if finding["what"] == what]


def test_nothing_is_wrong(lt_gguf_command, monkeypatch):
    monkeypatch.setattr(diagnosis, "_LITTLE_MEMORY", 0)
    monkeypatch.setattr(diagnosis, "_LITTLE_DISK", 0)
    monkeypatch.setattr(diagnosis, "_FAST", {})
    status, findings = listed(lt_gguf_command, "--quick")
    assert status == 0 and {"lt-gguf", "library", "backend", "CPU", "threads", "memory", "cache"} <= {
        one["what"] for one in findings
    }
    assert BINDING_VERSION in of(findings, "library")[0]["said"] and "patched" in of(findings, "library")[0]["said"]
    status, out, _ = lt_gguf_command("doctor", "--quick")
    assert status == 0 and out.endswith("no problem was found\n") and "\nCPU:       " in out


def test_what_can_be_wrong(lt_gguf_command, monkeypatch):
    monkeypatch.setattr(diagnosis, "_LITTLE_DISK", 0)
    monkeypatch.setattr(diagnosis, "available_memory", lambda: 1 << 30)
    monkeypatch.setattr(diagnosis.cpu, "cpu_flags", lambda: ["avx2", "amx_int8"])
    monkeypatch.setattr(diagnosis, "_FAST", {"avx2": "AVX2", "amx_int8": "NO_SUCH_FEATURE"})
    monkeypatch.setenv("LT_STREAMING", "off")
    status, findings = listed(lt_gguf_command, "--quick")
    assert status == 1 and "end other programs" in of(findings, "memory")[0]["problem"]
    assert "amx_int8" in of(findings, "speed")[0]["said"] and "build from source" in of(findings, "speed")[0]["problem"]
    assert of(findings, "variable")[0]["said"] == "LT_STREAMING=off"
    _, out, _ = lt_gguf_command("doctor", "--quick")
    assert out.count("\n           PROBLEM: ") >= 2 and "problems\n" in out


def test_a_library_that_does_not_fit(lt_gguf_command, monkeypatch):
    def refuse() -> None:
        raise LibraryError("llama-cpp-python 0.3.1 is installed, must be 0.3.36: pip install llama-cpp-python==0.3.36")

    monkeypatch.setattr(diagnosis, "load_llama_cpp", refuse)
    status, findings = listed(lt_gguf_command, "--quick")
    assert status == 1 and of(findings, "library")[0]["problem"].startswith("llama-cpp-python 0.3.1 is installed")


def test_a_cache_that_cannot_be_written(lt_gguf_command, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "file" / "cache"))
    status, findings = listed(lt_gguf_command, "--quick")
    assert status == 1 and "it can't be written" in of(findings, "cache")[0]["problem"]


@pytest.mark.slow
def test_a_model_is_run(lt_gguf_command, hybrid_file, monkeypatch, tmp_path):
    monkeypatch.setattr(self_check, "TYPES", {"q8_0": 7})
    monkeypatch.setattr(diagnosis, "check_weights", lambda: iter([diagnosis.Finding("weights", "q8_0", "crashed")]))
    status, findings = listed(lt_gguf_command, hybrid_file)
    speeds = of(findings, "model")
    assert status == 1 and of(findings, "weights")[0]["problem"] == "crashed"
    assert [speed["problem"] for speed in speeds] == [None, None] and "tiny.gguf, as the file says: reads " in speeds[0]["said"]
    assert "full attention: reads" in speeds[1]["said"] and "tokens/s" in speeds[1]["said"]
    _, findings = listed(lt_gguf_command, tmp_path / "none.gguf")
    assert of(findings, "model")[0]["problem"] == "No such file or directory"


def test_weights(monkeypatch):
    monkeypatch.setattr(self_check, "check", lambda show: show("q8_0", 0.1) or ["q4_0 weights: crashed"])
    shown: list[str] = []
    found = list(diagnosis.check_weights(shown.append))
    assert shown == ["q8_0"] and [one.problem for one in found] == ["", "q4_0 weights: crashed"]
