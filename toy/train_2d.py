"""Distil a 2-D diffusion model into a one-step generator by Score Implicit Matching.

    python toy/train_2d.py                           # the default: a ring, about a minute
    python toy/train_2d.py --target grid             # 25 modes, some minutes
    python toy/train_2d.py --distance l2 --seed 3    # another row of Table 4
    python toy/train_2d.py --fake exact              # no online network: its score in closed form
    python toy/train_2d.py --preset listing1         # the paper's pseudo-code, made to run
    python toy/train_2d.py --preset flow             # a teacher of the new kind: it predicts a velocity

A teacher learns the target by denoising score matching and is copied into the generator and the
online ("fake") network; then the two losses of sim_core alternate.  What a run learns is in its
folder: convergence.gif and final.png to look at, log.csv, metrics.json and samples.npz to compute
with, checkpoints to go on from (--resume).  Ctrl-C stops early and still writes them all.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import sim_core as sim
from toy import command
from toy.config import SIGMAS, Config, check, parse_args, resolve, settings
from toy.files import UserError, naming
from toy.folder import Folder
from toy.logbook import Diverged, Log, finish
from toy.metrics import sample_law
from toy.mixtures import Mixture, make_target
from toy.networks import Denoiser, FlowDenoiser, Generator, VPDenoiser, flow_weight, mlp, vp_weight

LOGS = 40  # rows of the log and frames of the movie, denser at first, when most happens


def sigma_sampler(cfg: Config, rng: torch.Generator, which="") -> Callable:
    return partial(command.sigma_sampler(cfg, SIGMAS, which), generator=rng, dtype=torch.float32)


SCHEDULES = {  # share of the run -> share of the learning rate
    "trapezoid": lambda t: min(1.0, (1 - t) / 0.3),
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "constant": lambda t: 1.0,
}


def optimiser_and_schedule(
    network: Module, lr: float, steps: int, betas: tuple[float, float], schedule="cosine", eps=1e-8
) -> tuple[torch.optim.Adam, LambdaLR]:
    optimiser = torch.optim.Adam(network.parameters(), lr=lr, betas=betas, eps=eps, fused=True)
    return optimiser, LambdaLR(optimiser, lambda n: SCHEDULES[schedule](n / steps))


def moving_average(network: Module, decay: float) -> AveragedModel:
    """Exponential, at first over what there is: decay grows as (1 + n) / (10 + n) up to its value."""

    def update(averages, parameters, n):
        torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + n.item()) / (10 + n.item())))

    return AveragedModel(network, multi_avg_fn=torch.no_grad()(update))


def update(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def make_denoiser(cfg: Config, target: Mixture) -> Module:
    edm = partial(Denoiser, sigma_data=target.data_std())
    return {"edm": edm, "vp": VPDenoiser, "flow": FlowDenoiser}[cfg.network](width=cfg.width).to(cfg.device)


def score_matching_weight(cfg: Config, target: Mixture) -> Callable:
    """Of the teacher's and psi's loss: lambda_EDM (B.7), Listing 1's T g^2, or 1 on velocities."""
    edm = partial(sim.edm_weight, sigma_data=target.data_std())
    return {"edm": edm, "vp": vp_weight, "flow": flow_weight}[cfg.network]


def train_teacher(cfg: Config, target: Mixture, rng: torch.Generator, batch=1024, lr=5e-3) -> Module:
    """Denoising score matching (B.2) -> the moving average of the network, frozen."""
    network = make_denoiser(cfg, target)
    ema = moving_average(network, 1 - 1 / max(1, 0.02 * cfg.teacher_steps))
    optimiser, schedule = optimiser_and_schedule(network, lr, cfg.teacher_steps, (0.9, 0.99))
    draw_sigma = sigma_sampler(cfg, rng, "fake_")
    weight = score_matching_weight(cfg, target)
    for _ in tqdm(range(cfg.teacher_steps), desc="teacher", unit="step", mininterval=0.5):
        x0, sigma = target.sample(batch, rng), draw_sigma(batch)
        noise = torch.randn(x0.shape, generator=rng, device=cfg.device, dtype=torch.float32)
        update(optimiser, sim.fake_loss(network, x0, sigma, noise, weight(sigma)).mean())
        schedule.step()
        ema.update_parameters(network)
    return ema.module.requires_grad_(False)


