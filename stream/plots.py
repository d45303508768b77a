"""The report's charts as inline SVG, whose colours the page's style decides (light or dark). Must not know Kafka."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.report_data import ITM_BINS, Curve, Histogram
from stream.report_drift import ReportDrift, error_shares

# Each stands for a custom property of the page's style (templates/report.html): SVG in a page may use those.
INK, FAINT, SOFT, ACCENT = "#010101", "#020202", "#030303", "#040404"
LINES = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909")
PROPERTIES = {
    INK: "--ink",
    FAINT: "--rule",
    SOFT: "--soft",
    **{colour: f"--line-{i}" for i, colour in enumerate(LINES)},
}
PARTITIONS_DRAWN = len(LINES)
BARS_MAX = 120
CODES_SHOWN = 12
KEYWORD_CHARACTERS = 24
ERROR_UNIT = 0.1  # of the baseline's mean
WIDTH_IN, HEIGHT_IN = 8.6, 2.9


def keep_rate(curves: list[Curve], share: float) -> str:
    """Kept ÷ counted along the input: of each stretch (dots) and up to there (line), against the quota M."""

    def draw(axes: Any) -> None:
        shown = curves if len(curves) <= PARTITIONS_DRAWN else [_all(curves)]
        for curve, colour in zip(shown, LINES, strict=False):
            edges = curve.begin + (np.arange(len(curve.counted)) + 1) * (curve.cut - curve.begin) / len(curve.counted)
            some = curve.counted > 0
            label = f"partition {curve.partition}" if curve.partition >= 0 else f"all {len(curves)} partitions"
            axes.plot(edges[some], curve.kept[some] / curve.counted[some], ".", color=colour, alpha=0.45, markersize=4)
            axes.plot(
                edges[some],
                np.cumsum(curve.kept)[some] / np.cumsum(curve.counted)[some],
                color=colour,
                linewidth=1.6,
                label=label,
            )
        axes.axhline(share, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"quota M = {100 * share:.3g} %")
        top = max([share, *(_largest(curve) for curve in shown)])
        axes.set_ylim(0, min(1.0, 1.15 * top) if top < 1 else 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(
            "offset in the raw topic" if curves == shown else "share of each partition's offsets, in 1/1000"
        )
        axes.set_ylabel("kept ÷ counted")
        _legend(axes)

    return _svg("keep-rate", "Keep-rate along the input against the quota", draw)


def cluster_sizes(sizes: NDArray[np.int64]) -> str:
    """Counted and kept pairs of every cluster, the largest first. sizes  (clusters, 2)."""

    def draw(axes: Any) -> None:
        x = np.arange(1, len(sizes) + 1)
        bars = len(sizes) <= BARS_MAX
        for column, colour, label in ((0, SOFT, "counted"), (1, ACCENT, "in the set")):
            if bars:
                axes.bar(x, sizes[:, column], width=0.8, color=colour, label=label)
            else:
                axes.fill_between(x, sizes[:, column], step="mid", color=colour, linewidth=0, label=label)
        axes.set_xlabel("clusters, the largest first")
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.margins(x=0.01)
        _legend(axes)

    return _svg("cluster-sizes", "Counted pairs and pairs in the set of each cluster", draw)


def itm(raw: Histogram, original: Histogram, refined: Histogram) -> str:
    """Shares of pairs by score: all raw captions, the kept ones as they came, and the kept ones refined."""

    def draw(axes: Any) -> None:
        edges = np.linspace(0, 1, ITM_BINS + 1)
        for histogram, colour, label, filled in (
            (raw, SOFT, "raw", True),
            (original, LINES[1], "kept, original captions", False),
            (refined, ACCENT, "kept, refined captions", False),
        ):
            if not histogram.n:
                continue
            share = histogram.counts / histogram.n
            axes.stairs(share, edges, color=colour, fill=filled, linewidth=0 if filled else 1.6, label=label)
            axes.axvline(histogram.mean, color=colour, linewidth=1, linestyle=(0, (4, 3)))  # the mean
        axes.set_xlim(0, 1)
        axes.set_xlabel("image-text matching score (ITM)")
        axes.set_ylabel("share of pairs")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        _legend(axes)

    return _svg("itm", "Distribution of image-text matching scores", draw)


def drift(seen: ReportDrift) -> list[str]:
    """The newest pairs against each of the bundle's baselines, and each signal over time in units of its threshold."""
    charts = (
        _drift_itm(seen),
        _drift_clusters(seen),
        _drift_codes(seen),
        _drift_changed_codes(seen),
        _drift_errors(seen),
        _drift_over_time(seen),
    )
    return [chart for chart in charts if chart]


