"""What a file recommends for its KV cache, as the commands write, show and take it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from support.candidates import evidence
from support.small_gguf import write_small
from support.tiny_checkpoint import N_LAYER, SINK, WINDOW, write_checkpoint

from lt_gguf import conversion
from lt_gguf.cli import flag as flag_command
from lt_gguf.cli import model as model_options
from lt_gguf.cli import serve
from lt_gguf.gguf.file import read_model
from lt_gguf.gguf.flagging import flag
from lt_gguf.memory.kv import kv_memory
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.models.remembered import remember
from lt_gguf.report.report import Report
from lt_gguf.runtime import context_size
from lt_gguf.runtime.cache_choice import CacheTypeWarning
from lt_gguf.selection.base import Selection
from lt_gguf.selection.caches import CachePoint, Caches
from lt_gguf.spec import CacheRecommendation, CacheTypes, StreamingSpec

Q8_Q4, Q4 = CacheTypes("q8_0", "q4_0"), CacheTypes("q4_0", "q4_0")
FOUND = CacheRecommendation(N_LAYER, Q8_Q4, (0,), (Q4,))
SAID = "K q8_0, V q4_0, 16 bits in layer 0; q4_0 breaks the model"
OPTIONS = ["--cache-type", "q8_0/q4_0", "--cache-keep", "0", "--cache-breaks", "q4_0"]
BREAKS = "a KV cache of type q4_0 breaks this model, says its file, which recommends K q8_0, V q4_0, 16 bits in layer 0"
QUICK = ["--threads", "1", "--ctx", "512", "--batch-size", "64"]
STREAMS = StreamingSpec((1, 3), N_LAYER, SINK, WINDOW)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a model whose heads of 32 can be quantized."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), head_dim=32)


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("plain") / "plain.gguf"
    return conversion.convert(checkpoint, file, outtype="f32", layers="none", no_report=True).files[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A model whose heads of 16 can't be quantized, beside its checkpoint."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("small"))
    return conversion.convert(checkpoint, checkpoint / "small.gguf", outtype="f32", layers="none", no_report=True).files[0]


@pytest.fixture(scope="module")
def hybrid(plain) -> Path:
    return flag(plain, plain.with_name("hybrid.gguf"), STREAMS, recommended=FOUND)[0]


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LT_GGUF_DATA", str(tmp_path / "data"))


# ------------------------------------------------------------------------------------------------- flag


def test_flag_writes_it_and_leaves_the_layers(lt_gguf_command, plain, hybrid, tmp_path):
    new = tmp_path / "new.gguf"
    for source, spec in ((plain, StreamingSpec.off(N_LAYER)), (hybrid, STREAMS)):
        status, out, err = lt_gguf_command("flag", source, new, *OPTIONS, "--overwrite")
        assert (status, err) == (0, "") and out.splitlines()[-1] == f"recommended for the KV cache: {SAID}"
        assert (read_model(new).recommended, read_model(new).spec) == (FOUND, spec)


def test_an_ordinary_file_stays_one(lt_gguf_command, tmp_path):
    """Also where something is known that could stream in it."""
    (source,) = write_small(tmp_path / "ordinary.gguf")
    remember(source, StreamingSpec((0,), 4))
    status, _, err = lt_gguf_command("flag", source, tmp_path / "new.gguf", "--cache-type", "bf16")
    assert (status, err) == (0, "")
    model = read_model(tmp_path / "new.gguf")
    assert (model.spec, model.provenance, model.recommended) == (None, None, CacheRecommendation(4, CacheTypes("bf16", "bf16")))
    assert lt_gguf_command("flag", tmp_path / "new.gguf", tmp_path / "back.gguf", "--no-cache-types")[0] == 0
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--window", "9"], FOUND),
        (["--streaming-layers", "all"], FOUND),
        (["--cache-type", "q8_0"], CacheRecommendation(N_LAYER, CacheTypes("q8_0", "q8_0"), (0,), (Q4,))),
        (["--cache-keep", "1-2"], CacheRecommendation(N_LAYER, Q8_Q4, (1, 2), (Q4,))),
        (["--cache-keep", "none", "--cache-breaks", "none"], CacheRecommendation(N_LAYER, Q8_Q4)),
        (["--streaming-layers", "0-3", "--no-cache-types"], None),
        (["--no-cache-types"], None),
        (["--off"], None),
    ],
)
def test_what_is_not_asked_for_stays(lt_gguf_command, hybrid, tmp_path, options, expected):
    status, _, err = lt_gguf_command("flag", hybrid, tmp_path / "new.gguf", *options)
    assert (status, err) == (0, "")
    assert read_model(tmp_path / "new.gguf").recommended == expected
    assert (read_model(tmp_path / "new.gguf").spec is None) == ("--off" in options)


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], CacheRecommendation(N_LAYER, Q4, (0,), (Q4, Q8_Q4))),  # which layers resist a report doesn't say
        (
            ["--cache-type", "q8_0", "--cache-keep", "none"],
            CacheRecommendation(N_LAYER, CacheTypes("q8_0", "q8_0"), (), (Q4, Q8_Q4)),
        ),
        (["--no-cache-types"], None),
    ],
)
def test_what_a_report_measured_is_recommended(lt_gguf_command, hybrid, tmp_path, options, expected):
    spec = StreamingSpec((1, 2), N_LAYER, 2, 30)
    selection = Selection("manual", spec.layers, "by hand", 2, 30)
    point = CachePoint(Q4, spec.layers, 1000, evidence(0.01, 1.0))
    report = Report("small", "llama", spec, selection, None, caches=Caches((point,), Q4, (Q4, Q8_Q4)))
    (tmp_path / "report.json").write_text(json.dumps(report.to_json()))
    status, out, err = lt_gguf_command("flag", hybrid, tmp_path / "new.gguf", "--from", tmp_path / "report.json", *options)
    assert (status, err) == (0, "") and read_model(tmp_path / "new.gguf").spec == spec
    assert read_model(tmp_path / "new.gguf").recommended == expected and ("recommended for the KV cache" in out) == bool(expected)


def test_layers_that_stream_no_more_are_noted(lt_gguf_command, hybrid, tmp_path):
    status, _, err = lt_gguf_command("flag", hybrid, tmp_path / "new.gguf", "--streaming-layers", "0,3")
    assert status == 0 and read_model(tmp_path / "new.gguf").recommended == FOUND
    assert (
        err.startswith("note: layer 1 streamed when types of the KV cache were recommended, and gets them now")
        and err.count("\n") == 1
    )
    _, _, err = lt_gguf_command("flag", hybrid, tmp_path / "other.gguf", "--streaming-layers", "0,3", "--cache-type", "q8_0")
    assert err == ""


def test_in_place(lt_gguf_command, hybrid, tmp_path):
    (new,) = flag(hybrid, tmp_path / "new.gguf", STREAMS, recommended=FOUND)
    status, _, err = lt_gguf_command("flag", new, "--in-place", "--cache-keep", "0,3")
    assert (status, err) == (0, "") and read_model(new).recommended.keep == (0, 3)
    assert "says that already" in lt_gguf_command("flag", new, "--in-place", "--cache-keep", "0,3")[2]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--cache-type", "q9"], 'cache type = "q9": must be one of f32'),
        (["--cache-type", "q8_0/q8_0/q4_0"], "must be one type, or those of K and of V, as in q8_0/q4_0"),
        (["--cache-keep", "4"], '--cache-keep = "4": must be "all", "none", or layers and ranges of layers from 0 to 3'),
        (
            ["--streaming-layers", "none", "--cache-breaks", "q8_0/q4_0"],
            "q8_0/q4_0: is recommended and breaks the model, must not be",
        ),
        (["--cache-breaks", "q4_0;q8_0"], 'cache type = "q4_0;q8_0": must be one of'),
        (["--off", "--cache-type", "q8_0"], "--off removes what --cache-type would change"),
        (["--no-cache-types", "--cache-keep", "0"], "--no-cache-types removes what --cache-keep would change"),
        (["SMALL", "--cache-type", "q8_0"], "its blocks of 32 elements don't divide this model's heads of 16"),
        (["SMALL", "--cache-type", "f16/q4_0", "--streaming-layers", "1"], "don't divide this model's heads of 16"),
        (["NEWER"], "newer.gguf: llama.attention.cache.version = 2: is of a newer lt-gguf, this one knows 1: update it, or remove"),
        (["NEWER", "--window", "9"], "is of a newer lt-gguf"),
    ],
)
def test_flag_refuses_in_one_line_and_writes_nothing(lt_gguf_command, plain, hybrid, small, tmp_path, arguments, complaint):
    sources = {"SMALL": small, "NEWER": newer(hybrid, tmp_path)}
    source = sources.get(
        arguments[0], flag(plain, tmp_path / "hybrid.gguf", STREAMS, recommended=CacheRecommendation(N_LAYER, Q8_Q4))[0]
    )
    before = sorted(tmp_path.iterdir())
    code, out, err = lt_gguf_command("flag", source, tmp_path / "new.gguf", *[word for word in arguments if word not in sources])
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ") and complaint in err
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_wrong_is_said_before_hours_of_measuring(lt_gguf_command, small, tmp_path, monkeypatch):
    monkeypatch.setattr(flag_command, "_measure", lambda *_: pytest.fail("measured"))
    status, _, err = lt_gguf_command("flag", small, tmp_path / "new.gguf", "--select", "loss", "--cache-type", "q8_0")
    assert status == 1 and "don't divide this model's heads of 16" in err


def newer(hybrid: Path, folder: Path) -> Path:
    """The same file as a later version would write it, with a key that this one doesn't know."""
    raw = hybrid.read_bytes()
    key = b"llama.attention.cache.version" + (4).to_bytes(4, "little")
    assert raw.count(key + b"\1\0\0\0") == 1
    (folder / "newer.gguf").write_bytes(raw.replace(key + b"\1\0\0\0", key + b"\2\0\0\0").replace(b"cache.type_k", b"cache.kind_k"))
    return folder / "newer.gguf"


