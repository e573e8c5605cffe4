"""Pictures of an evaluation: that they show what they should, and are the same every time."""

from __future__ import annotations

import math

import pytest

from lt_gguf.evaluation import pictures
from lt_gguf.report import plots
from lt_gguf.statistics import Estimate

matplotlib = pytest.importorskip("matplotlib")

LENGTHS, DEPTHS = [1024, 4096], [0, 0.125, 1]
FULL = [[1.0, 1.0], [1.0, 0.998], [0.99, 0.0]]
HYBRID = [[1.0, 0.4], [0.75, math.nan], [1.0, 0.6]]
BARS = {
    "full": {"single": Estimate(1.0, 0.99, 1.0), "multi-key": Estimate(0.96, 0.93, 0.98)},
    "$hybrid": {"single": Estimate(0.5, 0.4, 0.7), "multi-key": Estimate(0.25, math.nan, math.inf)},
    "other": {"multi-key": Estimate(0.1, 0.05, 0.2)},
}


def heat_map():
    return pictures.heat_map({"full $a$": FULL, "hybrid": HYBRID}, LENGTHS, DEPTHS, "Needles of $a_b$ <m>", "500 a field")


def bars(**options):
    return pictures.bars(BARS, "Tasks of $a_b$ <m>", "95 % intervals", **options)


def texts(axes) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in axes.texts}


def test_each_field_has_its_colour_and_number():
    figure = heat_map()
    first, second, colour_bar = figure.axes
    assert [axes.get_title() for axes in (first, second)] == [r"full \$a\$", "hybrid"]
    fields = second.collections[-1]
    assert fields.get_array().filled(-1).tolist() == [[1.0, 0.4], [0.75, -1], [1.0, 0.6]]
    assert fields.get_clim() == first.collections[-1].get_clim() == (0, 1)  # whatever was measured
    assert texts(first) == {(0, 0): "100", (1, 0): "100", (0, 1): "100", (1, 1): "99.8", (0, 2): "99", (1, 2): "0"}
    assert texts(second) == {(0, 0): "100", (1, 0): "40", (0, 1): "75", (0, 2): "100", (1, 2): "60"}
    assert colour_bar.get_ylabel() == "score"


def test_depth_goes_down_and_length_across():
    axes = heat_map().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1024", "4096"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 %", "12.5 %", "100 %"]
    low, high = axes.get_ylim()
    assert low > high  # the beginning of the text is above
    assert axes.get_xlim() == (-0.5, 1.5)


def test_numbers_can_be_read_on_their_field():
    axes = heat_map().axes[1]
    colours = matplotlib.colormaps["cividis"]

    def luminance(colour) -> float:
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), matplotlib.colors.to_rgb(colour)))

    for text in axes.texts:
        score = float(text.get_text()) / 100
        assert abs(luminance(text.get_color()) - luminance(colours(score))) > 0.35


def test_what_was_not_measured_is_hatched_and_explained():
    assert [text.get_text() for text in heat_map().legends[0].get_texts()] == ["not measured"]
    figure = pictures.heat_map({"full": FULL}, LENGTHS, DEPTHS, "all")
    assert not figure.legends and len(figure.axes) == 2
    hatched = [c.get_hatch() for c in heat_map().axes[1].collections]
    assert hatched[0] == "xxx" and hatched[1] is None


@pytest.mark.parametrize("n_panels, n_lengths, numbered", [(1, 3, True), (5, 6, True), (3, 30, False)])
def test_numbers_where_there_is_room(n_panels, n_lengths, numbered):
    scores = [[0.5] * n_lengths] * 2
    figure = pictures.heat_map({str(i): scores for i in range(n_panels)}, range(n_lengths), [0, 1], "many")
    *panels, _ = figure.axes
    assert len(panels) == n_panels
    assert all(len(axes.texts) == (2 * n_lengths if numbered else 0) for axes in panels)
    assert figure.get_figwidth() <= 16


def test_heat_maps_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"scores of b: have the shape \(2, 3\), must be \(3, 2\)"):
        pictures.heat_map({"a": FULL, "b": [[1, 1, 1], [1, 1, 1]]}, LENGTHS, DEPTHS, "wrong")
    with pytest.raises(ValueError, match="scores: are none"):
        pictures.heat_map({}, LENGTHS, DEPTHS, "none")


