"""What compare_digits.py makes of its scores: medians over seeds, a table and one figure.

Rows are lines of study.csv: arm, seed, status (finished or diverged), step, and the scores.
"""

import math
import statistics
from collections import defaultdict

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

SCORES = ("fd", "precision", "recall")


def final(rows):
    """{arm: {score: its values after the last step, by seed}}.  Diverged: infinitely far, and no share."""
    last = {(row["arm"], row["seed"]): row for row in rows}
    found = {}
    for (arm, _), row in last.items():
        for name in SCORES:
            broken = math.inf if name == "fd" else 0.0
            good = row["status"] == "finished"
            found.setdefault(arm, {}).setdefault(name, []).append(row[name] if good else broken)
    return found


def table(found, floor, args):
    """study.md: a line per arm."""
    lines = [
        f"# One-step digits after {args.steps} updates; teachers of {args.teacher_steps}",
        "",
        f"Of {args.samples} samples; medians over seeds. Two halves of the data are {floor:.2f} apart.",
        "A run that diverged counts as infinitely far (inf), with no precision and no recall.",
        "",
        "| arm | Fréchet distance, by seed | median | precision | recall |",
        "|---|---|---|---|---|",
    ]
    for arm, scores in found.items():
        each = ", ".join(f"{v:.2f}" for v in scores["fd"])
        cells = [each, *(f"{statistics.median(scores[name]):.2f}" for name in SCORES)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(ax, arms, rows, title):
    """The Fréchet distance over a run: the median of the seeds, and their range."""
    for arm in arms:
        style = dict(color=f"C{'sid' in arm:d}", ls="--" if arm.endswith("-w") else "-")
        curves = defaultdict(list)
        for row in rows:
            if row["arm"] == arm:
                curves[row["step"]].append(row["fd"])
        if curves:
            steps, values = zip(*sorted(curves.items()))
            ax.plot(steps, [statistics.median(v) for v in values], lw=1.8, label=arm, **style)
            ax.fill_between(steps, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.1)
    ax.set(yscale="log", xlabel="updates, warm-up included")
    ax.set_title(title, loc="left", fontsize=10)
    ax.grid(alpha=0.2)


def draw_ends(dots, strips, found, pictures):
    """Every seed's last Fréchet distance, a line per arm, and what its samples look like."""
    for y, (arm, scores) in enumerate(found.items()):
        dots.plot(scores["fd"], [y] * len(scores["fd"]), "o", color="C0", ms=5, alpha=0.7)
        if arm in pictures:
            strips.imshow(Image.open(pictures[arm]), cmap="gray", extent=(0, 1, y + 0.46, y - 0.46))
    dots.set_yticks(range(len(found)), found, fontsize=9)
    dots.set(xscale="log", xlabel="Fréchet distance after the last update (a dot per seed)")
    dots.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
    dots.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    dots.xaxis.set_minor_formatter(NullFormatter())
    dots.grid(alpha=0.2)
    strips.set(xlim=(0, 1), aspect="auto", xticks=[], xlabel="seed 0, the same ten latents")
    for ax in (dots, strips):
        ax.set_ylim(len(found) - 0.5, -0.5)
    strips.tick_params(labelleft=False, left=False)


def figure_of(rows, floor, pictures, panels):
    """Top: curves.  Bottom: where every arm ended.  pictures: {arm: path}; panels: two, {title: arms}."""
    found = final(rows)
    height = 0.6 + 0.32 * len(found)
    figure = Figure(figsize=(10, 3.2 + height), dpi=80, layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(3.2, height))
    for ax, (title, arms) in zip(axes[0], panels.items()):
        draw_curves(ax, arms, rows, title)
        ax.sharey(axes[0, 0])
    axes[0, 0].set_ylabel("Fréchet distance")
    draw_ends(*axes[1], found, pictures)
    marks = {
        "teacher, 35 evaluations": statistics.median(found["teacher"]["fd"]),
        "halves of the data": floor,
    }
    for (name, value), colour in zip(marks.items(), ("C2", "0.4")):
        for line in (axes[0, 0].axhline, axes[0, 1].axhline, axes[1, 0].axvline):
            line(value, color=colour, ls=":", lw=1.5, label=name)
    for ax in axes[0]:
        ax.legend(fontsize=8)
    return figure
