"""The figures of `edgellm bench` as one HTML file that needs nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment

from edgellm import __version__
from edgellm.cli.bench import memory_lines, named, shown, speculation_line, unit
from edgellm.cli.chat import describe_settings
from edgellm.errors import OutputError

_TEMPLATE = Path(__file__).with_name("bench_template.html")
_LABEL, _WIDE, _ROW = 150, 420, 22  # of a chart, in its own units


def write_page(path: Path, found: dict[str, Any]) -> None:
    """OutputError where it can't be written."""
    page = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    contestants = list(found["memory"])
    content = {
        "name": Path(found["model"]).name,
        "version": __version__,
        "size": f"{found['n_bytes'] / 1e6:.1f} MB",
        "settings": describe_settings(found["settings"]),
        "rounds": found["rounds"],
        "contestants": contestants,
        "rows": [_row(figure, contestants) for figure in found["figures"]],
        "charts": [
            {"title": title, **_chart([f for f in found["figures"] if f["kind"] == kind], contestants)}
            for kind, title in (("decode", "Writing, tokens per second"), ("prompt", "Reading, tokens per second"))
        ],
        "lines": [*memory_lines(found["memory"]), speculation_line(found["speculation"])],
    }
    try:
        path.write_text(page.render(r=content), encoding="utf-8")
    except OSError as exc:
        raise OutputError(f"cannot write the page {path}: {exc.strerror or exc}") from exc


def _row(figure: dict[str, Any], contestants: list[str]) -> dict[str, Any]:
    cells = []
    for name in contestants:
        value = figure["values"][name]
        cells.append({"median": shown(value["median"]), "spread": f"{shown(value['low'])} – {shown(value['high'])}"})
    ratio = None if figure["ratio"] is None else f"{figure['ratio']:.3f}"
    return {"name": named(figure), "unit": unit(figure), "cells": cells, "ratio": ratio}


def _chart(figures: list[dict[str, Any]], contestants: list[str]) -> dict[str, Any]:
    """A bar for each figure and contestant, with a line from the slowest to the fastest round."""
    longest = max((value["high"] for figure in figures for value in figure["values"].values()), default=1.0)

    def place(speed: float) -> float:
        return round(_LABEL + _WIDE * speed / longest, 1)

    bars: list[dict[str, Any]] = []
    for figure in figures:
        for i, name in enumerate(contestants):
            value = figure["values"][name]
            y = 4 + len(bars) * _ROW
            ends = {key: place(value[key]) for key in ("median", "low", "high")}
            label = named(figure) if i == 0 else ""
            bars.append({"y": y, "label": label, "who": i, "speed": shown(value["median"]), **ends})
    return {"bars": bars, "left": _LABEL, "height": 8 + len(bars) * _ROW, "width": _LABEL + _WIDE + 70}
