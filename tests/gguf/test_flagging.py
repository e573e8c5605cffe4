"""Flagging: our keys change, nothing else does, and whatever happens a file is what it was or what it is to be."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_gguf import N_LAYER, write_small

from lt_gguf.gguf import flagging
from lt_gguf.gguf.file import read_model
from lt_gguf.gguf.flagging import SECTOR, flag, flag_in_place
from lt_gguf.gguf.header import read_layout
from lt_gguf.spec import CacheRecommendation, CacheTypes, Provenance, StreamingSpec, Typed

SPEC = StreamingSpec((1, 3), N_LAYER, sink=2, window=30)
MANUAL = Provenance("manual")
CACHE = CacheRecommendation(N_LAYER, CacheTypes("f32", "bf16"), (0, 2), (CacheTypes("q8_0", "q4_0"),))
MEASURED = Provenance("lazy-ratio", (0.5, 0.75, 0.25, 1.0), json.dumps({"data": "a text", "samples": 2}))

SHAPES = {
    "plain": {},
    "version 2": {"version": 2},
    "alignment 64": {"alignment": 64},
    "alignment 8": {"alignment": 8},
    "split": {"files": 3},
    "split, no tensors in the first": {"files": 3, "tensors_in_first": False},
}
FINAL = {1: "new.gguf", 3: "new-00001-of-00003.gguf"}


def digest(path: Path, start: int = 0) -> str:
    return hashlib.sha256(path.read_bytes()[start:]).hexdigest()


def is_ours(key: str) -> bool:
    return ".attention.streaming." in key or ".attention.cache." in key or key.startswith("lighttransfer.")


def assert_only_our_keys_differ(old: Path, new: Path) -> None:
    readers = [gguf.GGUFReader(path) for path in (old, new)]
    keys = [[key for key in reader.fields if not is_ours(key) and key != "GGUF.kv_count"] for reader in readers]
    assert keys[0] == keys[1]
    for key in keys[0]:
        fields = [reader.fields[key] for reader in readers]
        assert fields[0].types == fields[1].types and fields[0].contents() == fields[1].contents()
    tensors = [[(t.name, t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors] for reader in readers]
    assert tensors[0] == tensors[1]
    layouts = [read_layout(path) for path in (old, new)]
    assert digest(old, layouts[0].data.start) == digest(new, layouts[1].data.start)
    if readers[1].tensors:
        assert layouts[1].data.start == readers[1].data_offset


# ---------------------------------------------------------------------------------------------- a new file


@pytest.mark.parametrize("shape", SHAPES)
def test_only_our_keys_change_and_off_takes_them_out_again(tmp_path, shape):
    old = write_small(tmp_path / "old.gguf", **SHAPES[shape])
    before = list(map(digest, old))
    new = flag(old[0], tmp_path / FINAL[len(old)], SPEC, MEASURED, recommended=CACHE)
    assert [path.exists() for path in new] == [True] * len(old)
    assert_only_our_keys_differ(old[0], new[0])
    assert list(map(digest, new[1:])) == before[1:]
    assert not any(path.samefile(other) for path, other in zip(new, old))  # nor hard links
    model = read_model(new[0])
    assert (model.spec, model.provenance, model.recommended, model.n_files) == (SPEC, MEASURED, CACHE, len(old))
    back = flag(new[0], tmp_path / FINAL[len(old)].replace("new", "back"), None)
    assert list(map(digest, back)) == before == list(map(digest, old))
    assert len(list(tmp_path.iterdir())) == 3 * len(old)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "alignment 8"])  # llama.cpp computes on no less than 32
def test_the_runtime_streams(tmp_path, shape):
    from support.native import STREAMING, Model, api

    old = write_small(tmp_path / "old.gguf", **SHAPES[shape])
    new = flag(old[0], tmp_path / FINAL[len(old)], SPEC, MANUAL, recommended=CACHE)
    logits = []
    for path, spec in ((old[0], "off"), (new[0], str(SPEC))):
        with Model(path) as model, model.context(n_ctx=512, n_batch=64) as context:
            assert model.streaming() == spec
            assert bool(api().kv_bytes(context.handle, STREAMING)) == (spec != "off")
            logits.append(context.decode(range(10, 30)))
    assert (logits[0] == logits[1]).all()  # the prompt is no longer than sink + window


def test_keys_keep_their_order_and_ours_their_places(tmp_path):
    keys = SPEC.to_metadata("llama") | MEASURED.to_metadata() | {"lighttransfer.other": Typed("uint32", 7)}
    (old,) = write_small(tmp_path / "old.gguf", keys=keys)
    names = list(read_layout(old).pairs)
    other = StreamingSpec((0, 2), N_LAYER, window=9, prefill="stream")
    (new,) = flag(old, tmp_path / "new.gguf", other, MEASURED)
    assert list(read_layout(new).pairs) == [name for name in names if name != "lighttransfer.other"]
    assert_only_our_keys_differ(old, new)
    (new,) = flag(old, tmp_path / "manual.gguf", other, MANUAL)
    assert (read_model(new).spec, read_model(new).provenance) == (other, MANUAL)
    (new,) = flag(old, tmp_path / "off.gguf", None)
    assert list(read_layout(new).pairs) == [name for name in names if not is_ours(name)]


def test_what_cannot_be_read_is_copied_as_it_is(tmp_path):
    keys = {
        "x.long": Typed("array of uint32", list(range(3000))),
        "x.words": Typed("array of string", [f"w{i}" for i in range(3000)]),
        "x.text": Typed("string", "@@@@"),
    }
    (old,) = write_small(tmp_path / "old.gguf", keys=keys)
    old.write_bytes(old.read_bytes().replace(b"@@@@", b"\xff\xfe\x00\x80"))  # not UTF-8
    (new,) = flag(old, tmp_path / "new.gguf", SPEC, MANUAL)
    raw = [path.read_bytes() for path in (old, new)]
    pairs = [read_layout(path).pairs for path in (old, new)]
    for key, pair in pairs[0].items():
        copied = pairs[1][key]
        assert raw[0][pair.start : pair.stop] == raw[1][copied.start : copied.stop]


@pytest.mark.slow
@pytest.mark.parametrize("alignment, step", [(32, 1), (64, 7)])
def test_every_padding(tmp_path, alignment, step):
    ends = set()
    for n in range(0, alignment, step):
        (old,) = write_small(tmp_path / "old.gguf", name="n" * (n + 1), alignment=alignment)
        ends.add(read_layout(old).tensor_infos.stop % alignment)
        (new,) = flag(old, tmp_path / "new.gguf", SPEC, MANUAL, overwrite=True)
        assert_only_our_keys_differ(old, new)
        (back,) = flag(new, tmp_path / "back.gguf", None, overwrite=True)
        assert digest(back) == digest(old)
    assert len(ends) == len(range(0, alignment, step))


@pytest.mark.parametrize("name", ["n" * n for n in range(1, 6)])
def test_a_first_file_without_tensors_and_padding(tmp_path, name):
    old = write_small(tmp_path / "old.gguf", name=name, files=3, tensors_in_first=False)
    os.truncate(old[0], read_layout(old[0]).tensor_infos.stop)
    new = flag(old[0], tmp_path / FINAL[3], SPEC, MANUAL)
    assert read_model(new[0]).spec == SPEC
    assert read_layout(new[0]).tensor_infos.stop == new[0].stat().st_size
    back = flag(new[0], tmp_path / "back-00001-of-00003.gguf", None)
    assert digest(back[0]) == digest(old[0])


def test_ranges_of_the_parts(tmp_path):
    for alignment in (None, 64):
        (path,) = write_small(tmp_path / "a.gguf", alignment=alignment)
        layout, reader = read_layout(path), gguf.GGUFReader(path)
        assert layout.alignment == reader.alignment == (alignment or 32)
        ends = [0, *(pair.stop for pair in layout.pairs.values())]
        for key, pair in layout.pairs.items():
            field = reader.fields[key]
            assert pair == range(field.offset, field.offset + sum(int(part.nbytes) for part in field.parts))
            assert ends[list(layout.pairs).index(key)] in (0, pair.start)
        assert layout.tensor_infos.start == ends[-1] == reader.tensors[0].field.offset
        assert layout.data == range(reader.data_offset, path.stat().st_size)


def test_progress_reaches_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(flagging, "_KERNEL_CHUNK", 20_000)
    monkeypatch.setattr(flagging, "_BUFFER", 10_000)
    old = write_small(tmp_path / "old.gguf", files=3)
    seen: list[tuple[int, int]] = []
    new = flag(old[0], tmp_path / FINAL[3], SPEC, MANUAL, progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in new)
    assert seen == sorted(seen) and len(seen) > 5
    assert seen[-1] == (size, size) and {total for _, total in seen} == {size}


def test_a_buffer_smaller_than_what_is_copied(tmp_path, monkeypatch):
    """Nothing is copied beyond the end of a part, behind which other keys follow than before."""
    (old,) = flag(write_small(tmp_path / "plain.gguf")[0], tmp_path / "old.gguf", SPEC, MANUAL)
    changed = StreamingSpec((0,), SPEC.n_layer, 1, 7)
    (expected,) = flag(old, tmp_path / "expected.gguf", changed, MANUAL)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(flagging, "_BUFFER", 37)
    (new,) = flag(old, tmp_path / "new.gguf", changed, MANUAL)
    assert new.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("failure", ["EXDEV", "nothing copied", "not there"])
def test_where_the_kernel_cannot_copy(tmp_path, monkeypatch, failure):
    def cannot(*_: object) -> int:
        if failure == "EXDEV":
            raise OSError(18, "Invalid cross-device link")
        return 0

    (old,) = write_small(tmp_path / "old.gguf")
    if failure == "not there":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", cannot, raising=False)
    monkeypatch.setattr(flagging, "_BUFFER", 10_000)
    (new,) = flag(old, tmp_path / "new.gguf", SPEC, MANUAL)
    assert_only_our_keys_differ(old, new)


# ------------------------------------------------------------------------------------------------ refusals


def test_the_same_file_is_refused(tmp_path):
    old = write_small(tmp_path / "old.gguf", files=3)
    (single,) = write_small(tmp_path / "single.gguf")
    (tmp_path / "link.gguf").symlink_to(single)
    (tmp_path / "hard.gguf").hardlink_to(single)
    (tmp_path / "new-00002-of-00003.gguf").hardlink_to(old[2])
    before = {path: digest(path) for path in tmp_path.iterdir()}
    for source, destination in (
        (single, single),
        (single, tmp_path),
        (single, tmp_path / "link.gguf"),
        (tmp_path / "link.gguf", single),
        (single, tmp_path / "hard.gguf"),
        (old[0], old[0]),
        (old[0], tmp_path / FINAL[3]),
    ):
        with pytest.raises(ValueError, match="is the same file as .*: give it another name, or use --in-place"):
            flag(source, destination, SPEC, overwrite=True)
    assert {path: digest(path) for path in tmp_path.iterdir()} == before


def test_destinations_that_will_not_do(tmp_path):
    old = write_small(tmp_path / "old.gguf", files=3)
    (single,) = write_small(tmp_path / "single.gguf")
    for name in ("new.gguf", "part-00003-of-00003.gguf"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "pipe.gguf").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    for source, name, overwrite, complaint in (
        (single, "new.gguf", False, "new.gguf: exists, remove it or use --overwrite"),
        (single, "no/new.gguf", False, "the folder .*/no doesn't exist"),
        (single, "pipe.gguf", True, "is there and is no ordinary file"),
        (old[0], "part-00001-of-00003.gguf", False, "part-00003-of-00003.gguf: exists"),
        (old[0], "a.gguf", False, "a.gguf: is the first of 3 files, must be named like model-00001-of-00003.gguf"),
        (old[0], "a-00001-of-00002.gguf", False, "must be named like model-00001-of-00003.gguf"),
        (old[0], "a-00002-of-00003.gguf", False, "is not the first of 3 files, which is named a-00001-of-00003.gguf"),
        (old[1], "a-00001-of-00003.gguf", False, "is part 2 of 3, name the first one: old-00001-of-00003.gguf"),
    ):
        with pytest.raises((ValueError, OSError), match=complaint):
            flag(source, tmp_path / name, SPEC, overwrite=overwrite)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "new.gguf").read_text() == "mine"


def test_into_a_folder_and_over_other_files(tmp_path):
    old = write_small(tmp_path / "old.gguf", files=3)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in old:
        (folder / path.name).write_text("mine")
    assert flag(old[0], folder, SPEC, overwrite=True) == [folder / path.name for path in old]
    assert read_model(folder / old[0].name).spec == SPEC
    assert sorted(folder.iterdir()) == [folder / path.name for path in old]


def test_the_first_file_comes_last(tmp_path, monkeypatch):
    """Never is a model to be loaded that has files of two."""
    old = write_small(tmp_path / "old.gguf", files=3)
    new = flag(old[0], tmp_path / FINAL[3], SPEC)
    seen = []
    rename = Path.replace

    def replace(path: Path, target: Path) -> Path:
        seen.append((target.name, new[0].exists()))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    flag(old[0], new[0], SPEC, overwrite=True)
    assert seen == [(path.name, False) for path in reversed(new)]


def test_models_that_cannot_stream_so(tmp_path):
    (path,) = write_small(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"a\.gguf: .*layers.*must be an array of bool, one for each of the 4 layers"):
        flag(path, tmp_path / "b.gguf", StreamingSpec((1,), 3))
    raw = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(raw[: read_layout(path).data.start])
    with pytest.raises(ValueError, match=r"cut\.gguf: is cut off"):
        flag(cut, tmp_path / "b.gguf", SPEC)
    (path,) = write_small(tmp_path / "aligned.gguf", alignment=64)
    raw = path.read_bytes()
    key = b"general.alignment" + struct.pack("<I", 4)
    path.write_bytes(raw.replace(key + struct.pack("<I", 64), key + struct.pack("<I", 48)))
    with pytest.raises(ValueError, match=r"general.alignment = 48 \(uint32\): must be an uint32 and a power of two"):
        flag(path, tmp_path / "b.gguf", SPEC)
    assert not (tmp_path / "b.gguf").exists()


def test_a_vocabulary_that_is_cut_off(tmp_path):
    keys = {"x.words": Typed("array of string", [f"word {i}" for i in range(3000)])}
    (path,) = write_small(tmp_path / "a.gguf", keys=keys)
    raw, words = path.read_bytes(), read_layout(path).pairs["x.words"]
    for end in (*range(words.stop - 30, words.stop), words.start + 2000):
        path.write_bytes(raw[:end])
        with pytest.raises(ValueError, match=r"a\.gguf: is cut off"):
            read_layout(path)
    beyond = bytearray(raw)
    beyond[words.start + 39 : words.start + 47] = b"\xff" * 8  # the length of the first word
    path.write_bytes(beyond)
    with pytest.raises(ValueError, match=r"a\.gguf: is cut off"):
        read_layout(path)


def test_off_repairs_what_cannot_be_loaded(tmp_path):
    wrong = {"llama.attention.streaming.window": Typed("uint32", 0)}
    (bad,) = write_small(tmp_path / "bad.gguf", keys=wrong)
    (good,) = write_small(tmp_path / "good.gguf")
    with pytest.raises(ValueError, match="streaming.layers: is missing"):
        read_model(bad)
    (new,) = flag(bad, tmp_path / "new.gguf", None)
    assert digest(new) == digest(good)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_never_gives_anything_but_a_clear_error(tmp_path, data):
    good, bad, new = (tmp_path / name for name in ("good.gguf", "bad.gguf", "new.gguf"))
    if not good.exists():
        write_small(good, alignment=64)
    layout = read_layout(good)
    raw = bytearray(good.read_bytes()[: data.draw(st.sampled_from([layout.data.start, 10**9]))])
    tail = layout.tensor_infos.start - 100
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 400) | st.integers(tail, layout.data.start))
        number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))
        part = struct.pack("<Q", number)[: data.draw(st.integers(1, 8))]
        raw[at : at + len(part)] = part
    bad.write_bytes(raw)
    try:
        flag(bad, new, SPEC, MANUAL, overwrite=True)
    except ValueError as error:
        assert str(error).startswith(str(bad)) and "\n" not in str(error)
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------------ in place


def sectors(path: Path) -> list[bytes]:
    raw = path.read_bytes()
    return [raw[at : at + SECTOR] for at in range(0, len(raw), SECTOR)]


def hybrid_with_keys_at(path: Path, residue: int) -> Path:
    """A hybrid file in which the bools of its layers begin `residue` bytes after the beginning of a sector."""

    def write(n: int) -> int:
        (file,) = write_small(path, name="n" * n, keys=SPEC.to_metadata("llama") | MANUAL.to_metadata())
        return (read_layout(file).pairs["llama.attention.streaming.layers"].stop - N_LAYER) % SECTOR

    assert write(1 + (residue - write(1)) % SECTOR) == residue
    return path


def test_in_place_writes_one_sector(tmp_path, monkeypatch):
    path = hybrid_with_keys_at(tmp_path / "a.gguf", 0)
    inode, before = path.stat().st_ino, sectors(path)
    spec = StreamingSpec((0, 1), N_LAYER, sink=5, window=77)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert flag_in_place(path, spec, MANUAL)
    assert len(synced) == 1
    assert (path.stat().st_ino, read_model(path).spec) == (inode, spec)
    after = sectors(path)
    assert len(after) == len(before)
    assert sum(old != new for old, new in zip(before, after)) == 1
    assert not flag_in_place(path, spec, MANUAL)
    assert flag_in_place(path, SPEC, MANUAL)
    assert sectors(path) == before


def test_in_place_only_where_it_is_safe(tmp_path):
    path = hybrid_with_keys_at(tmp_path / "a.gguf", SECTOR - 10)  # between the layers and the window two sectors meet
    before = digest(path)
    for spec, provenance, complaint in (
        (StreamingSpec((0, 1), N_LAYER, window=99), MANUAL, "the change is in 2 sectors of 512 bytes"),
        (SPEC, MEASURED, r"would take [\d,]+ bytes instead of [\d,]+: write a new file instead"),
        (None, None, "would take .* write a new file instead"),
        (StreamingSpec((3,), 5), MANUAL, "must be an array of bool"),
    ):
        with pytest.raises(ValueError, match=complaint):
            flag_in_place(path, spec, provenance)
        assert digest(path) == before
    for other, make in (("link.gguf", "symlink_to"), ("hard.gguf", "hardlink_to")):
        getattr(tmp_path / other, make)(path)
        with pytest.raises(ValueError, match="has other names, which would change with it"):
            flag_in_place(tmp_path / other, StreamingSpec((0, 1), N_LAYER, sink=2, window=30), MANUAL)
    assert digest(path) == before
    (tmp_path / "hard.gguf").unlink()
    assert flag_in_place(path, StreamingSpec((0, 1), N_LAYER, sink=2, window=30), MANUAL)  # the layers alone: one sector
