"""Line charts as SVG elements, drawn for pages: colours are those of the page's style."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement

import numpy as np

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 10.0, 36.0  # margins around the plot
MOST_POINTS = 400  # of a line: more than one to two pixels could not be seen
SHARE_OF_MEAN = 0.05  # of the steps over which the smooth line is a mean


class Line(NamedTuple):
    """A line of a chart.

    Args:
        steps: Rising numbers.
        values: A finite number for each.
        style: The class by which the page's style colours it.
    """

    steps: np.ndarray
    values: np.ndarray
    style: str


def thin(line: Line) -> Line:
    """Return a line of few points that still shows the lowest and the highest of all."""
    if len(line.steps) <= MOST_POINTS:
        return line
    groups = np.array_split(np.arange(len(line.steps)), MOST_POINTS // 2)
    chosen = []
    for group in groups:
        low, high = group[line.values[group].argmin()], group[line.values[group].argmax()]
        chosen += sorted({low, high})
    return Line(line.steps[chosen], line.values[chosen], line.style)


def running_mean(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the mean of each value and those around it, and how many these are.

    At both ends there are fewer of them.
    """
    half = round(SHARE_OF_MEAN * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low), 2 * half + 1


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str, lines: Sequence[Line], legend: Mapping[str, str] | None = None
) -> Element:
    """Return a chart of values over steps. Values begin at 0.

    Args:
        title: What it shows, for those who cannot see it.
        lines: At least one, each with at least one point.
        legend: Styles by what they mean, if there is more than one line.
    """
    figure = Element("figure", {"class": "chart"})
    SubElement(figure, "figcaption").text = title
    svg = SubElement(
        figure,
        "svg",
        {
            "viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}",
            "role": "img",
            "aria-label": f"{title} over steps",
        },
    )
    first = min(float(line.steps[0]) for line in lines)
    last = max(float(line.steps[-1]) for line in lines)
    top = max(float(line.values.max()) for line in lines) * 1.05 or 1.0

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    for value in ticks(0.0, top):
        ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y(value), "y2": y(value)}
        SubElement(svg, "line", _written(ends) | {"class": "rule"})
        _label(svg, LEFT - 8, y(value) + 4, f"{value:.6g}", "end")
    for step in ticks(first, last, 6):
        if step == int(step):
            _label(svg, x(step), HEIGHT - BOTTOM + 18, f"{int(step)}", "middle")
    _label(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "step", "middle")
    for line in map(thin, lines):
        points = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(line.steps, line.values, strict=True)]
        if len(points) == 1:
            at = {"cx": x(line.steps[0]), "cy": y(line.values[0]), "r": 3.0}
            SubElement(svg, "circle", _written(at) | {"class": f"dot {line.style}"})
        SubElement(svg, "polyline", {"points": " ".join(points), "class": f"line {line.style}"})
    if legend:
        names = SubElement(figure, "p", {"class": "legend"})
        for name, style in legend.items():
            item = SubElement(names, "span")
            SubElement(item, "i", {"class": f"key {style}"})
            SubElement(item, "span").text = name
    return figure


def _label(svg: Element, x: float, y: float, text: str, anchor: str) -> None:
    place = _written({"x": x, "y": y}) | {"text-anchor": anchor}
    SubElement(svg, "text", place).text = text


def _written(numbers: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{number:.1f}" for name, number in numbers.items()}
