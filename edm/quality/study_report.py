"""What compare_digits.py makes of its scores: medians over seeds, a table and one figure.

Rows are lines of study.csv: arm, seed, status (finished or diverged), step, the scores, and the change: how
far pictures of fixed latents are from those at the score before (root mean square, of grey levels 0 to 1).
"""

import math
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

SHARES = {"precision": 0.0, "recall": 0.0, "follows": 0.0}  # what counts for a run that diverged
SCORES = ("fd", *SHARES, "brightness")  # of a record; in a row also the change
COLUMNS = {  # of table and figure, where the rows have them: heading, of what
    "precision": "precision", "recall": "recall", "follows": "caption read",
    "brighter": "brightness - teacher's", "change": "change since the last score",
}  # fmt: skip


def final(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
    """{arm: {score: its values after the last step, by seed}}.  Diverged: infinitely far, and no share."""
    last, found = {(row["arm"], row["seed"]): row for row in rows}, {}
    for (arm, seed), row in last.items():
        row = row | ({} if row["status"] == "finished" else {k: v for k, v in SHARES.items() if k in row})
        row["fd"] = row["fd"] if row["status"] == "finished" else math.inf
        if "brightness" in row:
            row["brighter"] = row["brightness"] - last["teacher", seed]["brightness"]
        for name in ("fd", *COLUMNS):
            if name in row:
                found.setdefault(arm, {}).setdefault(name, []).append(row[name])
    return found


def table(found: dict[str, dict], floor: float, args: Namespace, teacher_steps: int) -> str:
    """study.md: a line per arm."""
    shown = [name for name in COLUMNS if any(name in scores for scores in found.values())]
    headings = ["arm", "Fréchet distance, by seed", "median", *(COLUMNS[name] for name in shown)]
    lines = [
        f"# One-step digits after {args.steps} updates; teachers of {teacher_steps}",
        "",
        f"Of {args.samples} samples; medians over seeds. Two halves of the data are {floor:.2f} apart.",
        "A run that diverged counts as infinitely far (inf), with no precision and no recall.",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for arm, scores in found.items():
        cells = [", ".join(f"{v:.2f}" for v in scores["fd"]), f"{statistics.median(scores['fd']):.2f}"]
        cells += [f"{statistics.median(scores.get(name, [math.nan])):.2f}" for name in shown]
        lines.append(f"| {arm} | {' | '.join(cells)} |".replace("nan", "-"))
    return "\n".join(lines) + "\n"


def draw_curves(ax: Axes, arms: Iterable[str], rows: list[dict], title: str) -> None:
    """The Fréchet distance over a run: the median of the seeds, and their range."""
    for i, arm in enumerate(arms):
        two = dict(color=f"C{'sid' in arm:d}", ls="--" if arm.endswith("-w") else "-")  # Figure 2's
        style = two if arm.startswith(("sim-", "sid-")) else dict(color=f"C{i}")
        curves = defaultdict(list)
        for row in rows:
            if row["arm"] == arm:
                curves[row["step"]].append(row["fd"])
        if curves:
            steps, values = zip(*sorted(curves.items()))
            ax.plot(steps, [statistics.median(v) for v in values], lw=1.8, label=arm, **style)
            ax.fill_between(steps, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.1)
    ax.set(yscale="log", xlabel="updates, warm-up included", ylabel="Fréchet distance")
    ax.set_title(title, loc="left", fontsize=10)
    ax.grid(alpha=0.2)


def draw_ends(ax: Axes, found: dict[str, dict], name: str, heading: str) -> None:
    """Every seed's last value of a score, a line per arm."""
    for y, scores in enumerate(found.values()):
        values = scores.get(name, [])
        ax.plot(values, [y] * len(values), "o", color="C0", ms=5, alpha=0.7)
    if name == "fd":
        ax.set(xscale="log")
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6) if high < 20 * low else (1, 3)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=heading, ylim=(len(found) - 0.5, -0.5), yticks=range(len(found)))
    ax.set_yticklabels(found, fontsize=9)
    ax.grid(alpha=0.2)


def draw_pictures(ax: Axes, found: dict[str, dict], pictures: dict[str, np.ndarray]) -> None:
    """What the arms' samples look like, a strip each.  pictures: {arm: (N, C, H, W) uint8}."""
    for y, arm in enumerate(found):
        if arm in pictures:
            strip = np.concatenate([*pictures[arm]], 2).transpose(1, 2, 0)
            ax.imshow(strip.squeeze(), cmap="gray", extent=(0, 1, y + 0.46, y - 0.46), vmin=0, vmax=255)
    ax.set(xlim=(0, 1), aspect="auto", xticks=[], xlabel="the first seed, the same latents")
    ax.set(ylim=(len(found) - 0.5, -0.5), yticks=[])


def figure_of(rows: list[dict], floor: float, pictures: dict[str, np.ndarray], panels: dict) -> Figure:
    """Top: curves of those panels, {title: arms}, that have any.  Bottom: where every arm ended."""
    found = final(rows)
    panels = {title: arms for title, arms in panels.items() if set(arms) & set(found)}
    ends = {"fd": "Fréchet distance (a dot per seed)"} | COLUMNS
    ends = {name: words for name, words in ends.items() if any(name in s for s in found.values())}
    top, bottom = 3.2 if panels else 0, 0.6 + 0.32 * len(found)
    width = 2.6 + 2 * len(ends) + 3
    figure = Figure(figsize=(width, top + bottom), dpi=80, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(top or 0.01, bottom))
    curves = above.subplots(1, len(panels), sharey=True, squeeze=False)[0] if panels else []
    ratios = [1.6, *[1] * (len(ends) - 1), 1.9]
    *dots, strips = below.subplots(1, len(ends) + 1, width_ratios=ratios)
    for ax, (title, arms) in zip(curves, panels.items()):
        draw_curves(ax, arms, rows, title)
    for ax, (name, words) in zip(dots, ends.items()):
        draw_ends(ax, found, name, words)
    for ax in dots[1:]:
        ax.tick_params(labelleft=False)
    draw_pictures(strips, found, pictures)
    teacher = statistics.median(found["teacher"]["fd"])
    for name, value, colour in (
        ("teacher, 35 evaluations", teacher, "C2"),
        ("halves of the data", floor, "0.4"),
    ):
        for line in (*(ax.axhline for ax in curves), dots[0].axvline):
            line(value, color=colour, ls=":", lw=1.5, label=name)
    for ax in curves:
        ax.legend(fontsize=8)
    return figure