class Run:
    """What training moves, and so what a checkpoint holds."""

    MODULES = "teacher fake generator ema optimiser schedule fake_optimiser fake_schedule".split()
    VALUES = "step bank history snapshots".split()

    def __init__(self, cfg: Config, teacher: Module, rng: torch.Generator):
        self.teacher, self.rng, self.step = teacher, rng, 0
        self.fake = copy.deepcopy(teacher).requires_grad_(True)
        if cfg.network == "vp":  # Listing 1's generator is a plain network of its own
            self.generator = mlp([2] + [cfg.width] * 3 + [2]).to(cfg.device)
        else:
            self.generator = Generator(copy.deepcopy(teacher).requires_grad_(True), cfg.sigma_init)
        self.ema = moving_average(self.generator, cfg.ema)
        how = cfg.steps, (0.0, cfg.beta2), cfg.schedule, cfg.eps
        self.optimiser, self.schedule = optimiser_and_schedule(self.generator, cfg.lr, *how)
        self.fake_optimiser, self.fake_schedule = optimiser_and_schedule(self.fake, cfg.fake_lr, *how)
        # latents of --fake exact
        self.bank = torch.randn(cfg.bank, 2, generator=rng, device=cfg.device, dtype=torch.float32)
        self.history, self.snapshots = [], []  # rows of the log, frames of the movie

    def state_dict(self) -> dict[str, Any]:
        modules = {name: getattr(self, name).state_dict() for name in self.MODULES}
        return modules | {name: getattr(self, name) for name in self.VALUES} | {"rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        for name in self.VALUES:
            setattr(self, name, state[name])
        self.bank = self.bank.to(self.rng.device)
        self.rng.set_state(state["rng"].cpu())


def distill(cfg: Config, run: Run, target: Mixture, teacher: Callable, log: Callable, stop: object,
            loss_of: Callable | None = None) -> None:  # fmt: skip
    """Alternate the two updates until cfg.steps or a signal in `stop`; log(run, losses) now and then.
    loss_of: for theta, another than that of cfg."""
    rng, batch = run.rng, cfg.batch
    draw_sigma, draw_fake_sigma = sigma_sampler(cfg, rng), sigma_sampler(cfg, rng, "fake_")
    fake_weight, sigma_data = score_matching_weight(cfg, target), target.data_std()
    weight, learned = sim.WEIGHTINGS[cfg.weighting], cfg.fake == "learned"
    loss_of = loss_of or command.surrogate(cfg)

    def normal():
        return torch.randn(batch, 2, generator=rng, device=cfg.device, dtype=torch.float32)

    def update_fake():
        """psi: denoise the generator's samples."""
        with torch.no_grad():
            x0 = run.generator(normal())
        sigma = draw_fake_sigma(batch)
        loss = sim.fake_loss(run.fake, x0, sigma, normal(), fake_weight(sigma)).mean()
        update(run.fake_optimiser, loss)
        return loss

    def update_generator():
        """theta: descend the surrogate, through the frozen teacher and online network."""
        if learned:
            fake, z = run.fake.requires_grad_(False), normal()
        else:  # the generator *is* its bank: a mixture of points, whose score is known
            fake = sample_law(run.generator(run.bank).detach()).denoiser  # sg: s_sg[theta]
            z = run.bank[torch.randint(len(run.bank), (batch,), generator=rng, device=cfg.device)]
        x0, sigma = run.generator(z), draw_sigma(batch)
        given = teacher, fake, x0, sigma, normal()
        if cfg.method == "density":
            losses = loss_of(*given)
        else:
            triple = sim.predictions(*given, cfg.space)
            losses = sim.weigh(loss_of(*triple), weight(triple, sigma, cfg.space, sigma_data))
        loss = losses.mean()
        update(run.optimiser, loss)
        run.fake.requires_grad_(True)
        return loss

    if not run.history:  # of a run that was killed, the first look's checkpoint comes after the warm-up
        for _ in range(cfg.warmup if learned else 0):
            if stop:
                raise KeyboardInterrupt
            update_fake()
        log(run, {})
    marks, losses = {math.ceil(cfg.steps * (i / LOGS) ** 2) for i in range(1, LOGS + 1)}, {}
    while run.step < cfg.steps and not stop:
        for _ in range(cfg.fake_updates if learned else 0):
            losses["fake_loss"] = update_fake()
        losses["surrogate"] = update_generator()
        run.ema.update_parameters(run.generator)
        run.schedule.step()
        if learned:
            run.fake_schedule.step()
        run.step += 1
        if run.step in marks:
            log(run, losses)
    if losses and run.step not in marks:  # stopped in between
        log(run, losses)


def main(cfg: Config, teach=train_teacher) -> dict[str, Any]:
    """Train, distil, write everything into cfg.out; cfg resolved.  Returns the metrics.

    teach(cfg, target, rng) -> the teacher, for callers that have it already.
    """
    check(cfg)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    folder = Folder(cfg.out, settings(cfg))
    folder.claim(cfg.resume, again=True)
    saved = folder.load() if cfg.resume else None
    torch.manual_seed(cfg.seed)
    rng = torch.Generator(cfg.device).manual_seed(cfg.seed)
    target = make_target(cfg.target).to(cfg.device)
    start = time.perf_counter()
    network = make_denoiser(cfg, target).requires_grad_(False) if saved else teach(cfg, target, rng)
    run = Run(cfg, network, rng)
    if saved:
        with naming(folder.checkpoints):
            run.load_state_dict(saved)
    seconds = run.history[-1]["seconds"] if saved else time.perf_counter() - start
    teacher, status = target.denoiser if cfg.teacher == "exact" else run.teacher, "interrupted"
    with tqdm(total=cfg.steps, initial=run.step, desc=cfg.target, unit="step", mininterval=0.5) as progress:
        log = Log(cfg, folder, target, teacher, progress, seconds)
        try:
            with command.stop_on_signal() as stop:
                distill(cfg, run, target, teacher, log, stop)
            status = "finished" if run.step == cfg.steps else "interrupted"
        except Diverged as error:
            if not run.history:
                raise UserError(str(error)) from None
            progress.write(f"train_2d.py: stopped: {error}", file=sys.stderr)
            run.load_state_dict(folder.load())  # the last good state
            status = "diverged"
    return finish(cfg, run, log, status)


def tell(argv: Sequence[str] | None = None) -> int:
    """From the command line to a summary -> the exit code."""
    cfg = resolve(*parse_args(__doc__, argv))
    m = main(cfg)
    energy = [m[k] for k in ("energy_distance", "teacher_energy_distance", "energy_distance_floor")]
    print(f"{m['status']} after {m['steps']} steps; {m['train_seconds']:.0f} s of training, teacher included")
    print("  energy distance to target  {:.5f}  (teacher {:.5f}; two samples of it {:.5f})".format(*energy))
    print(f"  within 3 std of a mode     {m['high_quality']:.1%}", end="")
    print(f"    (teacher {m['teacher_high_quality']:.1%})")
    print(f"  modes covered              {m['modes_covered']} of {m['modes']}", end="")
    print(f"   (error of their weights {m['mode_weight_error']:.3f})")
    look = "" if cfg.no_pictures else "; look at convergence.gif and final.png"
    print(f"  everything is in {cfg.out}{look}")
    return {"finished": 0, "interrupted": 130, "diverged": 1}[m["status"]]


def cli(argv: Sequence[str] | None = None) -> int:
    """The command line: returns the exit code."""
    return command.run(lambda: tell(argv), "interrupted before there was anything to write")


if __name__ == "__main__":
    sys.exit(cli())
