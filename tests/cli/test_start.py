"""How the command line begins: completion by the shell, `--debug`, and Ctrl-C before there is a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lt_gguf.cli import COMMANDS
from lt_gguf.cli.common import run
from lt_gguf.models import MODELS
from lt_gguf.spec.cache_types import CACHE_TYPES

LT_GGUF = [sys.executable, "-c", "from lt_gguf.cli import main; main()"]


def completed(line: str) -> list[str]:
    """What bash would be told, with the cursor at the line's end."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_LT_GGUF_COMPLETE": "complete_bash"}
    done = subprocess.run(LT_GGUF, env=os.environ | asked, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, expected",
    [
        ("lt-gguf ", sorted(COMMANDS)),
        ("lt-gguf c", ["cache", "chat", "convert"]),
        ("lt-gguf chat --prompt-l", ["--prompt-limit"]),
        ("lt-gguf chat sm", [name for name in MODELS if name.startswith("sm")]),
        ("lt-gguf chat no-such-model", []),  # the shell then completes names of files
        ("lt-gguf run smollm2 --cache-type q4", sorted(name for name in CACHE_TYPES if name.startswith("q4"))),
        ("lt-gguf --debug run smollm2 --cache-type q8", ["q8_0"]),
        ("lt-gguf run smollm2 --streaming o", ["off"]),
    ],
)
def test_a_shell_completes_commands_options_and_values(line, expected):
    assert sorted(completed(line)) == expected


def test_what_completion_imports_is_the_command_at_hand():
    """A shell asks with each press of a key."""
    asked = {"COMP_WORDS": "lt-gguf run --st", "COMP_CWORD": "2", "_LT_GGUF_COMPLETE": "complete_bash"}
    code = "import sys, lt_gguf.cli\ntry: lt_gguf.cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert "lt_gguf.cli.run" in done.stderr.split() and "lt_gguf.cli.convert" not in done.stderr.split()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_says_where_an_error_comes_from(lt_gguf_command, place):
    words = ["inspect", "no-such-file.gguf"]
    plain = lt_gguf_command(*words)
    assert plain == (1, "", "error: no-such-file.gguf: No such file or directory\n")
    status, out, err = lt_gguf_command(*words[:place], "--debug", *words[place:])
    assert (status, out) == (1, "")
    assert err.startswith("Traceback (most recent call last)") and "in resolve\n" in err
    assert err.endswith(plain[2])


def test_debug_behind_two_dashes_is_somebody_elses(lt_gguf_command):
    status, _, err = lt_gguf_command("inspect", "--", "--debug")
    assert status == 1 and err.startswith("error: --debug: there is no such file and no model of that name")


def test_ctrl_c_while_the_command_is_imported_is_no_traceback(capfd):
    def build():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(build, "lt-gguf", ["chat"])
    assert ended.value.code == 130
    assert capfd.readouterr() == ("", "")