def test_what_a_later_version_wrote_is_refused_and_can_be_removed(lt_gguf_command, plain, hybrid, tmp_path):
    file = newer(hybrid, tmp_path)
    for command in (["inspect"], ["run", "-p", "x"], ["chat"], ["serve"], ["eval"]):
        status, out, err = lt_gguf_command(command[0], file, *command[1:])
        assert (
            (status, out, err.count("\n")) == (1, "", 1)
            and "is of a newer lt-gguf" in err
            and "lt-gguf flag --no-cache-types" in err
        )
    assert lt_gguf_command("flag", file, tmp_path / "new.gguf", "--no-cache-types")[0] == 0
    assert (tmp_path / "new.gguf").read_bytes() == flag(plain, tmp_path / "same.gguf", STREAMS)[0].read_bytes()


# --------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_it_and_counts_with_it(lt_gguf_command, hybrid):
    described = json.loads(lt_gguf_command("inspect", hybrid, "--json")[1])
    assert described["cache_recommended"] == {"type_k": "q8_0", "type_v": "q4_0", "keep": [0], "breaks": ["q4_0"]}
    assert (described["cache_type"], described["cache_keep"]) == ("q8_0/q4_0", [0])
    in_16, mixed = 2 * 2 * 32 * 2, 2 * 34 + 2 * 18
    assert [layer["kv_bytes_per_token"] for layer in described["layers"]] == [in_16, in_16, mixed, in_16]
    spec = StreamingSpec(STREAMS.layers, N_LAYER, SINK, WINDOW, cache_keep=(0,))
    expected = kv_memory(read_model(hybrid).kv_shape, spec, 32768, type_k="q8_0", type_v="q4_0")
    assert described["kv_memory"][1]["hybrid"] == expected.total
    text = " ".join(lt_gguf_command("inspect", hybrid)[1].split())
    assert f"recommended for the KV cache: {SAID}" in text and format_bytes(expected.total) in text
    assert "KV cache, K q8_0, V q4_0, f16 in streaming layers, f16 in layer 0" in text


