"""Figures of image runs.  Functions return a matplotlib Figure; nothing here draws on a screen."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import sim_core as sim
from edm.images.data import to_uint8
from toy.files import replacing


def show(axes: Axes, image: Tensor) -> None:
    """(C, H, W) floats in [-1, 1], clipped."""
    pixels = to_uint8(image.cpu()).permute(1, 2, 0).numpy()
    axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([]), axes.set_yticks([])


def panel(rows: list[tuple[str, Tensor]]) -> Figure:
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
    ("Frechet distance of the average to the data", ("fd",), True),
    ("samples: do they collapse or fly off?", ("sample_mean", "sample_std"), False),
    ("surrogate (its value means nothing)", ("surrogate",), False),
)


def curves(history: list[dict[str, float]]) -> Figure:
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
            there = np.isfinite(column(name))  # fd is not in every row
            style = dict(lw=1, marker="." if name == "fd" else None)
            ax.plot(column("images")[there], column(name)[there], label=name, **style)
        if log:
            ax.set_yscale("log")
        ax.set_title(title, fontsize=9)
        ax.legend(fontsize=7)
    ax.set_xlabel("images")
    return figure


def save_curves(path: str | Path, history: list[dict[str, float]]) -> None:
    """`curves` as a PNG, atomically; nothing while there is nothing to draw."""
    if history:
        with replacing(path) as temporary:
            curves(history).savefig(temporary)


def grid(images: Tensor, columns=10, gap=4) -> Image.Image:
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


def save_grid(path: str | Path, x: Tensor, columns=10) -> None:
    """Network outputs (N, C, H, W) as a grid in a PNG, atomically."""
    with replacing(path) as temporary:
        grid(to_uint8(x.cpu()), columns).save(temporary, format="png")


PANEL_SIGMAS = (0.2, 1.0, 5.0)  # low, middle, high


class Pictures:
    """What a distillation looks like: grids from the same latents, and what both networks see.

    z, cond: the latents and what goes with them.  decode: from latents to images (N, C, H, W).
    Every process computes, as a network may be in shares; the first one writes.
    """

    def __init__(
        self, run: Any, task: Any, z: Tensor, cond: dict[str, Tensor], decode=lambda x: x, columns=10
    ):
        self.run, self.task, self.z, self.cond, self.decode = run, task, z, cond, decode
        self.columns = columns

    @torch.no_grad()
    def samples(self) -> Tensor:
        with self.task.accelerator.autocast():
            return self.task.ema.network(self.z, **self.cond)

    def look(self) -> dict[str, float]:
        """Numbers for the log."""
        x0 = self.samples()
        return {"sample_mean": x0.mean().item(), "sample_std": x0.std().item()} | self.task.gap_by_sigma()

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        x0 = self.samples()
        rows = self.panel_rows(x0[: self.columns])
        if self.run.first:
            save_grid(self.run.path / f"samples-{step:07d}.png", self.decode(x0), self.columns)
            rows = [(name, self.decode(images)) for name, images in rows]
            with replacing(self.run.path / f"panel-{step:07d}.png") as path:
                panel(rows).savefig(path)

    def panel_rows(self, x0: Tensor) -> list[tuple[str, Tensor]]:
        """[(name, latents), ...]: the generator's, noisy ones, and both networks' view of them."""
        cond, rows = {name: t[: len(x0)] for name, t in self.cond.items()}, [("generator", x0)]
        for value in PANEL_SIGMAS:
            sigma = torch.full((len(x0),), value, device=x0.device, dtype=torch.float32)
            xt = sim.add_noise(x0, sigma, self.z[-len(x0) :])
            with self.task.accelerator.autocast():
                rows += [(f"x_t, sigma {value:g}", xt), ("teacher", self.task.teacher(xt, sigma, **cond)),
                         ("online", self.task.fake.network(xt, sigma, **cond))]  # fmt: skip
        return rows
