"""Draws a dashboard of Grafana without Grafana, from what a running Prometheus answers to its queries:

    python docs/figures/dashboard.py http://127.0.0.1:9090 docs/deploy/grafana-dashboard.json docs/figures/dashboard.png

Queries, units, legends and places are the dashboard's, all that can be chosen is chosen, and as much of a legend is
seen as in Grafana; colours and fonts are not Grafana's. What is drawn in docs/metrics.md is the load that
docs/figures/load.sh makes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from numpy.typing import NDArray
from PIL import Image

COLUMNS, LINE, GAP = 24, 38, 8  # of Grafana's grid; pixels of a line, of which so many are between panels
WIDTH = 1500  # pixels, as a browser's window
HEAD, MARGIN, ROW = 30, 10, 19  # pixels: above a panel's content, around it, of a legend
LEGEND = 0.35  # of a panel's content at most, as Grafana has it; one scrolls there
DPI = 100
INK, PALE, EDGE, PAPER = "#24292e", "#6e7781", "#d8dce1", "#f4f5f5"
COLOURS = ("#56a64b", "#e0b400", "#3274d9", "#ff780a", "#e02f44", "#8f3bb8", "#37872d", "#1f60c4", "#fa6400", "#7c2ea3")
CALCS: dict[str, tuple[str, Callable[[NDArray[np.float64]], float]]] = {
    "lastNotNull": ("Last *", lambda values: float(values[-1])),  # which may be NaN, as Prometheus says of 0 / 0
    "max": ("Max", lambda values: float(np.fmax.reduce(values))),
}
NOTHING = "-"


@dataclass(frozen=True)
class Series:
    """``values`` at each of the panel's times; nan where none is ``there``, and where it is NaN."""

    name: str
    values: NDArray[np.float64]
    there: NDArray[np.bool_]

    def calculated(self, calc: str) -> float | None:
        return CALCS[calc][1](self.values[self.there]) if self.there.any() else None


class Prometheus:
    """Asked as Grafana asks: ``scrape`` is what its data source is told of the interval of scrapes; seconds."""

    def __init__(self, url: str, *, end: float, seconds: float, scrape: float, variables: dict[str, str]) -> None:
        self._url = url.rstrip("/")
        self._scrape = scrape
        self._variables = variables
        self._end, self._seconds = end, seconds

    def ask(self, panel: dict[str, Any], points: int) -> tuple[NDArray[np.float64], list[Series]]:
        """All targets of a panel that is ``points`` pixels wide."""
        step = max(math.ceil(self._seconds / points), self._scrape)
        start, end = (moment // step * step for moment in (self._end - self._seconds, self._end))
        times = np.arange(start, end + step / 2, step)
        series = []
        for target in panel["targets"]:
            query = self._filled_in(target["expr"], rate=max(step + self._scrape, 4 * self._scrape))
            if target.get("range", True):
                answers = self._get("query_range", query=query, start=start, end=end, step=step)
            else:
                answers = self._get("query", query=query, time=end)
            for answer in answers:
                values, there = np.full(len(times), np.nan), np.zeros(len(times), np.bool_)
                for moment, value in answer.get("values") or [answer["value"]]:
                    at = round((moment - start) / step)
                    values[at], there[at] = float(value), True
                series.append(Series(_legend(target.get("legendFormat", ""), answer["metric"]), values, there))
        return times, series

    def _filled_in(self, query: str, *, rate: float) -> str:
        values = self._variables | {"__rate_interval": f"{rate:g}s"}
        return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match.group(1)], query)

    def _get(self, what: str, **parameters: object) -> list[dict[str, Any]]:
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result


def _legend(template: str, labels: dict[str, str]) -> str:
    if not template:
        return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items() if name != "__name__") + "}"
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match.group(1), match.group(1)), template)


def variables_of(dashboard: dict[str, Any]) -> dict[str, str]:
    """With everything chosen."""
    return {
        variable["name"]: variable.get("allValue") or ".*"
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    }


# -- units -------------------------------------------------------------------------------------------------------------

LETTERS = {1000: ("", "k", "M", "G", "T"), 1024: ("", "Ki", "Mi", "Gi", "Ti")}
SCALED = {  # base, and what stands behind the number
    "short": (1000, ""),
    "bytes": (1024, " {}B"),
    "Bps": (1000, " {}B/s"),
    "binBps": (1024, " {}B/s"),
}