def test_inspect_asked_for_others(lt_gguf_command, hybrid, plain):
    _, out, err = lt_gguf_command("inspect", hybrid, "--json", "--cache-type", "f16")
    assert json.loads(out)["cache_type"] == "f16" and err == ""
    assert json.loads(lt_gguf_command("inspect", hybrid, "--json", "--streaming", "off")[1])["cache_type"] == "f16"
    assert json.loads(lt_gguf_command("inspect", plain, "--json")[1])["cache_recommended"] is None
    _, out, err = lt_gguf_command("inspect", hybrid, "--json", "--cache-type", "q4_0")
    assert (json.loads(out)["cache_keep"], err) == ([0], f"{BREAKS}\n")


def test_inspect_still_says_what_chose_the_layers(lt_gguf_command, plain, tmp_path):
    lt_gguf_command("flag", plain, tmp_path / "new.gguf", "--streaming-layers", "1", *OPTIONS)
    assert "1 layers stream, chosen by manual: 1;" in " ".join(lt_gguf_command("inspect", tmp_path / "new.gguf")[1].split())


# -------------------------------------------------------------------------------------- what runs with it


@pytest.mark.parametrize(
    "options, types, keep, said",
    [
        ([], Q8_Q4, (0,), ""),
        (["--cache-type", "f16"], CacheTypes("f16", "f16"), (), ""),
        (["--cache-type", "f16/q4_0", "--cache-keep", "none"], CacheTypes("f16", "q4_0"), (), ""),
        (["--cache-type", "q4_0"], Q4, (0,), f"{BREAKS}\n"),
        (["--streaming", "off"], CacheTypes("f16", "f16"), (), ""),
        (
            ["--no-flash-attn"],
            CacheTypes("q8_0", "f16"),
            (0,),
            "V of the KV cache is f16, not q4_0 as the file recommends: that needs flash attention\n",
        ),
    ],
)
def test_run(lt_gguf_command, hybrid, monkeypatch, recwarn, options, types, keep, said):
    loaded = []
    load = model_options.load
    monkeypatch.setattr(model_options, "load", lambda *given: loaded.append(load(*given)) or loaded[0])
    status, _, err = lt_gguf_command("run", hybrid, "-p", "hello", "-n", "2", "--temp", "0", *QUICK, *options)
    assert (status, err) == (0, said)
    assert not [warning for warning in recwarn if warning.category is CacheTypeWarning]  # it is said without Python's words
    assert (loaded[0].cache_types, loaded[0].cache_keep) == (types, keep)


