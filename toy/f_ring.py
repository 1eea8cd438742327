"""A ring under every f-divergence: which modes a generator keeps, and which it finds again.

With finitely many latents the generator's law at a noise level is a mixture that is known exactly, and so are
r and y.  The expectation in (1) of `f_divergences` is a sum over a grid, or, as in training, over samples.
"""

import copy
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from toy.f_family import ROWS, Divergence
from toy.metrics import energy_distance, energy_floor, mean_distance, mode_metrics, sample_law
from toy.mixtures import Mixture, make_target
from toy.networks import mlp
from toy.plots import BLUE, ORANGE
from toy.test_bed import plane

GRID, HALF = 1.8, 1.5  # half the side of the grid, of a panel
WIDE = 5  # panels in a row of the figure


class Scene(NamedTuple):
    """missing: neighbouring modes without a sample at first (None: a random start); draws: 0 for the grid."""

    title: str
    latents: int
    missing: int | None
    sigma: float
    draws: int = 0
    steps: int = 200
    lr: float = 5e-3


SCENES = {
    "few": Scene("4 latents for 8 modes", 4, None, 0.15, lr=1e-2),
    "missing": Scene("16 latents, on 5 of the 8 modes at first", 16, 3, 0.08),
    "sampled": Scene("the same from 1,024 samples a step", 16, 3, 0.08, draws=1024),
}


def ring() -> Mixture:
    """The default target, in float64."""
    target = make_target("ring")
    return Mixture(target.means.double(), target.stds, target.weights, target.modes)


def finite(name: str, scene: Scene, target: Mixture) -> bool:
    """Neyman's chi^2 has no value where q's variance is twice p's or more: q^2 / p grows outwards."""
    return name != "neyman" or (target.stds.max() < scene.sigma).item()


@cache
def start(latents: int, missing: int | None, seed: int) -> tuple[Tensor, Module]:
    """(latents, a small MLP generator), fitted to the modes that are not missing."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    z, net = torch.randn(latents, 2, generator=rng, dtype=torch.float64), mlp([2, 64, 64, 2]).double()
    if missing is None:
        return z, net
    place = torch.atan2(z[:, 1], z[:, 0]).argsort().argsort()  # round the ring, as the latents lie
    goal = ring().means[missing:][place * (8 - missing) // latents]
    goal = goal + 0.05 * torch.randn(goal.shape, generator=rng, dtype=torch.float64)
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(600):
        optimiser.zero_grad()
        (net(z) - goal).square().mean().backward()
        optimiser.step()
    return z, net


def shares(scene: Scene, means: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points x (n, 2), and what each latent has of p there (n, K): sums over x are expectations over p."""
    s, K = scene.sigma, len(means)
    if scene.draws:
        k = torch.randint(K, (scene.draws,), generator=rng)
        x = means[k] + s * torch.randn(scene.draws, 2, generator=rng, dtype=torch.float64)
        return x, torch.nn.functional.one_hot(k, K).to(x) / scene.draws
    x, cell = plane(GRID, 1 + math.ceil(2 * GRID / (0.8 * s)), 2)
    density = torch.exp(-(x[:, None] - means).square().sum(2) / (2 * s**2)) / (2 * math.pi * s**2)
    return x, density * cell / K


def settle(row: Divergence, scene: Scene, seed: int, target: Mixture) -> Tensor:
    """(1) at one noise level, h over its mean, as f-distill has it -> the generator's points (K, 2)."""
    rng, s = torch.Generator().manual_seed(seed), scene.sigma
    z, net = copy.deepcopy(start(scene.latents, scene.missing, seed))
    optimiser = torch.optim.Adam(net.parameters(), scene.lr, betas=(0.0, 0.99))
    for _ in range(scene.steps):
        points = net(z)
        p = sample_law(points.detach())
        x, share = shares(scene, p.means, rng)
        h = row.h((p.log_density(x, s) - target.log_density(x, s)).exp())
        y = p.score(x, s) - target.score(x, s)
        optimiser.zero_grad()
        points.backward(share.T @ (h[:, None] * y) / (share.sum(1) @ h))
        optimiser.step()
    return net(z).detach()


