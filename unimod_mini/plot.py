"""Figures as SVG, in one call each: grids of coloured cells, and stacked bars.

The colours are those of Okabe and Ito, which the colour-blind tell apart, on a white ground that
stays white on dark pages. Text has at least 11 units where a figure is 640 units wide.
"""

from typing import NamedTuple
from xml.sax.saxutils import escape

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
GREY, LIGHT = "#999999", "#E8E8E8"
TEXT, LINE = 11, 16                # height of letters, and of a line of them


class Grid(NamedTuple):
    """Rows of cells; a cell is a colour, or None for nothing."""
    title: str
    cells: list
    rows: tuple = ()               # a name for each row, or none
    columns: dict = {}             # {column: its name}, below the cells
    across: str = ""               # what the columns are


def shade(color: str, share: float) -> str:
    """White at share 0, the colour at share 1."""
    channels = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(255 + share * (channel - 255)) for channel in channels]
    return "#{:02X}{:02X}{:02X}".format(*mixed)


def text(x: float, y: float, words: str, anchor: str = "start", color: str = "#222222") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{TEXT}" text-anchor="{anchor}" '
            f'fill="{color}">{escape(words)}</text>')


def box(x: float, y: float, width: float, height: float, color: str) -> str:
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{color}"/>')


def document(width: float, height: float, title: str, parts: list) -> str:
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" font-family="sans-serif" shape-rendering="crispEdges">')
    ground = box(0, 0, width, height, "white")
    lines = [head, f"<title>{escape(title)}</title>", ground, text(10, LINE, title), *parts]
    return "\n".join([*lines, "</svg>", ""])


def grids(title: str, panels: list, legend: dict, per_row: int = 2, size: float = 9,
          gap: float = 1) -> str:
    """Panels (Grid) beside each other, `per_row` in a row. legend: {color: what it means}."""
    parts, y, width = [], LINE + 10.0, 0.0
    for start in range(0, len(panels), per_row):
        x, bottom = 10.0, y
        for panel in panels[start:start + per_row]:
            right, low, drawn = grid(panel, x, y, size, gap)
            parts += drawn
            x, bottom = right + 24, max(bottom, low)
        width, y = max(width, x), bottom + 12
    drawn, right = legend_line(legend, y)
    width = max(width, right, 12 + 0.56 * TEXT * len(title))
    return document(width, y + LINE + 6, title, parts + drawn)


def grid(panel: Grid, x: float, y: float, size: float, gap: float) -> tuple:
    """One panel -> its right and lower end, and what is drawn."""
    parts = [text(x, y + TEXT, panel.title)]
    left, top = x, y + LINE + 4
    if panel.rows:
        left += 8 + 0.6 * TEXT * max(map(len, panel.rows))
    for number, row in enumerate(panel.cells):
        lower = top + size * number
        if panel.rows:
            parts.append(text(left - 5, lower + size / 2 + 4, panel.rows[number], "end"))
        for column, color in enumerate(row):
            if color:
                parts.append(box(left + size * column, lower, size - gap, size - gap, color))
    n_column = max(map(len, panel.cells))
    right, bottom = left + size * n_column, top + size * len(panel.cells)
    for column, name in panel.columns.items():
        parts.append(text(left + size * (column + 0.5), bottom + TEXT + 2, name, "middle"))
    if panel.columns:
        bottom += LINE
    if panel.across:
        parts.append(text((left + right) / 2, bottom + TEXT + 2, panel.across, "middle"))
        bottom += LINE
    return max(right, x + 0.56 * TEXT * len(panel.title)), bottom, parts


def legend_line(legend: dict, y: float) -> tuple:
    """{color: what it means} -> what is drawn, and its right end."""
    parts, x = [], 10.0
    for color, meaning in legend.items():
        parts += [box(x, y, TEXT, TEXT, color), text(x + TEXT + 5, y + TEXT - 1, meaning)]
        x += TEXT + 21 + 0.56 * TEXT * len(meaning)
    return parts, x


def bars(title: str, rows: list, colors: dict, names: list, across: str, up: str,
         width: float = 640, height: float = 180) -> str:
    """Stacked bars. rows: a {part: number} for each bar, names: what stands below it.

    colors: {part: color}, the parts from below; up: what the height is, with its unit.
    """
    left, top = 62.0, LINE + 14.0
    step = (width - left - 10) / len(rows)
    totals = [sum(row.get(part, 0) for part in colors) for row in rows]
    most, parts = max(totals), []
    for share in (0, 0.5, 1):
        y = top + height * (1 - share)
        parts += [box(left, y, width - left - 10, 0.6, GREY),
                  text(left - 6, y + 4, f"{share * most:.3g}", "end")]
    for number, row in enumerate(rows):
        x, y = left + step * number, top + height
        for part, color in colors.items():
            tall = height * row.get(part, 0) / most
            y -= tall
            parts.append(box(x + 1, y, step - 2, tall, color))
        parts.append(text(x + step / 2, top + height + TEXT + 3, names[number], "middle"))
    parts += [text(width / 2, top + height + 2 * LINE, across, "middle"),
              text(10, top - 3, up)]
    drawn, _ = legend_line({color: part for part, color in colors.items()},
                           top + height + 2 * LINE + 8)
    return document(width, top + height + 3 * LINE + 12, title, parts + drawn)
