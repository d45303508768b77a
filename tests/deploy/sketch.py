"""A dashboard's panels, placed as Grafana would and drawn by matplotlib from live answers to their queries: a sketch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

COLUMN_IN, ROW_IN = 0.72, 0.34
INK, FAINT = "#1f2430", "#c8ccd4"
# A panel, its targets and the courses that each returned.
Answers = Mapping[int, list[tuple[dict[str, Any], list[dict[str, Any]]]]]
SCALES = {"percentunit": (100.0, " %"), "s": (1.0, " s"), "bytes": (1 / 2**20, " MiB"), "Bps": (1 / 2**20, " MiB/s"),
          "cps": (1.0, "/s")}  # fmt: skip


def sketch(dashboard: dict[str, Any], answers: Answers, phases: Mapping[str, tuple[float, float]], out: Path) -> None:
    """Draws all panels of `dashboard` into the picture `out`, with the phases as shades behind the courses."""
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(24 * COLUMN_IN, (rows + 2) * ROW_IN), dpi=75)
    origin = min(begin for begin, _ in phases.values())
    for panel in panels:
        place = panel["gridPos"]
        left, bottom = place["x"] / 24, 1 - (place["y"] + place["h"] + 2) / (rows + 2)
        box = (left + 0.028, bottom + 1.7 / (rows + 2), place["w"] / 24 - 0.038, (place["h"] - 3.0) / (rows + 2))
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], fontsize=9, loc="left", color=INK)
        axes.tick_params(labelsize=7, colors=INK)
        for side in axes.spines.values():
            side.set_color(FAINT)
        {"stat": _stat, "timeseries": _courses, "heatmap": _heatmap}[panel["type"]](axes, panel, answers, origin)
        if panel["type"] == "timeseries":
            for number, (begin, end) in enumerate(phases.values()):
                if number % 2:
                    axes.axvspan(begin - origin, end - origin, color="#f4e3d0", zorder=0, linewidth=0)
    names = ", ".join(f"{name} {begin - origin:.0f}–{end - origin:.0f} s" for name, (begin, end) in phases.items())
    figure.text(0.01, 1 - 0.8 / (rows + 2), f"{dashboard['title']}   (a sketch drawn from live queries; {names})",
                fontsize=11, color=INK)  # fmt: skip
    figure.savefig(out)
    plt.close(figure)


def _stat(axes: Any, panel: dict[str, Any], answers: Answers, origin: float) -> None:
    axes.axis("off")
    factor, unit = _scale(panel)
    last = [float(course["values"][-1][1]) for _, courses in answers[panel["id"]] for course in courses]
    text = "  ".join(f"{factor * value:,.3g}{unit}" for value in last)
    axes.text(0.5, 0.45, text, fontsize=20, ha="center", va="center", color="#1f60c4", transform=axes.transAxes)


def _courses(axes: Any, panel: dict[str, Any], answers: Answers, origin: float) -> None:
    factor, unit = _scale(panel)
    lines = [
        (_legend(target, course["metric"]), np.array(course["values"], float).T)
        for target, courses in answers[panel["id"]]
        for course in courses
    ]
    if panel["fieldConfig"]["defaults"]["custom"].get("stacking", {}).get("mode") == "normal":
        times = np.unique(np.concatenate([times for _, (times, _) in lines]))
        heights = []
        for _, (own, values) in lines:
            height = np.zeros(len(times))
            height[np.searchsorted(times, own)] = np.nan_to_num(values)
            heights.append(factor * height)
        axes.stackplot(times - origin, heights, labels=[name for name, _ in lines], alpha=0.7, linewidth=0)
    else:
        for name, (times, values) in lines:
            axes.plot(times - origin, factor * np.where(np.isfinite(values), values, np.nan), label=name, linewidth=1.2)
        axes.set_ylim(bottom=panel["fieldConfig"]["defaults"].get("min"))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}{unit}")
    axes.grid(color="#eceef2", linewidth=0.6)
    axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=4, frameon=False)


def _heatmap(axes: Any, panel: dict[str, Any], answers: Answers, origin: float) -> None:
    courses = sorted(
        (course for _, found in answers[panel["id"]] for course in found), key=lambda c: float(c["metric"]["le"])
    )
    times = np.unique([float(time) for course in courses for time, _ in course["values"]])
    below = np.zeros((len(courses), len(times)))
    for row, course in enumerate(courses):
        own, values = np.array(course["values"], float).T
        below[row, np.searchsorted(times, own)] = np.nan_to_num(values)
    inside = np.diff(below, axis=0, prepend=0).clip(0)
    axes.pcolormesh(times - origin, np.arange(len(courses)), inside, cmap="Blues", shading="nearest")
    shown = range(0, len(courses), max(1, len(courses) // 6))
    axes.set_yticks(list(shown), [f"≤ {courses[row]['metric']['le']}" for row in shown])


def _scale(panel: dict[str, Any]) -> tuple[float, str]:
    return SCALES.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))


def _legend(target: dict[str, Any], metric: dict[str, str]) -> str:
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: metric.get(found[1], ""), target["legendFormat"])
    return text if len(text) < 24 else f"{text[:20]}…"
