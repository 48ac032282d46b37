"""Scales and charts: numbers in, markup out, whatever the numbers are."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from abliterate.report.charts import Band, Cells, Dots, Row, bands, dots, heat_map, histogram, intervals
from abliterate.report.layers import frames
from abliterate.report.svg import Scale, key, plain, tag

NAN = float("nan")
numbers = st.floats(-1e12, 1e12, allow_nan=False)


def parsed(markup: Markup) -> ET.Element:
    """The markup as XML, which is stricter than HTML."""
    return ET.fromstring(f"<div>{markup}</div>")


def places(markup: Markup) -> list[float]:
    """Every share of a width or height in it."""
    return [
        float(value.removesuffix("%"))
        for element in parsed(markup).iter()
        for name, value in element.attrib.items()
        if value.endswith("%") and name != "aria-label"
    ]


@given(st.lists(numbers, max_size=6), st.booleans(), st.booleans())
def test_a_scale_holds_its_values_and_has_few_ticks(values: list[float], zero: bool, tight: bool) -> None:
    scale = Scale.over(values, zero=zero, tight=tight)
    assert scale.low < scale.high
    slack = 1e-8 * (scale.high - scale.low)
    assert all(scale.low - slack <= v <= scale.high + slack for v in values)
    assert all(0 <= scale.share(v) <= 1 for v in [*values, -1e300, 1e300])
    assert 1 <= len(scale.ticks) <= 12
    assert not zero or tight or scale.low <= 0 <= scale.high


@given(st.lists(st.floats(0, 1e9), max_size=5))
def test_a_logarithmic_scale_leaves_zeros_at_the_bottom(values: list[float]) -> None:
    scale = Scale.over(values, log=True)
    assert 0 < scale.low < scale.high and scale.share(0) == 0
    assert all(0 <= scale.share(v) <= 1 for v in values) and 1 <= len(scale.ticks) <= 8


def test_ticks_are_round() -> None:
    assert Scale.over([0.013, 0.19], zero=True).ticks == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert Scale.over([1e-7, 3e-5], log=True).ticks == pytest.approx([1e-7, 1e-6, 1e-5, 1e-4])
    assert [plain(v) for v in (0, -2, 0.05, 1e-7, 2e6)] == ["0", "−2", "0.05", "1e−7", "2e6"]
    assert Scale.over([NAN, None]) == Scale(0, 1)


def test_text_and_attributes_are_escaped() -> None:
    made = tag("text", "<script>", tag("b", "&"), class_='"><script>')
    assert made == '<text class="&#34;&gt;&lt;script&gt;">&lt;script&gt;<b>&amp;</b></text>'
    drawn = heat_map(Cells(["<i>"], ["<b>"], [[1.0]], "<u>"), "<label>")
    assert not {"i", "b", "u", "label"} & {element.tag for element in parsed(drawn).iter()}


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, NAN, float("inf"), 1e300])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_every_chart_draws_nothing_one_and_odd_numbers(n: int, value: float) -> None:
    values = [value] * n
    scale = Scale.over(values)
    made = [
        intervals([Row("a", (v, v, v), (None, None, None), scale, "") for v in values], "what"),
        heat_map(Cells(["r"] * n, ["0"] * n, [values] * n, "u"), "what"),
        bands([Band("a", "harmful", values, values)], "what", 0 if n else None),
        dots([Dots("a", "circle", "base", [(0, v, "p") for v in values])], ["0"] * n, "what"),
        histogram(values, Scale.over(values, log=True), "what", [("median", value)] if n else []),
    ]
    for markup in made:
        (image,) = [e for e in parsed(markup).iter("svg") if e.get("role") == "img"]
        assert image.get("aria-label") == "what" and float(image.attrib["height"]) > 0
        assert "nan" not in str(markup).lower() and "inf" not in str(markup).lower()
        assert all(-1e-6 <= place <= 100 + 1e-6 for place in places(markup))


def test_a_heat_map_shades_by_value_and_frames_the_chosen_cell() -> None:
    cells = Cells(["−2", "−1"], ["0", "1"], [[1.0, None], [2.0, 3.0]], "u", row_word="position", chosen=(1, 1))
    drawn = parsed(heat_map(cells, "what"))
    shades = [
        float(e.attrib["fill-opacity"])
        for e in drawn.iter("rect")
        if e.find("title") is not None and "fill-opacity" in e.attrib
    ]
    assert shades == sorted(shades) and shades[-1] == 1
    assert len([e for e in drawn.iter("rect") if e.get("class") == "frame"]) == 1
    said = [e.text for e in drawn.iter("title")]
    assert said[0] == "position −2, layer 0: 1 u" and said[1] == "position −2, layer 1: none"


def test_a_line_breaks_where_a_mean_is_missing() -> None:
    drawn = parsed(bands([Band("a", "harmful", [1, NAN, 2, 3], [0, 0, 1, 1], dashed=True)], "what"))
    assert len([e for e in drawn.iter("path") if "dashed" in e.get("class", "")]) == 2


def test_a_histogram_counts_every_value_once() -> None:
    values = [0.0, 1e-5, 1e-3, 1e-3, 1.0]
    drawn = parsed(histogram(values, Scale.over(values, log=True), "what"))
    assert sum(int(str(e.text).split()[0]) for e in drawn.iter("title")) == len(values)


@pytest.mark.parametrize("figure", [None, -0.001, 2.5])
def test_a_frame_holds_every_prompt_on_its_side_of_the_line(figure: float | None) -> None:
    model = {"harmful": [0, 3, 3, 0, 1], "harmless": [2, 0, 0, 0, 5], "separation": figure, "auc": figure}
    none = model | {"harmful": [0] * 5, "harmless": [0] * 5}
    drawn = parsed(frames([{"low": -1.0, "high": 4.0, "base": model, "edited": none}] * 3, 1, "what"))
    shown = [g.attrib["class"] for g in drawn.iter("g")]
    assert shown == ["step", "step own on", "step"]
    heaps = [p.attrib for p in drawn.iter("path")][:2]
    assert heaps[0]["d"] == "M0 0V0h1V-3h2V0h1V-1h1V0z" and "harmful" in heaps[0]["class"]
    assert heaps[1]["d"] == "M0 0V2h1V0h3V5h1V0z" and "harmless" in heaps[1]["class"]
    said = {None: "–", -0.001: "0.00", 2.5: "2.50"}[figure]
    assert next(drawn.iter("g")).attrib["data-said"] == f"layer 0: base {said}, edited {said} spreads apart"


def test_a_key_tells_series_apart_without_colour() -> None:
    shown = parsed(key([("circle", "base", "base"), ("diamond", "edited", "edited"), ("dashed", "ink", "line")]))
    assert len({e.attrib["d"] for e in shown.iter("path")}) == 2 and len(list(shown.iter("line"))) == 1
