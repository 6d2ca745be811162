"""Pictures of distributions and of predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Distribution:
    """The values that a quantizer sees and what it does to them."""

    name: str
    values: np.ndarray
    """(N,) float32."""
    low: float
    """Lower end of the range, the mean over groups."""
    threshold: float
    """T, the mean over groups."""
    clip_ratio: float
    """Share of the values outside the range."""
    quantized_loss: float
    """The paper's Eq. 3 with p = 1."""
    distance_to_uniform: float
    """Kolmogorov-Smirnov distance of |x| / max|x| to the uniform distribution."""

    def scalars(self) -> dict[str, float]:
        """What is written as curves."""
        names = ('threshold', 'clip_ratio', 'quantized_loss', 'distance_to_uniform')
        return {name: getattr(self, name) for name in names}


def distribution_sheet(distributions: Sequence[Distribution], columns: int = 6) -> np.ndarray:
    """One picture with a histogram each; dashed lines are the ends of the range. Returns (H, W, 3) uint8, RGB."""
    rows = math.ceil(len(distributions) / columns)
    width, height = 2.4 * columns, 1.7 * rows
    figure = Figure(figsize=(width, height), dpi=72)
    # Fixed margins in inches, one artist a histogram and counts whose logarithm is taken here: what matplotlib offers
    # for all of these is 2.5 times slower.
    figure.subplots_adjust(0.1 / width, 0.35 / height, 1 - 0.1 / width, 1 - 0.2 / height, 0.1, 0.6)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for d, axis in zip(distributions, axes):
        counts, edges = np.histogram(d.values, 60)
        color = 'tab:blue' if d.name.endswith('.weight') else 'tab:orange'
        axis.stairs(np.log10(1 + counts), edges, fill=True, color=color)
        for end in (d.low, d.threshold):
            axis.axvline(end, color='black', linestyle='--', linewidth=0.8)
        axis.set_title(d.name[-38:], fontsize=6, pad=2)
        axis.set_xlabel(f'clipped {d.clip_ratio:.1%}, loss {d.quantized_loss:.3f}', fontsize=6, labelpad=1)
        axis.tick_params(labelsize=5, length=2, pad=1)
        axis.set_yticks([])
    for axis in list(axes):
        axis.remove()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def side_by_side(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> np.ndarray:
    """One picture with a row for each of the rows and a title above each column. Returns (H, W, 3) uint8, RGB.

    Args:
        rows: pictures (H, W, 3) uint8, RGB, as many in each row as there are titles.
    """
    height, width = rows[0][0].shape[:2]
    size = (2.6 * len(titles), 2.6 * height / width * len(rows) + 0.3)
    figure = Figure(figsize=size, dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, places in zip(rows, axes):
        for picture, axis in zip(row, places):
            axis.imshow(picture)
            axis.set_axis_off()
    for title, axis in zip(titles, axes[0]):
        axis.set_title(title, fontsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
