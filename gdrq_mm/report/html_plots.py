"""The plots of the HTML report, as SVG in the text colour of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .compare import NOT_MEASURED, NOT_RUN

Points = Sequence[tuple[int, float]]
"""Iteration and value."""
Rows = Sequence[tuple[int, Mapping[str, str]]]
"""Rows of the comparison table, each with its group: the number of its pair of model and data set."""

LARGEST = 1e30
"""Larger values are not drawn: the arithmetic of a plot overflows."""
POINTS = 60
"""How many points of a curve are drawn at most."""
INK = '#000102'
"""Replaced by the text colour of the page, which may be light or dark."""
COLOURS = (
    *('#2f7ed8', '#e0662b', '#2a9d5c', '#c2408f', '#8a63d2', '#b58900', '#d33c3c'),
    *('#1296a6', '#7a8b2f', '#a0633a', '#6f7fd0', '#d1739a', '#4f8f8a'),
)
MARKERS = 'os^Dv<>PX*'
STYLES = (('--', 'full'), (':', 'none'), ('-.', 'left'), ('-', 'top'))
"""For each model in a plot: the line style of its float baseline, and the filling of its markers."""
DEPTH = LinearSegmentedColormap.from_list('depth', [COLOURS[0], '#9a5bc4', COLOURS[1]])
PLOT: Any = {
    'svg.fonttype': 'none',
    'font.sans-serif': ['DejaVu Sans'],  # the page replaces it by its own
    'text.parse_math': False,
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    **dict.fromkeys(('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'), INK),
}


def metric_plot(rows: Rows, against: str, methods: Sequence[str]) -> Markup:
    """The metric of the rows of one data set against 'size in MB' or 'bits', without those that were not run.

    Args:
        methods: all :func:`series` of the report, so that each has the same colour and marker in every plot.
    """
    rows = [(group, row) for group, row in rows if row['quantized'] not in (NOT_RUN, NOT_MEASURED)]
    bits = sorted({row['bits'] for _, row in rows}, key=bits_key)
    here = [method for method in methods if any(series(row) == method for _, row in rows)]
    side = min(0.25, 0.04 * (len(here) - 1))  # points of different methods at the same bits stand side by side
    shifts = dict(zip(here, np.linspace(-side, side, len(here))))
    places = {text: float(number) for number, text in enumerate([*bits, 'float'])}
    with matplotlib.rc_context(PLOT):
        figure = Figure(figsize=(5, 3.2), layout='constrained')
        axis = figure.subplots()
        groups = list(dict.fromkeys(group for group, _ in rows))
        for group, name in zip(groups, _model_names(rows, groups)):
            line, filling = STYLES[groups.index(group) % len(STYLES)]
            of_group = [row for number, row in rows if number == group]
            bases = {row['float']: row for row in of_group if row['float'] not in (NOT_RUN, NOT_MEASURED)}
            for base, row in bases.items():  # rows of several recipes may start from several float models
                if not math.isfinite(_number(base)):
                    continue
                of = f' of {row["recipe"]}' if len(bases) > 1 and row['recipe'] else ''
                x = places['float'] if against == 'bits' else sizes(row)[0]
                axis.axhline(_number(base), color=INK, linestyle=line, linewidth=0.8, alpha=0.6)
                style: Any = dict(color=INK, linestyle=line, marker='h', fillstyle=filling, markersize=7)
                axis.plot([x], [_number(base)], label=f'float{name}{of}', **style)
            for method in dict.fromkeys(series(row) for row in of_group):
                of_method = [row for row in of_group if series(row) == method]
                shift = shifts[method]
                xs = [places[row['bits']] + shift if against == 'bits' else sizes(row)[1] for row in of_method]
                _draw_method(
                    axis, xs, of_method, f'{" " * method.startswith("_")}{method}{name}', methods.index(method), filling
                )
        _finish(figure, axis, f'{rows[0][1]["metric"]} in %', against)
        if against == 'bits':
            axis.set_xticks(list(places.values()), list(places))
        return _svg(figure, f'{against} {rows[0]}')


def _draw_method(
    axis: Axes, xs: list[float], rows: Sequence[Mapping[str, str]], label: str, number: int, filling: str
) -> None:
    values = [[_number(part) for part in row['quantized'].split(' ± ')] for row in rows]
    spreads = [value[1] if value[1:] and math.isfinite(value[1]) else 0.0 for value in values]
    points = sorted(zip(xs, (value[0] for value in values), spreads))
    x, y, spread = (list(column) for column in zip(*points))
    axis.errorbar(
        x,
        y,
        yerr=spread if any(spread) else None,
        label=label,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        fillstyle=filling,  # type: ignore[arg-type]
        markersize=6,
        linewidth=1,
        capsize=3,
    )


def _finish(figure: Figure, axis: Axes, title: str, against: str) -> None:
    """Labels, a grid, and a legend below the plot."""
    axis.set_ylabel(title)
    axis.set_xlabel(against)
    axis.margins(0.08, 0.12)
    axis.grid(color=INK, alpha=0.12, linewidth=0.6)
    if against != 'bits':
        axis.set_xscale('log')
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.xaxis.set_minor_formatter(NullFormatter())
    labels = axis.get_legend_handles_labels()[1]
    lengths = sorted(map(len, labels), reverse=True)
    columns = next(
        n for n in (3, 2, 1) if sum(lengths[:n]) <= 76 - 10 * n or n == 1
    )  # as many as their letters fit side by side
    figure.set_figheight(3.2 + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(loc='outside lower left', ncols=columns, frameon=False, fontsize=8.5)


def _model_names(rows: Rows, groups: Sequence[int]) -> list[str]:
    """What a legend adds to a method to name its model: '' if there is one, else ', name' or ', name (size)'."""
    if len(groups) == 1:
        return ['']
    first = [next(row for number, row in rows if number == group) for group in groups]
    names = [row['model'] for row in first]
    return [
        f', {row["model"]}' + (f' ({sizes(row)[0]:g} MB)' if names.count(row['model']) > 1 else '') for row in first
    ]


def sizes(row: Mapping[str, str]) -> tuple[float, float]:
    """Megabytes of the float and of the quantized model."""
    before, after = row['size in MB'].split(' → ')
    return _number(before), _number(after)


def _number(text: str) -> float:
    """The number in a cell; nan if it is not one that a plot can show."""
    value = float(text)
    return value if abs(value) <= LARGEST else math.nan


def drawable(points: Points) -> Points:
    """The points of a curve that a plot can show."""
    return [(step, value) for step, value in points if abs(value) <= LARGEST]  # no nan either


def series(row: Mapping[str, str]) -> str:
    """What has a colour of its own in the plots: a method with a recipe."""
    return f'{row["method"]}, recipe {row["recipe"]}' if row['recipe'] else row['method']


def bits_key(bits: str) -> tuple[int, ...]:
    """The sort key of bits: (4, 4) for 'W4A4'."""
    return tuple(map(int, re.findall(r'\d+', bits)))


def curve_plot(curves: Mapping[str, Points], title: str, name: str, rates: Points = ()) -> Markup:
    """One quantity over the training, a line for each layer; the mouse shows the name of a layer.

    Args:
        curves: :func:`drawable` points, at least one for each layer.
        rates: the learning rate, drawn below on the same axis of iterations.
    """
    with matplotlib.rc_context(PLOT):
        figure = Figure(figsize=(3.4, 3.2 if rates else 2.3), layout='constrained')
        heights = (3, 1) if rates else (1,)
        axis, *below = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for number, points in enumerate(curves.values()):
            x, y = zip(*thin(points))
            colour = DEPTH(number / max(1, len(curves) - 1))
            axis.plot(x, y, color=colour, linewidth=1, marker='.' if len(x) < 10 else '', gid=f'layer-{number}')
        values = [value for points in curves.values() for _, value in points]
        if min(values) > 0 and max(values) / min(values) > 20:
            axis.set_yscale('log')
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title, fontsize=9, loc='left')
        for each in below:
            each.plot(*zip(*thin(rates)), color=INK, linewidth=1, marker='.' if len(rates) < 10 else '')
            each.set_title('learning rate', fontsize=9, loc='left')
            each.yaxis.set_major_locator(MaxNLocator(2))
            each.yaxis.set_major_formatter('{x:g}')
        for each in (axis, *below):
            each.grid(color=INK, alpha=0.12, linewidth=0.6)
            each.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        each.set_xlabel('iteration')
        text = _svg(figure, name)
    names = list(curves)
    return Markup(re.sub(r'<g id="layer-(\d+)">', lambda m: f'<g><title>{escape(names[int(m[1])])}</title>', text))


def sparkline(points: Points) -> Markup:
    """A curve as small as a word."""
    shown = [(step, value) for step, value in thin(drawable(points))]
    if len(shown) < 2:
        return Markup('')
    steps, values = (np.array(column, dtype=float) for column in zip(*shown))
    x = 58 * (steps - steps[0]) / max(steps[-1] - steps[0], 1) + 1
    y = 15 - 14 * (values - values.min()) / (values.max() - values.min() or 1)
    line = ' '.join(f'{a:.1f},{b:.1f}' for a, b in zip(x, y))
    return Markup(f'<svg class="spark" viewBox="0 0 60 16" aria-hidden="true"><polyline points="{line}"/></svg>')


def thin(points: Points) -> Points:
    """At most POINTS of the points, evenly spaced, with the first and the last."""
    chosen = np.linspace(0, len(points) - 1, min(len(points), POINTS)).round().astype(int)
    return [points[number] for number in chosen]


def _svg(figure: Figure, name: str) -> Markup:
    """A figure as an SVG element of a page. Its ids depend on `name`, so that those of two figures differ."""
    text = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': name}):
        nobody = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
        figure.savefig(text, format='svg', transparent=True, metadata=nobody)
    svg = text.getvalue()
    svg = re.sub(r'<style.*?</style>', '', svg[svg.index('<svg') :], flags=re.S).replace(INK, 'currentColor')
    svg = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', '', svg, count=5)
    svg = re.sub(r'<g id="(?!layer-)[^"]*"', '<g', svg)
    return Markup(re.sub(r' (d|x|y|transform)="[^"]*"', lambda m: _shorter(m[0]), svg))


def _shorter(attribute: str) -> str:
    """An attribute of coordinates on one line, with two decimals."""
    return re.sub(r'(\.\d\d)\d+', r'\1', ' ' + ' '.join(attribute.split()))
