"""`lt-gguf serve` with a model over several machines, by llama.cpp's RPC: two servers on this one stand in for them."""

from __future__ import annotations

import json
import time
import urllib.error

import pytest
from support import rpc
from support.serve import serving
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

OPTIONS = ["--threads", "1", "--ctx", "1024", "--streaming", "layers=0-2;sink=2;window=60;prefill=full"]
LONG = "the quick brown fox jumps over the lazy dog " * 25


def answer(served) -> tuple[str, list[float]]:
    choice = served.chat(LONG, max_tokens=8, logprobs=True)["choices"][0]
    return choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]


@pytest.mark.slow
def test_a_machine_that_goes_away_and_comes_back(hybrid_file):
    """The same answers as on one machine; who asks meanwhile is told, and nothing has to be started again by hand."""
    with serving(hybrid_file, *OPTIONS) as served:
        text, logprobs = answer(served)
    with rpc.rpc_servers(2) as (endpoints, processes), serving(hybrid_file, *OPTIONS, "--", "--rpc", ",".join(endpoints)) as served:
        assert answer(served) == (text, pytest.approx(logprobs, abs=1e-3))
        processes[1].kill()
        processes[1].wait()
        with pytest.raises(urllib.error.HTTPError):  # if not this one, the next
            for _ in range(2):
                answer(served)
        deadline = time.monotonic() + 30
        said = ""
        while "a machine that computes for it doesn't answer" not in said and time.monotonic() < deadline:
            with pytest.raises(urllib.error.HTTPError) as refused:
                answer(served)
            assert refused.value.code == 503
            said = json.loads(refused.value.read())["error"]["message"]
            time.sleep(0.1)
        assert "a machine that computes for it doesn't answer, try it in a few seconds" in said
        processes[1] = rpc.start(int(endpoints[1].split(":")[1]))
        again = None
        while again is None and time.monotonic() < deadline + 30:
            try:
                again = answer(served)
            except urllib.error.HTTPError:
                time.sleep(0.2)
        assert again == (text, pytest.approx(logprobs, abs=1e-3))
        status, log = served.end()
    assert status == 0
    assert f"has lost a machine of --rpc {','.join(endpoints)} while answering" in log
    assert "while loading the model: Failed to connect to " in log and log.count("llama-server answers again") == 1


@pytest.mark.slow
def test_a_machine_that_is_not_there_at_the_start_is_an_error(hybrid_file):
    from support.serve import start

    endpoint = f"127.0.0.1:{rpc.free_port()}"
    _, said = (process := start(hybrid_file, *OPTIONS, "--", "--rpc", endpoint)).communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1] == (
        f"error: llama-server has lost a machine of --rpc {endpoint} while loading the model: Failed to connect to {endpoint}"
    )
