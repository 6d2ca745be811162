"""Pictures of distributions and of predictions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from .damage import Damage
from .train_log import QUANTITIES


@dataclass(frozen=True)
class Distribution:
    """The values that a quantizer sees and what it does to them."""

    name: str
    values: np.ndarray
    """(N,) float32."""
    low: float
    """Lower end of the range; the mean over the values, as groups have ranges of their own."""
    threshold: float
    """T; the mean over the values, as groups have thresholds of their own."""
    damage: Damage

    def scalars(self) -> dict[str, float]:
        """What is written as curves, by the names of train_log.QUANTITIES."""
        return {name: self.threshold if name == 'threshold' else getattr(self.damage, name) for name in QUANTITIES}


def distribution_sheet(distributions: Sequence[Distribution], columns: int = 6) -> np.ndarray:
    """One picture with a histogram of each; dashed lines are the ends of the range. Returns (H, W, 3) uint8, RGB.

    All are drawn into one Axes whose units are cells of the sheet: an Axes for each would be ten times slower. Pillow
    writes the texts, four for each: matplotlib takes ten times as long for them as for all the rest.
    """
    rows = math.ceil(len(distributions) / columns)
    figure = Figure(figsize=(2.4 * columns, 1.7 * rows), dpi=72)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows, 0))
    axes.set_axis_off()
    bars: dict[str, list[np.ndarray]] = {'tab:blue': [], 'tab:orange': []}
    lines: list[np.ndarray] = []
    texts: list[tuple[float, float, str, int, str]] = []  # place, text, size, and its point that is at the place
    for number, d in enumerate(distributions):
        left, right = number % columns + 0.04, number % columns + 0.96
        top, bottom = number // columns + 0.14, number // columns + 0.84
        counts, edges = np.histogram(d.values, 60)
        first, last = min(edges[0], d.low), max(edges[-1], d.threshold)
        to_x = (right - left) / ((last - first) or 1)
        heights = np.log10(1 + counts)
        heights *= (bottom - top) / max(heights.max(), 1e-9)
        outline = np.concatenate([[0], np.repeat(heights, 2), [0]])
        shape = np.stack([left + (np.repeat(edges, 2) - first) * to_x, bottom - outline], 1)
        bars['tab:blue' if d.name.endswith('.weight') else 'tab:orange'].append(shape)
        for end in (d.low, d.threshold):
            x = left + (end - first) * to_x
            lines.append(np.array([[x, top], [x, bottom]]))
        middle, below = (left + right) / 2, bottom + 0.02
        text = f'clipped {d.damage.clip_ratio:.1%}, loss {d.damage.quantized_loss:.3f}'
        texts.append((middle, top - 0.02, d.name[-38:], 6, 'md'))
        texts.append((middle, below, text, 6, 'ma'))
        texts.append((left, below, f'{first:.3g}', 5, 'la'))
        texts.append((right, below, f'{last:.3g}', 5, 'ra'))
    for color, shapes in bars.items():
        axes.add_collection(PolyCollection(shapes, facecolors=color))
    axes.add_collection(LineCollection(lines, colors='black', linestyles='--', linewidths=0.8))
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    pen, fonts = ImageDraw.Draw(picture), {size: ImageFont.truetype(findfont('DejaVu Sans'), size) for size in (5, 6)}
    for x, y, text, size, anchor in texts:
        place = x * picture.width / columns, y * picture.height / rows
        pen.text(place, text, fill='black', font=fonts[size], anchor=anchor)
    return np.array(picture)


def png(figure: Figure, dpi: int | None = None) -> bytes:
    """A figure as the content of a PNG file; dpi: dots per inch, by default the figure's own."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=dpi or 'figure')
    return buffer.getvalue()


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
