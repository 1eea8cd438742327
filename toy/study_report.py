"""What compare_2d.py makes of its records: rows, medians over seeds, a table and one figure.

A record is a run's JSON: its settings, "status" (finished, diverged or failed), and, unless it
failed, train_2d's metrics and the curves of its log.  Nothing here trains or reads files.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from toy.logbook import N_LOG
from toy.plots import BLUE, GREY, ORANGE

NUMBERS = ("energy_distance", "energy_distance_floor", "teacher_energy_distance", "high_quality",
           "modes_covered", "modes", "mode_weight_error", "steps")  # of a run's metrics  # fmt: skip
SHOWN = {  # what the table shows: its heading, its format, what a run counts as that diverged or failed
    "energy_over_floor": ("energy", "{:.3g}", math.inf),
    "high_quality": ("sharp", "{:.1%}", 0.0),
    "modes_covered": ("modes", "{:g}", 0),
    "steps_to_twice_floor": ("reached", "{:g}", math.inf),
    "seconds": ("seconds", "{:.0f}", math.inf),
}
FIGURE2 = {  # noise levels -> label -> arm, colour, line
    "lognormal (B.10)": {
        "SIM": ("sigma-sim", ORANGE, "-"),
        "SIM with w_SiD": ("sigma-sim-weight-sid", ORANGE, "--"),
        "SiD": ("sid-sigma-sim", BLUE, "-"),
        "SiD with w_SiD": ("sid-sigma-sim-weight-sid", BLUE, "--"),
    },
    "Karras (SiD)": {
        "SIM": ("sigma-karras", ORANGE, "-"),
        "SIM with w_SiD": ("sigma-karras-weight-sid", ORANGE, "--"),
        "SiD": ("sid-sigma-karras", BLUE, "-"),
        "SiD with w_SiD": ("sid-sigma-karras-weight-sid", BLUE, "--"),
    },
}
INTRODUCTION = """\
# Median over seeds (smallest to largest) after {steps} generator updates

Energy: energy distance to the target over its sampling floor. Sharp: share of samples within 3 std of a mode.
Reached: generator updates until the log, of {n:,} samples, shows twice its floor; - is never. Seconds: of
distillation, log included, teacher not. A run that diverged or failed (broken) counts as infinitely far (-),
with no sharp sample and no mode. Code: {commits}.
"""


CAPTION = (
    "Energy distance to the target over what two samples of it have: 1, dotted, is a perfect sampler. "
    "Lines and dots: median of {runs} seeds; bands and bars: their range. Vertical line: the default, which "
    "stands in brackets. Arrow: beyond the axis. Sharp: share of samples within 3 std of a mode. Broken: "
    "seeds that diverged, counted as infinitely far."
)


def over_floor(record: dict) -> list[float]:
    """A log's energy distances over what two samples of its size have on average, which goes as 1/n."""
    floor = record["metrics"]["energy_distance_floor"] * record["settings"]["samples"] / N_LOG
    return [energy / floor for energy in record["log"]["energy_distance"]]


def row_of(key: tuple[str, str, int], record: dict) -> dict[str, Any]:
    """A line of study.csv: what the run of key (arm, target, seed) measured, as far as it came."""
    row = dict(zip(("arm", "target", "seed"), key)) | {"status": record["status"]}
    row |= dict.fromkeys((*NUMBERS, *SHOWN)) | {"error": record.get("error")}
    if "metrics" in record:
        metrics, log = record["metrics"], record["log"]
        row |= {name: metrics[name] for name in NUMBERS}
        row["energy_over_floor"] = metrics["energy_distance"] / metrics["energy_distance_floor"]
        row["seconds"] = log["seconds"][-1] - log["seconds"][0]
        reached = [step for step, ratio in zip(log["step"], over_floor(record)) if ratio <= 2]
        row["steps_to_twice_floor"] = reached[0] if reached else math.inf
    return row


def summarise(rows: Iterable[dict]) -> dict[tuple[str, str], dict[str, Any]]:
    """{(arm, target): {number of SHOWN: (median, smallest, largest), "runs": n, "broken": n}}."""
    found, summary = defaultdict(list), {}
    for row in rows:
        found[row["arm"], row["target"]].append(row)
    for key, runs in found.items():
        good = [row["status"] == "finished" for row in runs]
        summary[key] = {"runs": len(runs), "broken": good.count(False)}
        for name, (*_, worst) in SHOWN.items():
            values = [row[name] if fine else worst for row, fine in zip(runs, good)]
            summary[key][name] = statistics.median(values), min(values), max(values)
    return summary


def cell(form: str, values: Iterable[float]) -> str:
    """'median (smallest to largest)', one number where they look alike; - is what is not finite."""
    median, low, high = (form.format(v) if math.isfinite(v) else "-" for v in values)
    return median if low == high else f"{median} ({low} to {high})"