def _drift_itm(seen: ReportDrift) -> str:
    baseline = seen.baseline.itm
    if baseline is None or not seen.itm.sum() or not baseline.sum():
        return ""

    def draw(axes: Any) -> None:
        edges = np.linspace(0, 1, len(baseline) + 1)
        axes.stairs(
            baseline / baseline.sum(), edges, color=SOFT, fill=True, linewidth=0, label="baseline of the bundle"
        )
        axes.stairs(seen.itm / seen.itm.sum(), edges, color=ACCENT, linewidth=1.6, label="newest pairs")
        axes.set_xlim(0, 1)
        axes.set_xlabel("image-text matching score (ITM) of raw captions")
        _shares(axes, "share of pairs")

    return _svg("drift-itm", "Matching scores of the newest pairs against the baseline", draw)


def _drift_clusters(seen: ReportDrift) -> str:
    baseline = seen.baseline.occupancy
    if baseline is None or not seen.occupancy.sum() or not baseline.sum():
        return ""

    def draw(axes: Any) -> None:
        order = np.argsort(-baseline, kind="stable")
        edges = np.arange(len(order) + 1) + 0.5
        axes.stairs(
            (baseline / baseline.sum())[order],
            edges,
            color=SOFT,
            fill=True,
            linewidth=0,
            label="baseline of the bundle",
        )
        axes.stairs(
            (seen.occupancy / seen.occupancy.sum())[order], edges, color=ACCENT, linewidth=1.2, label="newest pairs"
        )
        axes.set_xlabel("clusters, the largest of the baseline first")
        _shares(axes, "share of pairs")

    return _svg("drift-clusters", "Pairs of each cluster against the baseline", draw)