def test_what_measures_takes_nothing_of_it(lt_gguf_command, hybrid, monkeypatch):
    asked = []

    def load(*_: object, **settings: object) -> None:
        asked.append(settings)
        raise ValueError("not loaded")

    monkeypatch.setattr("lt_gguf.runtime.llama.Llama", load)
    for options in ([], ["--cache-type", "q8_0/q4_0"]):
        options = ["--select", "lazy-ratio", "--window", "60", "--samples", "1", "--calibration-length", "300", *options]
        assert "not loaded" in lt_gguf_command("analyze", hybrid, *options)[2]
    assert [one["cache_keep"] for one in asked] == ["none", "none"]
    assert [[one["type_k"], one["type_v"]] for one in asked] == [[1, 1], [8, 2]]  # ggml's numbers


def test_chat_says_what_its_cache_is(lt_gguf_command, hybrid, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/stats\n/exit\n"))
    status, _, err = lt_gguf_command("chat", hybrid, "-n", "2", "--temp", "0", *QUICK)
    assert status == 0
    shape, types = read_model(hybrid).kv_shape, {"type_k": "q8_0", "type_v": "q4_0", "n_ubatch": 64}
    full = kv_memory(shape, StreamingSpec((), N_LAYER, cache_keep=(0,)), 512, **types).total
    used = kv_memory(shape, StreamingSpec(STREAMS.layers, N_LAYER, SINK, WINDOW, cache_keep=(0,)), 512, **types).total
    text = "K q8_0, V q4_0, f16 in streaming layers, f16 in layer 0"
    kv = f"KV {format_bytes(used)} hybrid, {format_bytes(full)} full ({1 - used / full:.0%} saved), {text}"
    assert err.splitlines()[0] == f"{kv} · 1 CPU thread · context of 512 tokens"
    assert f"cache: {text}" in err.splitlines()


def test_the_layers_that_auto_chooses_keep_their_types(lt_gguf_command, plain, tmp_path, monkeypatch):
    (file,) = flag(plain, tmp_path / "full.gguf", None, recommended=FOUND)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'the quick brown fox ' * 20}\n/exit\n"))
    spec = "auto=0.5;sink=2;window=20"
    _, _, err = lt_gguf_command("chat", file, "-n", "2", "--temp", "0", *QUICK, "--streaming", spec)
    assert "no layer streams yet, K q8_0, V q4_0, f16 in layer 0 · " in err.splitlines()[0]
    assert "saved), K q8_0, V q4_0, f16 in layer 0, layers " in err and "f16 in streaming layers" not in err


