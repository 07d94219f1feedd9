"""How a training step grows with length and depth: two laws fitted to the measured points, drawn as
an SVG.

    seconds a sequence   t(T) = a T + b T^2     matrix products over tokens, and attention's scores over pairs
    seconds a sequence   t(L) = c + d L         embedding, head and what does not grow; layers

Points are the rows of step.py's table: dense, and one series for each saving. Plain Python, no
plotting library.

Legend: T tokens, L layers.
"""

import math

WIDE, HIGH, LEFT, TOP, GAP = 330, 260, 60, 40, 90  # a panel, its place, and between two
COLORS = ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")


def fit(points: list, powers: tuple) -> tuple:
    """[(x, seconds)] -> (a, b), both >= 0, of a x^p + b x^q with the smallest sum of squared
    relative errors.

    Divided by the seconds t, the law is a u + b v = 1, u = x^p / t, v = x^q / t: two linear
    equations.
    """
    u, v = ([x ** power / t for x, t in points] for power in powers)
    dot = lambda one, two: sum(a * b for a, b in zip(one, two))
    uu, uv, vv, u1, v1 = dot(u, u), dot(u, v), dot(v, v), sum(u), sum(v)
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:
        a, b = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
        if min(a, b) >= 0:
            return a, b
    # the better alone
    return max(((u1 / uu, 0.0), (0.0, v1 / vv)), key=lambda ab: ab[0] * u1 + ab[1] * v1)


def series(rows: list, depth: int | None, length: int | None) -> dict:
    """{name: [(x, seconds a sequence)]} by length at one depth, or by depth at one length; the
    other is None.
    """
    out = {}
    for row in rows:
        if depth in (None, row["layers"]) and length in (None, row["length"]):
            x = row["length"] if length is None else row["layers"]
            points = out.setdefault("dense", {}), out.setdefault(f"{row['saving']:.0%} saved", {})
            for own, name in zip(points, ("dense", "unimod")):
                own.setdefault(x, []).append(row[f"{name}_ms"] / 1000 / row["batch"])
    return {name: [(x, sum(t) / len(t)) for x, t in sorted(points.items())] for name, points in out.items()}


def laws(rows: list, depth: int, length: int) -> dict:
    """{"length": {name: {"points", "linear": a, "square": b, "equal_at": a / b}},
    "depth": {name: {"points", "fixed": c, "layer": d}}}; equal_at None: no T^2 part was seen."""
    out = {"length": {}, "depth": {}}
    for name, points in series(rows, depth, None).items():
        a, b = fit(points, (1, 2))
        out["length"][name] = {"points": points, "linear": a, "square": b, "equal_at": a / b if b else None}
    for name, points in series(rows, None, length).items():
        c, d = fit(points, (0, 1))
        out["depth"][name] = {"points": points, "fixed": c, "layer": d}
    return out


def counted_equal_at(rows: list, depth: int) -> float:
    """The length at which counted FLOPs of dense are half linear, half T^2: from the counts of
    two lengths.
    """
    counts = {row["length"]: row["dense_flops"] / row["batch"] for row in rows if row["layers"] == depth}
    a, b = fit(sorted(counts.items()), (1, 2))
    return a / b if b > 0 else math.inf


# The drawing