def judge(points: Tensor, scene: Scene, target: Mixture, seed: int, n=2000) -> dict[str, float]:
    """Where the points are, and how far the diffused laws are: energy over that of two samples of one."""
    rng = torch.Generator().manual_seed(seed)
    noise = scene.sigma * torch.randn(2, n, 2, generator=rng, dtype=torch.float64)
    ours, data = (law.sample(n, rng) + noise[i] for i, law in enumerate((sample_law(points), target)))
    within = mean_distance(data, data)
    energy = energy_distance(ours, data, within) / energy_floor(n, n, within)
    return mode_metrics(points, target) | {"energy": energy}


def train(seeds: Sequence[int]) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Tensor]]:
    """Every scene under every divergence -> rows of a table, {(scene, row): points of the first seed}."""
    target, table, points = ring(), [], {}
    jobs = [(key, name, seed) for key in SCENES for name in ROWS for seed in seeds]
    for key, name, seed in tqdm(jobs, "train", unit="run"):
        if finite(name, SCENES[key], target):
            means = settle(ROWS[name], SCENES[key], seed, target)
            points.setdefault((key, name), means)
            run = {"scene": key, "divergence": name, "seed": seed}
            table.append(run | judge(means, SCENES[key], target, seed))
    return table, points


def print_table(table: list[dict[str, Any]]) -> None:
    forms = {
        "modes_covered": "{}",
        "high_quality": "{:.0%}",
        "mode_weight_error": "{:.2f}",
        "energy": "{:.3g}",
    }
    print("\nA ring of 8 modes under each, r and scores exact; a value for each seed")
    for key, scene in SCENES.items():
        title = f"{scene.title}, sigma = {scene.sigma}"
        print(f"\n{title:54s}    modes       near a mode   weights off by   floors")
        for name in ROWS:
            runs = [run for run in table if (run["scene"], run["divergence"]) == (key, name)]
            cells = [", ".join(form.format(run[c]) for run in runs) for c, form in forms.items()]
            line = "{:>9s}  {:>16s} {:>16s}   {}".format(*cells) if runs else "no value at this sigma"
            print(f"  {name:48s} {line}")


def figure(points: dict[tuple[str, str], Tensor]) -> Figure:
    """points: {(scene, row): (K, 2)}, on q at the scene's level, strays at the edge; scenes on the grid."""
    shown, target = [key for key, scene in SCENES.items() if not scene.draws], ring()
    rows = -(-len(ROWS) // WIDE)
    fig = Figure(figsize=(1.6 * WIDE, 1.75 * rows * len(shown) + 0.5), layout="constrained")
    x, _ = plane(HALF, 121, 2)
    for part, key in zip(fig.subfigures(len(shown), 1), shown):
        part.suptitle(f"{SCENES[key].title}, sigma = {SCENES[key].sigma}", fontsize=10)
        density = target.log_density(x, SCENES[key].sigma).exp().reshape(121, 121).T
        for ax, name in zip(part.subplots(rows, WIDE).flat, ROWS):
            ax.imshow(density, "Greys", extent=(-HALF, HALF) * 2, origin="lower", vmax=2 * density.max())
            ax.set(xticks=[], yticks=[], xlim=(-HALF, HALF), ylim=(-HALF, HALF))
            ax.set_title(name.replace("_", " "), fontsize=9)
            if (key, name) in points:
                ax.scatter(
                    *points[key, name].clamp(-0.95 * HALF, 0.95 * HALF).T,
                    s=14,
                    c=ORANGE,
                    edgecolors="k",
                    linewidths=0.4,
                )
            else:
                ax.text(0, 0, "no value", ha="center", va="center", color=BLUE)
    return fig
