"""A run's folder: what is measured on the way, written at the end, and read to go on."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from toy import plots
from toy.files import replacing, versions, write_json, write_rows
from toy.metrics import (
    SIGMAS,
    energy_distance,
    energy_floor,
    mean_distance,
    mode_metrics,
    sample_law,
    score_diagnostics,
)
from toy.sampler import heun

N_LOG, N_PROBE = 2000, 256  # samples behind a row of the log, its score errors
DRAWS = 4  # energy distances are means over so many draws of samples and data: one alone scatters by half
LAG = 0.05  # squared error of the online network's noise prediction (of 2 in the plane) worth a warning


class Diverged(Exception):
    """Training left the finite numbers."""


# ------------------------------------------------------------------------------------------------
# On the way.


def gradient_norm(network: Module) -> float:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0


class Log:
    """Called now and then with the run: measures, warns in plain words, shows, saves.

    Its random numbers are its own, so looking does not change the training.
    """

    def __init__(self, cfg: Any, folder: Any, target: Any, teacher: Callable, progress: tqdm, seconds: float):
        self.cfg, self.folder, self.target, self.teacher, self.progress = (
            cfg,
            folder,
            target,
            teacher,
            progress,
        )
        self.start, self.warned = time.perf_counter() - seconds, set()
        rng = torch.Generator(cfg.device).manual_seed(cfg.seed + 1)
        self.data = target.sample(N_LOG, rng)
        how = dict(device=cfg.device, dtype=torch.float32)
        self.z, self.noise = (torch.randn(n, 2, generator=rng, **how) for n in (N_LOG, N_PROBE))
        self.within_data = mean_distance(self.data, self.data)
        self.floor = energy_floor(N_LOG, N_LOG, self.within_data)
        self.points = plots.field_points().to(cfg.device)
        self.scene = (self.data.cpu(), self.field(teacher, plots.FIELD_SIGMA), self.floor, cfg.steps)
        self.window = plots.Window(*self.scene) if cfg.show else None

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def field(self, denoiser: Callable, sigma: float) -> Tensor:
        """Where it sends the points of the movie at one noise level, (m, 2)."""
        return denoiser(self.points, self.points.new_full((len(self.points),), sigma)).cpu()

    @torch.no_grad()
    def __call__(self, run: Any, losses: dict[str, Tensor]) -> None:
        losses = {name: loss.item() for name, loss in losses.items()}
        norms = {"generator_gradient": gradient_norm(run.generator), "fake_gradient": gradient_norm(run.fake)}
        samples, now = run.ema(self.z), run.generator(self.z)
        numbers = losses | norms | {"samples": samples.sum().item(), "raw_samples": now.sum().item()}
        if not all(map(math.isfinite, numbers.values())):
            found = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            raise Diverged(f"no longer finite at step {run.step} ({found}); lower --lr")
        fake = sample_law(run.generator(run.bank)).denoiser if self.cfg.fake == "exact" else run.fake
        row = {"step": run.step, "seconds": self.seconds(), "fake_loss": math.nan, "surrogate": math.nan}
        row |= losses | norms
        row["energy_distance"] = energy_distance(samples, self.data, self.within_data)
        row |= mode_metrics(samples, self.target)
        row |= score_diagnostics(now, self.target, self.teacher, fake, self.noise)
        for name, values in (("mean", samples.mean(0)), ("std", samples.std(0))):
            row[f"sample_{name}_x"], row[f"sample_{name}_y"] = values.tolist()
        run.history.append(row)
        frame = {"step": run.step, "samples": samples.cpu(), "field": self.field(fake, plots.FIELD_SIGMA)}
        frame["fields"] = torch.stack([self.field(fake, sigma) for sigma in SIGMAS])  # for toy/explore.py
        run.snapshots.append(frame)
        self.warn(run.history)
        found = f"energy {row['energy_distance']:.4f} (floor {self.floor:.4f}), "
        found += f"sharp {row['high_quality']:.1%}, modes {row['modes_covered']}/{row['modes']}"
        self.progress.set_postfix_str(found, refresh=False)
        self.progress.update(run.step - self.progress.n)
        if self.window:
            self.window.draw(run.snapshots[-1], run.history)
        self.save(run)

    def warn(self, history: list[dict]) -> None:
        """Say it, once, when a run goes wrong in one of the usual ways."""
        row = history[-1]
        if row["step"] < self.cfg.steps // 5:  # at first everything moves
            return
        lags = []
        for r in history[-2:]:  # twice in a row: one reading may be a fluctuation
            error, gap = (sum(r[f"{k}_{s:g}"] for s in SIGMAS) / len(SIGMAS) for k in ("fake_error", "gap"))
            lags.append(error > max(LAG, 4 * gap))
        lost, far = row["modes"] - row["modes_covered"], 2 * history[0]["energy_distance"]
        for name, bad, message in (
            ("lag", all(lags), "the online network lags: its error dwarfs the gap it reports"),
            ("modes", lost > row["modes"] // 10, f"{lost} of {row['modes']} modes are missing"),
            ("away", row["energy_distance"] > far, "the samples are leaving the target"),
        ):
            if bad and name not in self.warned:
                advice = "lower --lr, or raise --fake-lr or --fake-updates"
                self.progress.write(f"warning, step {row['step']}: {message}; {advice}", file=sys.stderr)
                self.warned.add(name)

    def save(self, run: Any) -> None:
        write_rows(self.folder.path / "log.csv", run.history, digits=6)
        self.folder.save(run.step, run.state_dict())


# ------------------------------------------------------------------------------------------------
# At the end.


def evaluate(cfg: Any, run: Any, log: Log) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The numbers of metrics.json and the arrays of samples.npz, from DRAWS draws and the first of them."""
    rng = torch.Generator(cfg.device).manual_seed(cfg.seed + 2)
    energies, first, n = [], None, cfg.samples
    for _ in range(DRAWS):
        z = torch.randn(n, 2, generator=rng, device=cfg.device, dtype=torch.float32)
        data = log.target.sample(n, rng)
        with torch.no_grad():
            samples, teacher = run.ema(z), heun(log.teacher, z)
        within, first = mean_distance(data, data), first or (samples, teacher, data)
        floor = energy_floor(n, n, within)
        energies.append(
            [energy_distance(samples, data, within), energy_distance(teacher, data, within), floor]
        )
    samples, teacher, data = first
    energy, teacher_energy, floor = torch.tensor(energies, dtype=torch.float32).mean(0).tolist()
    metrics = {
        "energy_distance": energy,
        "energy_distance_floor": floor,
        "teacher_energy_distance": teacher_energy,
        "teacher_high_quality": mode_metrics(teacher, log.target)["high_quality"],
        **mode_metrics(samples, log.target),
        **{k: v for k, v in run.history[-1].items() if k.startswith(("divergence", "fake_error", "gap"))},
    }
    arrays = {"generator": samples, "teacher": teacher, "data": data}
    return metrics, {name: array.cpu().numpy() for name, array in arrays.items()}


def finish(cfg: Any, run: Any, log: Log, status: str) -> dict[str, Any]:
    """Write samples.npz, final.png and convergence.gif (unless cfg.no_pictures), metrics.json; return
    the metrics."""
    out, seconds = Path(cfg.out), log.seconds()
    metrics, arrays = evaluate(cfg, run, log)
    metrics |= {
        "target": cfg.target,
        "seed": cfg.seed,
        "status": status,
        "steps": run.step,
        "train_seconds": seconds,
    }
    metrics["versions"] = versions() | {"numpy": np.__version__}
    with replacing(out / "samples.npz") as path:
        np.savez_compressed(path, **arrays)
    if not cfg.no_pictures:
        titles = f"target: {cfg.target}", "teacher, 79 evaluations", "generator, 1 evaluation"
        panels = {title: arrays[name] for title, name in zip(titles, ("data", "teacher", "generator"))}
        with replacing(out / "final.png") as path:
            plots.final_figure(panels, run.history, log.floor).savefig(path, dpi=90)
        with replacing(out / "convergence.gif") as path:
            plots.convergence_gif(path, run.snapshots, run.history, log.scene)
    write_json(out / "metrics.json", metrics)
    return metrics