class TestServe:
    """What llama-server runs with, and what the page is told."""

    def prepared(self, file: Path, *, n_slots: int = 1, **options):
        settings, info = serve.prepare(str(file), n_slots, [], model_options.ChatOptions(**{"ctx": 1024, "threads": 1} | options))
        return settings, info, settings.command(Path("socket"), Path("states"))

    def test_what_is_recommended(self, hybrid, capsys):
        settings, info, command = self.prepared(hybrid)
        assert command[command.index("--cache-type-k") :][:4] == ["--cache-type-k", "q8_0", "--cache-type-v", "q4_0"]
        assert settings.streaming == "cache_keep=0" and settings.environment()["LT_STREAMING"] == "cache_keep=0"
        assert (info["cache_type_k"], info["cache_type_v"], info["cache_keep"]) == ("q8_0", "q4_0", [0])
        assert info["cache"] == "K q8_0, V q4_0, f16 in streaming layers, f16 in layer 0"
        in_16, mixed = 2 * 2 * 32 * 2, 2 * 34 + 2 * 18
        assert info["token_bytes"] == [in_16, mixed, mixed, mixed] and info["streaming_token_bytes"] == [in_16] * 4
        assert info["streaming"]["layers"] == [1, 3] and capsys.readouterr().err == ""

    def test_what_is_asked_for(self, hybrid, capsys):
        settings, info, command = self.prepared(hybrid, cache_type="q4_0", cache_keep="1-2", streaming="off")
        assert command[command.index("--cache-type-k") :][:4] == ["--cache-type-k", "q4_0", "--cache-type-v", "q4_0"]
        assert (info["cache"], info["cache_keep"]) == ("q4_0, f16 in layers 1-2", [1, 2])
        assert settings.streaming == "off;cache_keep=1-2" and capsys.readouterr().err == f"{BREAKS}\n"
        assert self.prepared(hybrid, cache_type="f16")[1]["cache"] == "f16"
        assert self.prepared(hybrid, cache_type="f16", streaming="type=q4_0", cache_keep="1")[1]["cache_keep"] == [1]

    def test_without_flash_attention(self, hybrid, capsys):
        _, info, command = self.prepared(hybrid, flash_attn=False)
        assert command[command.index("--cache-type-v") + 1] == "f16" and info["cache_type_k"] == "q8_0"
        assert "that needs flash attention" in capsys.readouterr().err

    def test_layers_that_are_chosen_for_the_prompt(self, plain, tmp_path):
        (file,) = flag(plain, tmp_path / "full.gguf", None, recommended=FOUND)
        _, info, _ = self.prepared(file, streaming="auto:0.5")
        assert info["cache"] == "K q8_0, V q4_0, f16 in layer 0" and info["streaming_token_bytes"] == info["token_bytes"]

    def test_the_largest_context_counts_with_it(self, hybrid, monkeypatch):
        asked = []
        monkeypatch.setattr(context_size, "available_memory", lambda: 4 << 30)
        monkeypatch.setattr(context_size, "largest_context", lambda *_, **settings: asked.append(settings) or (1024, 1 << 30))
        for type_ in (None, "f16"):
            self.prepared(hybrid, ctx=None, cache_type=type_)
        assert [(one["type_k"], one["type_v"]) for one in asked] == [("q8_0", "q4_0"), ("f16", "f16")]