def shown(value: float | None, defaults: dict[str, Any]) -> str:
    """With the panel's words for what is no number."""
    if value is None:
        return str(defaults.get("noValue", NOTHING))
    if math.isnan(value):
        words = (each["options"] for each in defaults.get("mappings", ()) if each["type"] == "special")
        return next((str(each["result"]["text"]) for each in words if each["match"] == "nan"), "NaN")
    return formatted(value, defaults["unit"], defaults.get("decimals"))


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """As Grafana writes it, or nearly."""
    if unit == "percentunit":
        return f"{value * 100:.3g}%" if decimals is None else f"{value * 100:.{decimals}f}%"
    if unit == "s":
        size = abs(value)
        for least, word in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if size >= least:
                return f"{value / least:.3g} {word}"
        return "0 s"
    base, behind = SCALED[unit]
    power = 0
    while abs(value) >= base and power < len(LETTERS[base]) - 1:
        value, power = value / base, power + 1
    number = f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
    letter = LETTERS[base][power]
    return number + (behind.format(letter) if behind else f" {letter}".rstrip())


# -- panels ------------------------------------------------------------------------------------------------------------


class Canvas:
    """A figure in pixels from its upper left corner."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=PAPER)

    def box(self, x: float, y: float, width: float, height: float, **how: Any) -> None:
        place = (x / WIDTH, 1 - (y + height) / self.height)
        self.figure.add_artist(
            Rectangle(place, width / WIDTH, height / self.height, transform=self.figure.transFigure, **how)
        )

    def text(self, x: float, y: float, words: str, **how: Any) -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, words, parse_math=False, **({"va": "center"} | how))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height), facecolor="none"
        )


def draw(dashboard: dict[str, Any], prometheus: Prometheus) -> Figure:
    panels = dashboard["panels"]
    canvas = Canvas(max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * LINE + GAP)
    column = (WIDTH - GAP) / COLUMNS
    for panel in panels:
        place = panel["gridPos"]
        x, y = GAP + place["x"] * column, GAP + place["y"] * LINE
        width, height = place["w"] * column - GAP, place["h"] * LINE - GAP
        if panel["type"] == "row":
            hidden = f"  ({len(panel['panels'])} panels)" if panel["collapsed"] else ""
            arrow = "▸" if panel["collapsed"] else "▾"
            canvas.text(x, y + height / 2, f"{arrow} {panel['title']}{hidden}", color=INK, fontsize=11, weight="bold")
            continue
        times, series = prometheus.ask(panel, int(width))
        canvas.box(x, y, width, height, facecolor="white", edgecolor=EDGE, linewidth=0.8, zorder=-1)
        canvas.text(x + MARGIN, y + HEAD / 2, panel["title"], color=INK, fontsize=10, weight="bold")
        drawn = _draw_stat if panel["type"] == "stat" else _draw_lines
        drawn(canvas, panel, times, series, (x, y, width, height))
    return canvas.figure


Place = tuple[float, float, float, float]


def _draw_stat(
    canvas: Canvas, panel: dict[str, Any], times: NDArray[np.float64], series: Sequence[Series], place: Place
) -> None:
    x, y, width, height = place
    defaults = panel["fieldConfig"]["defaults"]
    (calc,) = panel["options"]["reduceOptions"]["calcs"]
    value = series[0].calculated(calc) if series else None
    words = shown(value, {"noValue": "No data"} | defaults)
    canvas.text(x + width / 2, y + 0.5 * height, words, color=INK, fontsize=22, ha="center")
    if series and panel["options"]["graphMode"] == "area":
        axes = canvas.axes(x + 1, y + 0.68 * height, width - 2, 0.32 * height - 1)
        values = series[0].values
        axes.fill_between(times, values, color=COLOURS[2], alpha=0.25, linewidth=0)
        axes.plot(times, values, color=COLOURS[2], linewidth=1)
        axes.set_xlim(times[0], times[-1])
        top = defaults.get("max", max(float(np.nanmax(values)) if np.isfinite(values).any() else 0, 1e-12))
        axes.set_ylim(0, top * 1.05)
        axes.axis("off")


def _draw_lines(
    canvas: Canvas, panel: dict[str, Any], times: NDArray[np.float64], series: Sequence[Series], place: Place
) -> None:
    x, y, width, height = place
    if not series:
        canvas.text(x + width / 2, y + height / 2, "No data", color=PALE, fontsize=12, ha="center")
        return
    room = max(int((LEGEND * (height - HEAD)) // ROW), 2)  # lines of the legend, its head among them
    used = min(len(series) + 1, room) * ROW
    axes = canvas.axes(x + 72, y + HEAD + 4, width - 72 - 2 * MARGIN, height - HEAD - used - 34)
    custom, moments = panel["fieldConfig"]["defaults"]["custom"], date2num(times.astype("datetime64[s]"))
    below = np.zeros(len(times))
    for number, one in enumerate(series):
        colour, values = COLOURS[number % len(COLOURS)], one.values
        if stacked := custom["stacking"]["mode"] == "normal":
            values = below + np.nan_to_num(values)
        if custom["fillOpacity"]:
            floor = below if stacked else 0.0
            axes.fill_between(moments, floor, values, color=colour, alpha=custom["fillOpacity"] / 100, linewidth=0)
        axes.plot(moments, values, color=colour, linewidth=custom["lineWidth"] * 1.2)
        below = values if stacked else below
    _scale(axes, panel["fieldConfig"]["defaults"], moments)
    _draw_legend(canvas, panel, series, (x + MARGIN, y + height - used - 4, width - 2 * MARGIN, used), room)


def _scale(axes: Axes, defaults: dict[str, Any], moments: NDArray[np.float64]) -> None:
    axes.set_xlim(moments[0], moments[-1])
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    top = defaults.get("max", float(values[np.isfinite(values)].max(initial=0)))
    axes.set_ylim(defaults.get("min"), top * 1.05 if top else 1)
    if SCALED.get(defaults["unit"], (1000, ""))[0] == 1024:
        axes.yaxis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(axes.get_ylim()[1] / 5))))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, defaults["unit"])))
    locator = AutoDateLocator(maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.tick_params(labelsize=8, colors=PALE, length=0)
    axes.grid(color="#e9ecef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _draw_legend(canvas: Canvas, panel: dict[str, Any], series: Sequence[Series], place: Place, room: int) -> None:
    """A table; as many lines as fit."""
    x, y, width, _ = place
    defaults, options = panel["fieldConfig"]["defaults"], panel["options"]["legend"]
    calcs = options["calcs"]
    rows = list(enumerate(series))
    if "sortBy" in options:
        by = next(calc for calc in calcs if CALCS[calc][0] == options["sortBy"])
        rows.sort(key=lambda row: _rank(row[1].calculated(by)), reverse=options["sortDesc"])
    ends = [x + width - 90 * (len(calcs) - 1 - number) for number in range(len(calcs))]
    hidden = len(series) + 1 - room
    name = f"Name    ({hidden} more below: scroll)" if hidden > 0 else "Name"
    canvas.text(x, y + ROW / 2, name, color=PALE, fontsize=8)
    for calc, end in zip(calcs, ends, strict=True):
        canvas.text(end, y + ROW / 2, CALCS[calc][0], color=PALE, fontsize=8, ha="right")
    for line, (number, one) in enumerate(rows[: room - 1]):
        middle = y + (line + 1.5) * ROW
        canvas.box(x, middle - 2, 14, 4, facecolor=COLOURS[number % len(COLOURS)])
        canvas.text(x + 20, middle, one.name, color=INK, fontsize=8.5)
        for calc, end in zip(calcs, ends, strict=True):
            canvas.text(end, middle, shown(one.calculated(calc), defaults), color=INK, fontsize=8.5, ha="right")


def _rank(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("dashboard", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="that are drawn (default: %(default)g)")
    parser.add_argument("--end", type=float, default=time.time(), help="of them, in Unix time (now)")
    parser.add_argument("--scrape", type=float, default=2.0, help="seconds between scrapes (default: %(default)g)")
    arguments = parser.parse_args()
    dashboard = json.loads(arguments.dashboard.read_text())
    prometheus = Prometheus(
        arguments.prometheus,
        end=arguments.end,
        seconds=arguments.seconds,
        scrape=arguments.scrape,
        variables=variables_of(dashboard),
    )
    draw(dashboard, prometheus).savefig(arguments.output, dpi=DPI)
    with Image.open(arguments.output) as picture:
        few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # colours: a third of the bytes
    few.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