def test_bars_have_their_heights_and_intervals():
    axes = bars().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["single", "multi-key"]
    heights = {round(bar.get_x() + bar.get_width() / 2, 2): bar.get_height() for bar in axes.patches}
    assert heights == {-0.28: 1.0, 0.72: 0.96, 0.0: 0.5, 1.0: 0.25, 1.28: 0.1}
    assert all(bar.get_y() == 0 for bar in axes.patches)
    lines = [collection.get_segments()[0] for collection in axes.collections]
    intervals = {round(line[0][0], 2): (round(line[0][1], 6), round(line[1][1], 6)) for line in lines}
    # one without an interval has none that is drawn
    assert intervals == {-0.28: (0.99, 1.0), 0.72: (0.93, 0.98), 0.0: (0.4, 0.7), 1.28: (0.05, 0.2)}
    numbers = {round(text.xy[0], 2): text.get_text() for text in axes.texts if hasattr(text, "xy")}
    assert numbers == {-0.28: "100", 0.72: "96", 0.0: "50", 1.0: "25", 1.28: "10"}
    places = {text.get_text(): text.xy[1] for text in axes.texts if hasattr(text, "xy")}  # above the interval, if there is one
    assert places == {"100": 1.0, "96": 0.98, "50": 0.7, "25": 0.25, "10": 0.2}
    (missing,) = (text for text in axes.texts if not hasattr(text, "xy"))
    assert missing.get_text().strip() == "not measured" and missing.get_position()[0] == pytest.approx(0.28)


def test_no_two_of_many_bars_look_the_same():
    names = [f"model {i}" for i in range(20)]
    figure = pictures.bars({name: {"a": Estimate(0.5, 0.4, 0.6)} for name in names}, "many", full="model 3")
    looks = [(bar.get_facecolor(), bar.get_hatch()) for bar in figure.axes[0].patches]
    assert len(set(looks)) == 20
    grey = matplotlib.colors.to_rgba(plots.FULL_COLOUR)
    assert [i for i, (colour, _) in enumerate(looks) if colour == grey] == [3]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert [(patch.get_facecolor(), patch.get_hatch()) for patch in legend.get_patches()] == looks


def overlaps(figure, artists) -> list[tuple[int, int]]:
    figure.draw_without_rendering()
    boxes = [artist.get_window_extent() for artist in artists]
    return [(i, j) for j, b in enumerate(boxes) for i, a in enumerate(boxes[:j]) if a.overlaps(b)]


@pytest.mark.slow
@pytest.mark.parametrize("n_bars, n_tasks", [(2, 1), (3, 5), (10, 2), (1, 12)])
@pytest.mark.parametrize("percent", [True, False])
def test_nothing_lies_on_anything_else(n_bars, n_tasks, percent):
    value = 0.987 if percent else 0.00123
    estimates = {
        f"layers={i};sink=4;window=1020;prefill=full": {f"task number {j}": Estimate(value, value, value) for j in range(n_tasks)}
        for i in range(n_bars)
    }
    figure = pictures.bars(estimates, "A title", "and its subtitle", label="nats", percent=percent)
    axes = figure.axes[0]
    assert len(axes.texts) == n_bars * n_tasks
    assert not overlaps(figure, [figure.legends[0], figure._suptitle, *axes.get_xticklabels(), axes.yaxis, *axes.texts])
    assert axes.get_window_extent().height > 2.6 * figure.dpi  # however many names there are
    assert figure.bbox.containsx(figure.legends[0].get_window_extent().x0)


@pytest.mark.parametrize(
    "names", [["full"], ["layers=0-5;sink=4;window=1020;prefill=full", "layers=1,3,5-9;sink=4;window=1020"], [*"abcde"]]
)
def test_nothing_lies_on_a_panel(names):
    figure = pictures.heat_map(dict.fromkeys(names, HYBRID), [65536, 131072], DEPTHS, "A title", "and its subtitle")
    panels = figure.axes[:-1]
    assert not overlaps(figure, [figure.legends[0], figure._suptitle, figure.axes[-1], *panels])
    labels = [part for axes in panels for part in (axes.title, axes.xaxis.label, axes.yaxis.label) if part.get_text()]
    numbers = [number for axes in panels for number in axes.texts]
    assert not overlaps(figure, [figure.legends[0], figure._suptitle, *labels, *numbers])
    lowest = [axes for axes in panels if axes.xaxis.label.get_text()]
    assert len(lowest) == min(3, len(names))
    assert all(label.get_visible() for axes in lowest for label in axes.get_xticklabels())


def test_values_that_are_no_shares():
    figure = pictures.bars({"kl": {"text": Estimate(0.00123, 0.001, 0.002)}}, "KL", label="nats", percent=False)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.0012"] and axes.get_ylabel() == "nats"
    assert axes.get_ylim()[0] == 0 and 0.002 < axes.get_ylim()[1] < 0.003
    assert bars().axes[0].get_ylim()[1] > 1
    with pytest.raises(ValueError, match="estimates: are none"):
        pictures.bars({"full": {}}, "nothing")


def test_titles_are_no_formulas(tmp_path):
    for figure in (heat_map(), bars()):
        assert figure.get_suptitle().startswith(("Needles of \\$a_b\\$ <m>\n500", "Tasks of \\$a_b\\$ <m>\n95"))
        svg = plots.save_as(figure, tmp_path / "a.svg").read_text()
        assert "of $a_b$ &lt;m&gt;" in svg


@pytest.mark.parametrize("draw", [bars, heat_map])
def test_both_formats_and_the_same_every_time(tmp_path, draw):
    first = [path.read_bytes() for path in plots.save(draw(), tmp_path / "a")]
    assert first == [path.read_bytes() for path in plots.save(draw(), tmp_path / "b")]
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]
