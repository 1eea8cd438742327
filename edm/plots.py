"""Figures of image runs.  Each returns a matplotlib Figure; nothing here draws on a screen."""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from edm.checkpoints import replacing
from edm.data import to_uint8


def show(axes, image):
    """(C, H, W) floats in [-1, 1], clipped."""
    pixels = to_uint8(image.cpu()).permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([]), axes.set_yticks([])


def panel(rows):
    """Images in rows with a name each: [(name, (N, C, H, W)), ...]."""
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(columns + 1.6, len(rows) + 0.1), dpi=60, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (name, images) in zip(grid, rows):
        for ax, image in zip(axes, images):
            show(ax, image)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


CURVES = (  # title, columns of the log, logarithmic
    ("online loss: does the online network keep up?", ("fake_loss", "loss"), True),
    ("gradient norms", ("fake_gradient", "generator_gradient", "gradient"), True),
    ("||D_fake - D_teacher|| by sigma: is there anything left to learn?", "gap_", True),
    ("samples: do they collapse or fly off?", ("sample_mean", "sample_std"), False),
    ("surrogate (its value means nothing)", ("surrogate",), False),
)


def curves(history):
    """All of a run's log.csv, against images seen."""
    column = lambda name: np.array([row.get(name, math.nan) for row in history], dtype=float)
    kept = []
    for title, names, log in CURVES:
        names = [n for n in history[-1] if n.startswith(names)] if isinstance(names, str) else names
        if names := [n for n in names if np.isfinite(column(n)).any()]:
            kept.append((title, names, log))
    figure = Figure(figsize=(6, 2.4 * len(kept)), dpi=70, layout="constrained")
    for ax, (title, names, log) in zip(figure.subplots(len(kept), squeeze=False)[:, 0], kept):
        for name in names:
            ax.plot(column("images"), column(name), label=name, lw=1)
        if log:
            ax.set_yscale("log")
        ax.set_title(title, fontsize=9)
        ax.legend(fontsize=7)
    ax.set_xlabel("images")
    return figure


def save_curves(path, history):
    """`curves` as a PNG, atomically; nothing while there is nothing to draw."""
    if history:
        with replacing(path) as temporary:
            curves(history).savefig(temporary)


def grid(images, columns=10, gap=4):
    """uint8 (N, C, H, W) -> a picture, images a grey gap apart; small ones are enlarged."""
    scale = max(1, 48 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, channels, height, width = images.shape
    size = -(-n // columns) * (height + gap) + gap, columns * (width + gap) + gap
    sheet = torch.full((*size, channels), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return Image.fromarray(sheet.squeeze(2).numpy())


def save_grid(path, x, columns=10):
    """Network outputs (N, C, H, W) as a grid in a PNG, atomically."""
    with replacing(path) as temporary:
        grid(to_uint8(x.cpu()), columns).save(temporary, format="png")