def _drift_codes(seen: ReportDrift) -> str:
    baseline = seen.baseline.codes
    if baseline is None or not seen.codes.sum() or not baseline.sum():
        return ""
    together = -(-len(baseline) // BARS_MAX)  # codes in a bar

    def draw(axes: Any) -> None:
        order = np.argsort(-baseline, kind="stable")
        starts = np.arange(0, len(order), together)
        edges = np.append(starts, len(order)) + 0.5
        before = np.add.reduceat((baseline / baseline.sum())[order], starts)
        now = np.add.reduceat((seen.codes / seen.codes.sum())[order], starts)
        axes.stairs(before, edges, color=SOFT, fill=True, linewidth=0, label="baseline of the bundle")
        axes.stairs(now, edges, color=ACCENT, linewidth=1.2, label="newest pairs")
        axes.margins(x=0.01)
        several = f", {together} in a bar" if together > 1 else ""
        axes.set_xlabel(f"codes, the most used of the baseline first{several}")
        _shares(axes, "share of tokens")

    return _svg("drift-codes", "Uses of the codes against the baseline", draw)


def _drift_changed_codes(seen: ReportDrift) -> str:
    baseline = seen.baseline.codes
    if baseline is None or not seen.codes.sum() or not baseline.sum():
        return ""
    before, now = baseline / baseline.sum(), seen.codes / seen.codes.sum()
    most = np.argsort(-np.abs(now - before), kind="stable")[:CODES_SHOWN]
    most = most[now[most] != before[most]]

    def draw(axes: Any) -> None:
        y = np.arange(len(most))
        axes.barh(y - 0.2, before[most], 0.4, color=SOFT, label="baseline of the bundle")
        axes.barh(y + 0.2, now[most], 0.4, color=ACCENT, label="newest pairs")
        axes.set_yticks(y, [_code_name(code, seen.keywords) for code in most.tolist()], parse_math=False)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.set_xlabel(f"share of tokens, of the {len(most)} codes that changed most")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        _legend(axes)

    height_in = 1.0 + 0.3 * len(most)
    return _svg("drift-changed-codes", "The codes whose use changed most", draw, height_in) if len(most) else ""


def _code_name(code: int, keywords: list[str]) -> str:
    keyword = keywords[code] if code < len(keywords) else ""
    return f"{keyword[:KEYWORD_CHARACTERS]} ({code})" if keyword else f"code {code}"


def _drift_errors(seen: ReportDrift) -> str:
    """Densities, since the baseline's bins hold as many pairs each and so differ in width; one mean of the baseline is 1."""
    found, mean = error_shares(seen.baseline, seen.errors), seen.baseline.error_mean
    if found is None or not mean:
        return ""
    edges, before, now = found
    x = edges / mean
    widths = np.diff(x) / ERROR_UNIT

    def draw(axes: Any) -> None:
        axes.stairs(before / widths, x, color=SOFT, fill=True, linewidth=0, label="baseline of the bundle")
        axes.stairs(now / widths, x, color=ACCENT, linewidth=1.6, label="newest pairs")
        for at, colour in ((1.0, INK), (float(seen.errors.mean()) / mean, ACCENT)):
            axes.axvline(at, color=colour, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, float(x[-1]) * 1.01)
        axes.set_xlabel("squared distance to the own centroid ÷ the baseline's mean")
        _shares(axes, f"share of pairs in each {ERROR_UNIT}")

    return _svg("drift-errors", "Quantisation errors of the newest pairs against the baseline", draw)


def _drift_over_time(seen: ReportDrift) -> str:
    if not seen.stretches:
        return ""

    def draw(axes: Any) -> None:
        for signal, colour in zip(seen.stretches[0].signals, LINES, strict=False):
            points = [(s, one) for s in seen.stretches for one in s.signals if one.name == signal.name]
            x = [(s.begin + s.end) / 2 for s, _ in points]
            y = [one.effect / one.threshold for _, one in points]
            axes.plot(x, y, ".-", color=colour, linewidth=1.4, markersize=5, label=signal.name.replace("_", " "))
        axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.axhline(-1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the offsets since the switch to this bundle")
        axes.set_ylabel("effect ÷ threshold")
        _legend(axes)

    return _svg("drift-time", "Drift of each signal over time in units of its threshold", draw)


def _shares(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _legend(axes)


def _legend(axes: Any) -> None:
    """Above the chart, where it hides nothing; none for a stream that has nothing to draw."""
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper left", ncols=4, frameon=False)


def _all(curves: list[Curve]) -> Curve:
    return Curve(-1, 0, 1000, sum_of(curve.counted for curve in curves), sum_of(curve.kept for curve in curves))


def sum_of(arrays: Any) -> NDArray[np.int64]:
    """The sum of arrays of one shape."""
    total: NDArray[np.int64] = np.sum(list(arrays), axis=0)
    return total


def _largest(curve: Curve) -> float:
    some = curve.counted > 0
    return float((curve.kept[some] / curve.counted[some]).max(initial=0.0))


def _svg(name: str, description: str, draw: Callable[[Any], None], height_in: float = HEIGHT_IN) -> str:
    """An SVG element without a size of its own, its text left as text. `name` keeps the ids of several apart."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # The text stays text: it is the reader's fonts that must have the letters.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{name}-", text)
    for colour, name_of_property in PROPERTIES.items():
        text = text.replace(colour, f"var({name_of_property})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
