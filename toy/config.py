"""The settings of a 2-D run: one dataclass, its presets, its command line, its checks."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import sim_core as sim
from toy.command import Parser, add_options, at_least, check_ranges, option, sigma_sampler, surrogate
from toy.files import UserError
from toy.mixtures import TARGETS
from toy.networks import flow_sigma, vp_sigma

SIGMAS = sim.SIGMA_DISTRIBUTIONS | {"vp": vp_sigma, "flow": flow_sigma}


@dataclass(frozen=True)
class Config:
    """Every setting of a run.  The fields are the command line, in this order."""

    # what to learn
    target: str = option("ring", "the distribution to learn", TARGETS)
    seed: int = option(0, "of everything random", within="seed")
    # the generator's loss
    method: str = option("sim", "full adds what the theorem leaves out; density is SIM with theta on the "
                         "density of xt, right for l1 too but noisy; diff_instruct with --weighting sid is "
                         "DMD2's first term", ("sim", "full", "sid", "diff_instruct", "density"))  # fmt: skip
    distance: str = option("pseudo_huber", "row of Table 4, for sim, full and density", sim.DISTANCES)
    c: float = option(None, "where pseudo_huber turns linear, in the units of --space")
    delta: float = option(None, "where huber turns linear, likewise")
    alpha: float = option(None, "power of power and exp (even), or the alpha of sid")
    beta: float = option(None, "scale of exp")
    space: str = option("denoised", "what the distance compares", sim.SPACES)
    sigma_distribution: str = option("edm", "noise levels of the generator's update", SIGMAS)
    sigma_mean: float = option(None, "instead of a name: ln sigma ~ N(this, --sigma-std^2)")
    sigma_std: float = option(None, "the standard deviation of ln sigma", within="some")
    weighting: str = option("one", "weight over sigma of the generator's loss", sim.WEIGHTINGS)
    # the other two networks
    teacher: str = option("learned", "exact: the target's closed form (all still start from a learned one)",
                          ("learned", "exact"))  # fmt: skip
    fake: str = option("learned", "exact: no online network, a bank of latents whose score is known",
                       ("learned", "exact"))  # fmt: skip
    bank: int = option(1024, "latents of --fake exact", within="many")
    fake_sigma_distribution: str = option("edm", "noise levels of the online update", SIGMAS)
    fake_sigma_mean: float = option(None, "instead of a name: ln sigma ~ N(this, --fake-sigma-std^2)")
    fake_sigma_std: float = option(None, "the standard deviation of ln sigma", within="some")
    fake_updates: int = option(1, "online updates per generator update", within="count")
    warmup: int = option(200, "online updates before the first generator update", within="some")
    # optimisation
    steps: int = option(None, "generator updates (default: by target)", within="count")
    batch: int = option(256, "samples per update", within="many")
    lr: float = option(2e-3, "learning rate of the generator", within="positive")
    fake_lr: float = option(
        4e-3, "learning rate of the online network: it must be the faster one", within="positive"
    )
    beta2: float = option(0.99, "Adam's second beta for both; the first is 0", within="below one")
    schedule: str = option("cosine", "of both learning rates; trapezoid: they fall in the last three tenths",
                           ("cosine", "trapezoid", "constant"))  # fmt: skip
    eps: float = option(1e-8, "Adam's epsilon for both; 1e-4 spares weights that few samples use, and bursts",
                        within="positive")  # fmt: skip
    ema: float = option(
        0.999, "decay of the generator's moving average, which is what gets evaluated", within="below one"
    )
    # networks
    network: str = option("edm", "vp: the plain networks and the process of Listing 1; flow: a plain network "
                          "of the velocity on a straight path", ("edm", "vp", "flow"))  # fmt: skip
    width: int = option(None, "hidden units per layer (default: by target)", within="many")
    sigma_init: float = option(2.5, "sigma* of the generator g(z) = D(sigma* z; sigma*)", within="positive")
    teacher_steps: int = option(
        None, "updates of the teacher, batch 1024 (default: by target)", within="count"
    )
    # the end
    samples: int = option(
        10_000, "one-step samples behind metrics.json, and in samples.npz", within=at_least(2)
    )
    # the machine
    device: str = option("cpu", "torch device, or auto: a GPU (CUDA, MPS) if there is one; a CPU is as fast")
    threads: int = option(
        1, "CPU threads, 0 for torch's choice; networks this small gain nothing from more", within="threads"
    )
    out: str = option(
        None, "folder of the run (default out/toy/NAME: the target and what differs from the defaults)"
    )
    resume: bool = option(False, "go on from the checkpoint in the run's folder")
    show: bool = option(False, "watch in a window while it trains")
    no_pictures: bool = option(False, "no convergence.gif and final.png: for runs by the hundred")


MACHINE = ("device", "threads", "out", "resume", "show", "no_pictures")  # change nothing computed
SIZES = {  # what a target takes, unless said otherwise
    "ring": dict(steps=4000, teacher_steps=1500, width=96),
    "grid": dict(steps=16_000, teacher_steps=3000, width=128),
    "others": dict(steps=8000, teacher_steps=2000, width=128),
}
PRESETS = {
    "default": {},
    # Listing 1: VP, T = 1000, eps-network on cat[xt, t/T], g^2 weight; no warm-up, schedule or EMA.
    "listing1": dict(network="vp", sigma_distribution="vp", fake_sigma_distribution="vp", fake_updates=2,
                     batch=2000, lr=1e-3, fake_lr=1e-3, beta2=0.999, warmup=0, schedule="constant", ema=0.0),
    # A teacher of the new kind: rectified flow, t uniform.
    "flow": dict(network="flow", fake_sigma_distribution="flow"),
    # Algorithm 2 and Table 5; its learning rate 1e-5 is for pre-trained U-Nets, a small MLP needs 1e-3.
    "algorithm2": dict(sigma_distribution="sim", batch=256, lr=1e-3, fake_lr=1e-3, beta2=0.999, warmup=0,
                       schedule="constant"),
}  # fmt: skip


def parse_args(description: str | None, argv: Sequence[str] | None = None) -> tuple[Config, str]:
    """Command line -> (Config, name of the run)."""
    parser = Parser(description)
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help="a set of defaults for all that follows"
    )
    add_options(parser, Config)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    args = vars(parser.parse_args(argv))
    preset = args.pop("preset")
    return Config(**args), preset


def resolve(cfg: Config, preset="default") -> Config:
    """Fill in what depends on other settings: sizes by target, out by all that differs from the preset."""
    usual = dataclasses.asdict(dataclasses.replace(Config(target=cfg.target), **PRESETS[preset]))
    given = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in MACHINE and v != usual[k]}
    parts = [f"{k}_{v:g}" if isinstance(v, float) else f"{k}_{v}" for k, v in given.items()]
    name = "-".join([cfg.target, *([preset] if preset != "default" else []), *parts])
    cfg = dataclasses.replace(cfg, device=find_device(cfg.device))
    filled = SIZES.get(cfg.target, SIZES["others"]) | {"out": f"out/toy/{name}"}
    return dataclasses.replace(cfg, **{k: v for k, v in filled.items() if getattr(cfg, k) is None})


def settings(cfg: Config) -> dict[str, Any]:
    """What decides the numbers of a run."""
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in MACHINE}


def find_device(name: str) -> str:
    """auto: the first of CUDA, MPS and the CPU that is here.  Others stay what they are."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return next(kind for kind in here if here[kind]) if name == "auto" else name


def check(cfg: Config) -> None:
    """Refuse impossible settings before any work, each by its name.  Raises UserError."""
    check_ranges(cfg)
    if cfg.method == "density" and cfg.weighting != "one":
        raise UserError("--method density takes no --weighting")
    for which in ("", "fake_"):
        sigma_sampler(cfg, SIGMAS, which)
    surrogate(cfg)
    try:
        torch.zeros(1, device=cfg.device).item()  # meta has no numbers
    except Exception as error:  # each backend has its own
        raise UserError(f"--device {cfg.device}: torch cannot use it here ({type(error).__name__})") from None
    if cfg.show:
        from matplotlib import pyplot

        if pyplot.get_backend().lower() == "agg":  # what matplotlib falls back on without a screen
            raise UserError("--show needs a display; without one, look at convergence.gif afterwards")
