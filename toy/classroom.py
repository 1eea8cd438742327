"""What the notebooks do besides the mathematics: short trainings, quiet commands, small pictures."""

import io
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import sim_core as sim
from toy import metrics, plots, train_2d
from toy.config import Config, resolve, settings
from toy.folder import Folder
from toy.logbook import Diverged, Log
from toy.marking import Wrong
from toy.mixtures import equal_mixture, make_target

SHORT = dict(width=64, teacher_steps=600, steps=600, sigma_init=1.0, ema=0.99)  # what differs from Config's


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def show(figure):
    """A matplotlib figure as a small picture in the notebook."""
    from IPython.display import Image, display

    display(Image(plots.png(figure)))


@contextmanager
def quiet():
    """Without progress bars and warnings: they go into what is yielded."""
    with redirect_stderr(io.StringIO()) as told:
        yield told


def short_teacher(target):
    """A small teacher of a mixture, always the same."""
    torch.manual_seed(0)
    return train_2d.train_teacher(resolve(Config(**SHORT)), target, rng())


def student(target, teacher, loss=None, **changes):
    """A short run of toy/train_2d.py's loop, with its usual log -> the run, and with it its `warnings`, and
    `samples` of its moving average.

    loss of (fake, teacher, target): theta's, in the place of the settings'.  changes: settings.
    """
    cfg = resolve(Config(**SHORT | {"out": tempfile.mkdtemp()} | changes))
    folder = Folder(cfg.out, settings(cfg))
    folder.claim(resume=False, again=True)
    run = train_2d.Run(cfg, teacher, rng(cfg.seed))
    with quiet() as told, tqdm(disable=True) as progress:
        log = Log(cfg, folder, target, teacher, progress, 0.0)
        try:
            train_2d.distill(cfg, run, target, teacher, log, [], loss)
        except Diverged as error:
            print(f"warning, {error}", file=told)
    run.warnings = [line for line in told.getvalue().splitlines() if line.startswith("warning")]
    with torch.no_grad():
        run.samples = run.ema(torch.randn(2000, 2, generator=rng(6), dtype=torch.float32))
    return run


def verdict(run):
    """The end of a run's log in a line."""
    row = run.history[-1]
    found = f"energy {row['energy_distance']:7.4f}, sharp {row['high_quality']:5.1%}, "
    found += f"modes {row['modes_covered']} of {row['modes']}, "
    return found + f"error of their weights {row['mode_weight_error']:.2f}"


def images_are_ready():
    """Is edm/requirements.txt installed, as far as the digits need it?"""
    return all(map(find_spec, ("accelerate", "PIL", "safetensors", "torchmetrics", "sklearn")))


def digits_command(folder, script, options):
    """A command of edm/ on the digits, run in a folder -> the lines it printed, or a loud failure."""
    script = Path(__file__).resolve().parents[1] / "edm" / script
    arguments = [sys.executable, str(script), "--preset", "digits", "--threads", "1", *options.split()]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.splitlines()


@cache
def ring_and_teacher():
    ring = make_target("ring")
    return ring, short_teacher(ring)


def bounded(draw, limit):
    """draw, but not for ever: a loop that does not end is told."""
    left = iter(range(limit))

    def bounded_draw():
        if next(left, None) is None:
            raise Wrong(f"it has drawn {limit} batches and goes on: does the loop end after `steps`?")
        return draw()

    return bounded_draw


def train(distill, target, teacher):
    """Networks of a short run, moved by distill(teacher, fake, generator, psi, theta, draw, steps)
    -> 2,000 samples of the generator's moving average."""
    cfg, generator = resolve(Config(**SHORT)), rng()
    run = train_2d.Run(cfg, teacher, generator)

    def draw():
        z, noise = (torch.randn(cfg.batch, 2, generator=generator, dtype=torch.float32) for _ in range(2))
        return z, sim.SIGMA_DISTRIBUTIONS["edm"](cfg.batch, generator=generator, dtype=torch.float32), noise

    with tqdm(total=cfg.steps, desc="distill", unit="step", mininterval=0.5) as progress:

        def after_theta(*_):
            run.ema.update_parameters(run.generator)
            run.schedule.step()
            progress.update()

        run.optimiser.register_step_post_hook(after_theta)
        run.fake_optimiser.register_step_post_hook(lambda *_: run.fake_schedule.step())
        optimisers = run.fake_optimiser, run.optimiser
        distill(teacher, run.fake, run.generator, *optimisers, bounded(draw, 10 * cfg.steps), cfg.steps)
    with torch.no_grad():
        return run.ema(torch.randn(2000, 2, generator=rng(6), dtype=torch.float32))


def judge(distill, target, teacher, sharp, energy):
    """Train, show the samples, and say how good they are.  Raises `Wrong` if below the limits."""
    samples, data = train(distill, target, teacher), target.sample(2000, rng(2))
    if not samples.isfinite().all():
        raise Wrong("the samples are no longer finite: it diverged")
    found = metrics.mode_metrics(samples, target)
    distance = metrics.energy_distance(samples, data)
    words = f"{found['modes_covered']} of {found['modes']} modes, {found['high_quality']:.0%} of one-step "
    words += f"samples within 3 std of one, energy distance {distance:.4f}"
    show(plots.sample_panels({"yours, one evaluation": samples}, data, columns=1))
    if found["high_quality"] < sharp or distance > energy or found["modes_covered"] < 0.9 * found["modes"]:
        raise Wrong(f"the samples are not on the target: {words}")
    return words


def on_the_ring(distill):
    return judge(distill, *ring_and_teacher(), sharp=0.75, energy=0.02)


def own_target(answer):
    """The mixture of a reader's (means, std).  Raises `Wrong` where the noise levels would not fit."""
    given = answer()
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise Wrong(f"it returns a {type(given).__name__}; the pair (means, std) is wanted")
    means, std = torch.as_tensor(given[0], dtype=torch.float32), float(given[1])
    if means.ndim != 2 or means.shape[1] != 2 or not 2 <= len(means) <= 2000:
        raise Wrong(
            f"means have shape {tuple(means.shape)}; points of the plane are wanted, (K, 2), K from 2 on"
        )
    if not (means.isfinite().all() and 0.03 <= std <= 0.5):
        raise Wrong(f"std is {std:g}; the short run can show 0.03 to 0.5, and means that are finite")
    centre, spread = means.mean(0).norm().item(), (means.var(0, unbiased=False).mean() + std**2).sqrt().item()
    if centre > 0.2:
        raise Wrong(f"the mean of the data is {centre:.2g} away from 0: subtract it")
    if not 0.3 <= spread <= 1.0:
        raise Wrong(
            f"the data's standard deviation is {spread:.2g} a coordinate: scale it to 0.3 to 1, about 0.5"
        )
    return equal_mixture(means, std)


def on_own_target(answer, distill=None):
    if distill is None:
        raise Wrong("your loop is needed, too: check(my_target, distill)")
    target = own_target(answer)
    return judge(distill, target, short_teacher(target), sharp=0.5, energy=0.05)