def table(summary: dict[tuple[str, str], dict], steps: int, commits: Iterable[str]) -> str:
    """study.md: a section per target, a line per arm, in the order of the summary."""
    lines = [INTRODUCTION.format(steps=steps, n=N_LOG, commits=", ".join(sorted(commits)))]
    headings = ["arm", *(heading for heading, *_ in SHOWN.values()), "runs", "broken"]
    for target in dict.fromkeys(target for _, target in summary):
        lines += [f"## {target}", "", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        for (arm, where), found in summary.items():
            if where == target:
                cells = [cell(form, found[name]) for name, (_, form, _) in SHOWN.items()]
                lines.append(f"| {arm} | {' | '.join(cells)} | {found['runs']} | {found['broken']} |")
        lines.append("")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# The figure.


def band(records: Sequence[dict]) -> tuple[list[float], np.ndarray, np.ndarray, np.ndarray]:
    """Several seeds' logs -> steps, and median, least and most of `over_floor`; inf after a log's end."""
    steps = max((record["log"]["step"] for record in records), key=len)
    curves = np.full((len(records), len(steps)), np.inf)
    for curve, record in zip(curves, records):
        curve[: len(record["log"]["step"])] = over_floor(record)
    return steps, np.median(curves, 0), curves.min(0), curves.max(0)


def draw_curves(ax: Axes, arms: dict[str, tuple], logs: dict[str, list[dict]], title: str) -> None:
    """One panel of Figure 2.  arms: {label: (arm, colour, line)}; logs: {arm: records}."""
    for label, (arm, colour, style) in arms.items():
        if logs.get(arm):
            steps, median, low, high = band(logs[arm])
            ax.plot(steps, median, color=colour, ls=style, lw=1.8, label=label)
            ax.fill_between(steps, low, np.minimum(high, 1e9), color=colour, alpha=0.12, lw=0)
    ax.axhline(1, color=GREY, ls=":", lw=1)
    ax.set(yscale="log", ylim=(0.5, 600), xlabel="generator updates")
    ax.set_xscale("function", functions=(np.sqrt, np.square))  # as the log is spaced
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_title(title, loc="left", fontsize=10)
    ax.grid(alpha=0.2)


def places(groups: dict[str, Iterable[str]], arms: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Heights in the chart: {heading: y} of the groups that have any of the arms, {arm: y}."""
    headings, heights, y = {}, {}, 0
    for group, members in groups.items():
        present = [arm for arm in members if arm in arms]
        if group and present:
            headings[group], y = y, y + 1
        for arm in present:
            heights[arm], y = y, y + 1
    return headings, heights


def draw_dots(
    ax: Axes, summary: dict, target: str, headings: dict[str, int], heights: dict[str, int], limit=100
) -> None:
    """Median and range of the final energy over the floor, a line per arm; past the limit: an arrow."""
    for arm, y in heights.items():
        if found := summary.get((arm, target)):
            median, low, high = (min(value, limit) for value in found["energy_over_floor"])
            ax.plot([low, high], [y, y], color=ORANGE, lw=2, alpha=0.6)
            ax.plot(median, y, ">" if median == limit else "o", color=ORANGE, ms=5, clip_on=False)
            broken = f", {found['broken']} broken" if found["broken"] else ""
            note = f"{found['high_quality'][0]:.0%}{broken}"
            ax.text(1.03, y, note, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    if default := summary.get(("default", target)):
        ax.axvline(default["energy_over_floor"][0], color=BLUE, lw=1, ls="--", zorder=0)
    ax.text(1.03, -1, "sharp", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color="0.4")
    ticks = {y: arm for arm, y in heights.items()} | {y: heading for heading, y in headings.items()}
    ax.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    for y, label in zip(ticks, ax.get_yticklabels()):
        label.set_fontweight("bold" if y in headings.values() else "normal")
    ax.set(xscale="log", xlim=(0.7, limit), ylim=(len(ticks), -1.5), xlabel="energy distance / floor")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set_title(f"{target}, after the last update", loc="left", fontsize=10)
    ax.grid(alpha=0.2, axis="x")


def figure_of(summary: dict, records: dict, groups: dict[str, Iterable[str]]) -> Figure:
    """Top: curves of Figure 2's choices, a column per target.  Bottom: where every arm ended.

    summary: `summarise`'s; records: {(arm, target, seed): record}; groups: {heading: arms}.
    """
    targets, arms = (list(dict.fromkeys(key[i] for key in summary)) for i in (1, 0))
    panels = {k: v for k, v in FIGURE2.items() if any(arm in arms for arm, *_ in v.values())}
    headings, heights = places(groups, arms)
    dots = 0.6 + 0.17 * (len(headings) + len(heights))  # inches
    width, caption = 3.6 * len(targets) + 2.2, len(CAPTION) / 16  # inches, if it were one line
    height = 2.7 * len(panels) + dots + 0.6 + 0.16 * math.ceil(caption / width)
    figure = Figure(figsize=(width, height), layout="constrained")
    ratios = [2.7] * len(panels) + [dots]
    axes = figure.subplots(len(ratios), len(targets), height_ratios=ratios, squeeze=False)
    for column, target in zip(axes.T, targets):
        logs = defaultdict(list)
        for (arm, where, _), record in records.items():
            if where == target and "log" in record:
                logs[arm].append(record)
        for ax, (levels, choices) in zip(column, panels.items()):
            draw_curves(ax, choices, logs, f"{target}, noise levels {levels}")
        draw_dots(column[-1], summary, target, headings, heights)
    for row in axes:
        for ax in row[1:]:
            ax.tick_params(labelleft=False)
    for ax in axes[:-1, 0]:
        ax.set_ylabel("energy distance / floor")
        ax.legend(fontsize=8)
    runs = max(found["runs"] for found in summary.values())
    figure.supxlabel(CAPTION.format(runs=runs), x=0.01, ha="left", fontsize=8, wrap=True)
    return figure
