"""Figures of a 2-D run.  Every function takes numbers and returns a matplotlib Figure (or a file)."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from toy.metrics import SIGMAS

BLUE, ORANGE, GREY = "#2a6fbb", "#e8702a", "#9aa0a6"
FIELD_SIGMA = 0.3  # noise level of the denoised points that the movie shows
LIMIT = 1.9


def field_points(n=13) -> Tensor:
    """(n * n, 2) points on which the movie shows where the two networks point."""
    ticks = torch.linspace(-0.9 * LIMIT, 0.9 * LIMIT, n, dtype=torch.float32)
    return torch.cartesian_prod(ticks, ticks)


def _square(ax, title):
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")
    ax.set_title(title, loc="left", fontsize=10)


def _scatter(ax, points, colour):
    return ax.scatter(*points.T, s=2, c=colour, alpha=0.5, linewidths=0, rasterized=True)


def _column(history, key):
    return [row["step"] for row in history], [row[key] for row in history]


class Scene:
    """Three panels that move together: samples, where both networks point, distance to the target.

    data (n, 2); teacher_field (m, 2), D_q at `field_points()` and FIELD_SIGMA; floor, the sampling
    floor of the energy distance; steps, the last step.  `draw` shows one snapshot.
    """

    def __init__(self, figure: Figure, data: Tensor, teacher_field: Tensor, floor: float, steps: int):
        self.figure, points = figure, field_points()
        samples, field, curve = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
        _scatter(samples, data[:2000], GREY)
        self.samples = _scatter(samples, data[:0], ORANGE)
        _square(samples, "one-step samples on the target")
        self.title = samples.text(0.03, 0.03, "", transform=samples.transAxes, fontsize=9)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004}
        field.quiver(*points.T, *(teacher_field - points).T, color=BLUE, alpha=0.8, **arrows)
        self.fake = field.quiver(*points.T, *(teacher_field - points).T, color=ORANGE, alpha=0.8, **arrows)
        _square(field, f"xt to D(xt), sigma = {FIELD_SIGMA}: teacher, online")
        self.curve = curve.plot([], [], color=ORANGE)[0]
        curve.axhline(floor, color=GREY, ls="--", lw=1)
        curve.text(
            steps, floor, "two samples of the target", ha="right", va="bottom", fontsize=8, color="0.4"
        )
        curve.set(yscale="log", ylim=(floor / 2, 1), xlabel="generator steps")
        curve.set_xscale("function", functions=(np.sqrt, np.square))  # as the log is spaced
        curve.set_xlim(0, steps)
        curve.set_title("energy distance to the target", loc="left", fontsize=10)
        self.points, self.moving = points, (self.samples, self.fake, self.curve, self.title)

    def draw(self, snapshot: dict, history: list[dict]) -> None:
        """snapshot: {"step", "samples" (n, 2), "field" (m, 2)}; history: log rows up to that step."""
        self.samples.set_offsets(snapshot["samples"])
        self.fake.set_UVC(*(snapshot["field"] - self.points).T)
        self.curve.set_data(*_column(history, "energy_distance"))
        self.title.set_text(f"step {snapshot['step']}")


class Window:
    """The same scene, live on a screen."""

    def __init__(self, *scene):
        from matplotlib import pyplot

        self.pyplot = pyplot
        self.scene = Scene(pyplot.figure(figsize=(12.8, 4.4), layout="constrained"), *scene)
        pyplot.show(block=False)

    def draw(self, snapshot: dict, history: list[dict]) -> None:
        self.scene.draw(snapshot, history)
        self.pyplot.pause(0.001)


def convergence_gif(path: str | Path, snapshots: list[dict], history: list[dict], scene: tuple) -> None:
    """Write the run as a moving picture, ten frames a second; the last one stays for three seconds."""
    figure = Figure(figsize=(9.6, 3.3), dpi=75, layout="constrained")
    canvas, moving = FigureCanvasAgg(figure), Scene(figure, *scene)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # axes and labels are laid out and drawn once, what moves on top of them
    for artist in moving.moving:
        artist.set_animated(True)
    canvas.draw()
    background, frames = canvas.copy_from_bbox(figure.bbox), []
    for i, snapshot in enumerate(snapshots):
        moving.draw(snapshot, history[: i + 1])
        canvas.restore_region(background)
        for artist in moving.moving:
            artist.axes.draw_artist(artist)
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        frames.append(
            frame.quantize(64) if i == 0 else frame.quantize(palette=frames[0], dither=Image.Dither.NONE)
        )
    durations = [100] * (len(frames) - 1) + [3000]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def final_figure(panels: dict[str, np.ndarray], history: list[dict], floor: float) -> Figure:
    """Top: scatter panels {title: (n, 2)}, target first.  Bottom: the three questions of the log."""
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 3, height_ratios=(1.15, 1))
    target = next(iter(panels.values()))
    for ax, (title, points), colour in zip(top, panels.items(), (GREY, BLUE, ORANGE)):
        if colour != GREY:
            _scatter(ax, target[:4000], "0.85")
        _scatter(ax, points[:4000], colour)
        _square(ax, title)
    close, online, gradient = bottom
    close.plot(*_column(history, "energy_distance"), color=ORANGE, label="generator (EMA)")
    close.axhline(floor, color=GREY, ls="--", lw=1, label="two samples of the target")
    close.set_title("is it close?  energy distance", loc="left", fontsize=10)
    for key, colour, label in (
        ("divergence", "k", "generator - target (true)"),
        ("gap", BLUE, "online - teacher (seen)"),
        ("fake_error", ORANGE, "online - generator (lag)"),
    ):
        steps = [row["step"] for row in history]
        mean = [sum(row[f"{key}_{s:g}"] for s in SIGMAS) / len(SIGMAS) for row in history]
        online.plot(steps, mean, color=colour, label=label)
    online.set_title("is the signal true?  squared score gaps", loc="left", fontsize=10)
    gradient.plot(*_column(history, "generator_gradient"), color=ORANGE, label="generator")
    gradient.plot(*_column(history, "fake_gradient"), color=BLUE, label="online network")
    gradient.set_title("is it stable?  gradient norms", loc="left", fontsize=10)
    for ax in bottom:
        ax.set(yscale="log", xlabel="generator steps")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.2)
    return figure


def sample_panels(panels: dict[str, Tensor], data: Tensor, columns=4) -> Figure:
    """Scatter panels {title: samples (n, 2)} side by side, each on the data (m, 2) in grey."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    for ax, (title, points) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        _scatter(ax, data[:2000], GREY)
        _scatter(ax, points[:2000], ORANGE)
        _square(ax, title)
    for ax in figure.axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def png(figure: Figure, dpi=75, colours=64) -> bytes:
    """The bytes of a small PNG, for a notebook: a palette of so many colours instead of all."""
    full, small = BytesIO(), BytesIO()
    figure.savefig(full, dpi=dpi)
    Image.open(full).convert("RGB").quantize(colours).save(small, format="png")
    return small.getvalue()