# --------------------------------------------------------------------------------------------- convert


def test_convert_writes_it(lt_gguf_command, checkpoint, tmp_path):
    file, report = tmp_path / "new.gguf", tmp_path / "report"
    options = [*OPTIONS, "--select", "interleave-odd", "--report", report]
    status, out, _ = lt_gguf_command("convert", checkpoint, "--outfile", file, *options)
    assert status == 0 and f"recommended for the KV cache: {SAID}" in out.splitlines()
    assert read_model(file).recommended == FOUND and read_model(file).spec.layers == (1, 3)
    assert lt_gguf_command("run", file, "-p", "hello", "-n", "1", *QUICK)[0] == 0
    card = (report / "README.md").read_text()
    assert "The KV cache, K q8_0, V q4_0, f16 in streaming layers, f16 in layer 0, one sequence:" in card
    spec = StreamingSpec((1, 3), N_LAYER, 4, 1020, cache_keep=(0,))
    hybrid = kv_memory(read_model(file).kv_shape, spec, 4096, type_k="q8_0", type_v="q4_0").total
    assert f"| {format_bytes(hybrid)} |" in card and "Recommended for the KV cache: K q8\\_0, V q4\\_0, 16 bits in layer 0" in card


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--cache-keep", "4"], '--cache-keep = "4": must be "all", "none", or layers and ranges of layers from 0 to 3'),
        (
            ["--cache-type", "q4_0", "--cache-breaks", "q4_0", "--streaming-layers", "none"],
            "is recommended and breaks the model, must",
        ),
        (["SMALL", "--cache-type", "q8_0"], "don't divide this model's heads of 16"),
    ],
)
def test_convert_refuses_in_one_line_and_writes_nothing(lt_gguf_command, checkpoint, small, tmp_path, options, complaint):
    source = small.parent if options[0] == "SMALL" else checkpoint
    options = [option for option in options if option != "SMALL"]
    options += [] if "--streaming-layers" in options else ["--select", "interleave-odd"]
    status, _, err = lt_gguf_command("convert", source, "--outfile", tmp_path / "new.gguf", *options)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(errors) == 1 and complaint in errors[0] and list(tmp_path.iterdir()) == []


def test_a_budget_counts_with_it(lt_gguf_command, checkpoint, tmp_path):
    file = tmp_path / "new.gguf"
    options = ["--select", "interleave-odd", "--window", "60", "--prefill", "stream", "--kv-budget", "2MiB", "--ctx", "4096"]
    for types, expected in ((["--cache-type", "q8_0/q4_0"], 0), ([], 3)):
        status, out, err = lt_gguf_command("convert", checkpoint, "--outfile", file, "--dry-run", *options, *types)
        assert status == 0, err
        assert f"{expected} of 4 layers stream" in out and ("recommended for the KV cache: K q8_0, V q4_0" in out) == bool(types)
