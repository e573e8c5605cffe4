"""Pictures of lazy ratios: that they show what they should, and are the same every time."""

from __future__ import annotations

import math
import re

import pytest

from lt_gguf.report import plots

matplotlib = pytest.importorskip("matplotlib")

RATIOS = [0.2, 0.8, math.nan, 0.5]
BY_SAMPLE = [[0.1, 0.7, math.nan, 0.4], [0.3, 0.9, math.nan, 0.6]]


def bars():
    return plots.lazy_ratio_bars(RATIOS, (1,), "Lazy ratios of $a_b$ <model>", "sink 2, window 40")


def heat_map():
    return plots.ratio_heat_map(BY_SAMPLE, (1, 3), "By sample", "sink 2, window 40")


def test_streaming_layers_differ_in_more_than_colour():
    axes = bars().axes[0]
    heights = {round(bar.get_x() + 0.4): bar.get_height() for bar in axes.patches}
    assert heights == {0: 0.2, 1: 0.8, 3: 0.5}
    hatched = {round(bar.get_x() + 0.4) for bar in axes.patches if bar.get_hatch()}
    blue = matplotlib.colors.to_rgba(plots.STREAMING_COLOUR)
    coloured = {round(bar.get_x() + 0.4) for bar in axes.patches if bar.get_facecolor() == blue}
    assert hatched == coloured == {1}
    assert [text.get_text() for text in axes.texts] == ["not measured"] and axes.texts[0].get_position()[0] == 2
    assert axes.get_ylim() == (0, 1)
    legend = bars().legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["streams (1)", "full attention (3)"]
    assert axes.get_title() == "sink 2, window 40"


def test_heat_map_marks_the_streaming_layers():
    figure = heat_map()
    axes = figure.axes[0]
    (marks,) = axes.lines
    assert list(marks.get_xdata()) == [1, 3] and marks.get_marker() == "v"
    fields = axes.collections[-1].get_array()
    assert fields.shape == (2, 4) and fields[1, 1] == 0.9
    assert fields.mask.any(axis=0).tolist() == [False, False, True, False]
    low, high = axes.get_ylim()
    assert low > high  # the first sample is the uppermost
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["streams (2)", "not measured"]
    assert not plots.ratio_heat_map([[0.5, 0.6]], (), "all").legends
    assert not plots.ratio_heat_map(BY_SAMPLE, (), "none").axes[0].lines


@pytest.mark.parametrize("draw", [bars, heat_map])
def test_svg_is_the_same_every_time(tmp_path, draw):
    first = plots.save_as(draw(), tmp_path / "first.svg").read_bytes()
    second = plots.save_as(draw(), tmp_path / "second.svg").read_bytes()
    assert first == second
    assert not re.search(rb"<dc:date>", first)


def test_both_formats(tmp_path):
    files = plots.save(bars(), tmp_path / "lazy.ratio")
    assert [path.name for path in files] == ["lazy.ratio.png", "lazy.ratio.svg"]
    assert sorted(tmp_path.iterdir()) == files
    assert files[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in files[1].read_bytes()


def test_a_picture_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = plots.save_as(bars(), tmp_path / "a.png")
    before = path.read_bytes()
    figure = bars()

    def fail(file, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError):
        plots.save_as(figure, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.jpg: must end in .png or .svg"):
        plots.save_as(bars(), tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_layer", [1, 24, 25, 80, 126])
def test_layers_have_numbers_that_do_not_overlap(n_layer):
    figure = plots.lazy_ratio_bars([0.5] * n_layer, (0,), "many")
    ticks = figure.axes[0].get_xticks()
    assert 1 <= len(ticks) <= 24 and ticks[0] == 0


def test_matplotlib_is_imported_when_it_is_needed(monkeypatch):
    import subprocess
    import sys

    code = "import sys, lt_gguf.report, lt_gguf.cli; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib: pip install 'lt-gguf\[plot\]'"):
        plots.check()