class Panel:
    """Axes from data to pixels; each method returns SVG."""

    def __init__(self, number: int, xs, ys, log: bool):
        self.left, self.log = LEFT + number * (WIDE + GAP), log
        low, high = min(ys), max(ys)
        self.x = (min(xs), max(xs)) if log else (0, max(xs) * 1.05)
        self.y = (low / 1.3, high * 1.3) if log else (min(0, low * 1.1), high * 1.1)

    def place(self, x: float, y: float) -> tuple:
        scale = math.log if self.log else float
        share = [(scale(v) - scale(a)) / ((scale(b) - scale(a)) or 1) for v, (a, b) in ((x, self.x), (y, self.y))]
        return self.left + WIDE * share[0], TOP + HIGH * (1 - share[1])

    def frame(self, title: str, label: str) -> str:
        middle, below = self.left + WIDE / 2, TOP + HIGH
        return (f'<rect x="{self.left}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>'
                f'<text x="{middle}" y="{TOP - 12}" text-anchor="middle">{title}</text>'
                f'<text x="{middle}" y="{below + 34}" text-anchor="middle">{label}</text>')

    def ticks(self, xs, ys, unit: float = 1000) -> str:
        """Labels of both axes, y in units of 1 / unit."""
        out = []
        for x in xs:
            px, py = self.place(x, self.y[0])
            out.append(f'<text x="{px:.1f}" y="{py + 16:.1f}" text-anchor="middle">{x:,}</text>')
        for y in ys:
            px, py = self.place(self.x[0], y)
            label = f"{unit * y:,.0f}" if unit * y >= 10 else f"{unit * y:.2g}"
            out.append(f'<text x="{px - 5:.1f}" y="{py + 4:.1f}" text-anchor="end">{label}</text>'
                       f'<line x1="{px:.1f}" y1="{py:.1f}" x2="{px + WIDE:.1f}" y2="{py:.1f}" stroke="#eee"/>')
        return "".join(out)

    def dots(self, points: list, color: str) -> str:
        return "".join('<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'.format(*self.place(*point), color)
                       for point in points)

    def line(self, points: list, color: str, dash: str = "") -> str:
        """Through points that lie in the panel."""
        path = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-dasharray="{dash}"/>'

    def curve(self, law, color: str, dash: str = "") -> str:
        """The part of the law that lies in the panel, 40 points of it."""
        (a, b), (low, high) = self.x, self.y
        xs = [a * (b / a) ** (i / 40) if self.log else a + (b - a) * i / 40 for i in range(41)]
        return self.line([(x, law(x)) for x in xs if low <= law(x) <= high], color, dash)


def round_steps(low: float, high: float, log: bool) -> list:
    """Round numbers for an axis: 1, 2, 5 times powers of ten, or a few even steps."""
    if log:
        return [m * 10.0 ** e for e in range(-9, 6) for m in (1, 2, 5) if low <= m * 10.0 ** e <= high]
    step = next(m * 10.0 ** e for e in range(-9, 6) for m in (1, 2, 5) if high / (m * 10.0 ** e) <= 6)
    return [i * step for i in range(math.ceil(low / step), 7) if i * step <= high]


def panel(number: int, fitted: dict, title: str, label: str, log: bool, law, parts=()) -> str:
    """One panel: points and law of every series; of dense also the parts, dashed."""
    points = [point for own in fitted.values() for point in own["points"]]
    xs, ys = zip(*points)
    axes = Panel(number, xs, ys, log)
    out = [axes.frame(title, label), axes.ticks(sorted(set(xs)), round_steps(*axes.y, log))]
    for color, own in zip(COLORS, fitted.values()):
        out += [axes.curve(lambda x: law(own, x), color), axes.dots(own["points"], color)]
    out += [axes.curve(lambda x: part(fitted["dense"], x), COLORS[0], "4 4") for part in parts]
    return "\n".join(out)


def draw(fitted: dict) -> str:
    """What `laws` returned -> SVG: milliseconds a sequence by length (logarithmic) and by depth."""
    names = list(fitted["length"])
    legend = "".join(f'<text x="{LEFT + 110 * i}" y="{TOP + HIGH + 62}" fill="{color}">{name}</text>'
                     for i, (name, color) in enumerate(zip(names, COLORS)))
    note = f'<text x="{LEFT}" y="{TOP + HIGH + 82}">lines: fitted laws; dashed: the T and the T² part of dense</text>'
    linear, square = lambda own, x: own["linear"] * x, lambda own, x: own["square"] * x * x
    by_length = panel(0, fitted["length"], "milliseconds a sequence = a T + b T²", "T tokens", True,
                      lambda own, x: linear(own, x) + square(own, x), (linear, square))
    by_depth = panel(1, fitted["depth"], "milliseconds a sequence = c + d L", "L layers", False,
                     lambda own, x: own["fixed"] + own["layer"] * x)
    return svg(LEFT + 2 * WIDE + GAP + 30, TOP + HIGH + 100, f"{by_length}\n{by_depth}\n{legend}{note}")


def svg(width: int, height: int, body: str) -> str:
    """A whole file."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}</svg>\n')
