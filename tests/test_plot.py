"""plot.py: figures that are well-formed, and whose boxes have the sizes of their numbers."""
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimod_mini.plot import BLUE, GREY, ORANGE, Grid, bars, grids, shade

SVG = "{http://www.w3.org/2000/svg}"


def boxes(figure):
    """(x, y, width, height, color) of every box but the ground."""
    found = []
    for box in ElementTree.fromstring(figure).iter(f"{SVG}rect"):
        sizes = [float(box.get(name)) for name in ("x", "y", "width", "height")]
        found.append((*sizes, box.get("fill")))
    return found[1:]


def texts(figure):
    return [item.text for item in ElementTree.fromstring(figure).iter(f"{SVG}text")]


@given(st.lists(st.lists(st.sampled_from((BLUE, ORANGE, None)), min_size=3, max_size=3),
                min_size=1, max_size=4))
def test_a_grid_has_a_box_for_each_cell(cells):
    """As many of each colour, in rows from top to bottom, inside of the figure."""
    figure = grids("a < b", [Grid("one", cells, tuple(f"row {i}" for i in range(len(cells))),
                                  {0: "first"}, "columns")], {GREY: "legend"}, size=10)
    drawn = [box for box in boxes(figure) if box[4] != GREY]
    wanted = [color for row in cells for color in row if color]
    assert [box[4] for box in drawn] == wanted
    width, height = map(float, ElementTree.fromstring(figure).get("viewBox").split()[2:])
    assert all(x + w <= width and y + h <= height for x, y, w, h, _ in boxes(figure))
    assert {"a < b", "one", "first", "columns", "legend", "row 0"} <= set(texts(figure))


def test_bars_are_as_tall_as_their_numbers():
    """The tallest fills the height; parts are stacked from below without a gap."""
    figure = bars("title", [{"a": 1, "b": 3}, {"a": 2}], {"a": BLUE, "b": ORANGE}, ["0", "1"],
                  "layer", "FLOPs", height=100)
    tall = {(box[4], box[0]): box for box in boxes(figure) if box[2] > 50 and box[3] > 1}
    heights = sorted(box[3] for box in tall.values())
    assert heights == pytest.approx([25, 50, 75])
    (low,) = [box for box in tall.values() if box[3] == pytest.approx(25)]
    (high,) = [box for box in tall.values() if box[3] == pytest.approx(75)]
    assert high[1] + high[3] == pytest.approx(low[1], abs=0.1)


def test_shades():
    assert shade(BLUE, 0) == "#FFFFFF" and shade(BLUE, 1) == BLUE
