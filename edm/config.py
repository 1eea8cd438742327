"""The settings of every run: documented dataclasses, the presets, and their command line."""

import argparse
import atexit
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import distributed

import sim_core as sim
from toy.command import Parser, add_options, at_least, check_ranges, option, run, sigma_sampler, surrogate

# ----------------------------------------------------------------------------------------------
# Presets: one ladder, from minutes on a laptop to the paper's runs.

# EDM's CIFAR-10 U-Net (DDPM++); 55.7 M parameters.
CIFAR10_UNET = dict(img_resolution=32, img_channels=3, model_channels=128, channel_mult=(2, 2, 2),
                    num_blocks=4, attn_resolutions=(16,), dropout=0.13)  # fmt: skip
# EDM's own training: its code's defaults.  Its augmentation is not here, but for the flip.
EDM_TRAINING = dict(steps=390_625, batch=512, lr=1e-3, beta1=0.9, beta2=0.999, lr_rampup=10_000_000,
                    ema_halflife=500_000, flip=True, every=5_000_000)  # fmt: skip
# Table 5.  Not in it: the duration, here that of SiD's published results (500 M images unconditional, 800 M
# conditional; 200 M is only its code's default), and c, here what served on digits times the root of the
# ratio of pixels.
TABLE5 = dict(batch=256, lr=1e-5, fake_lr=1e-5, beta1=0.0, beta2=0.999, sigma_init=2.5,
              sigma_distribution="sim", fake_sigma_distribution="edm", weighting="one", c=2.0, warmup=0,
              ema_halflife=500_000, every=500_000)  # fmt: skip

FASHION = "/usr/share/datasets/fashion-mnist"  # where Debian puts it
FASHION_UNET = dict(img_resolution=28, img_channels=1, label_dim=10, attn_resolutions=(7,), dropout=0.0,
                    channel_mult_emb=2)  # fmt: skip
# 64x64: the same U-Net with one level more, its dropout in EDM's training, whose settings are its paper's
# Table 7; the duration, batch and rates are SiD's.  SiD has theta's beta1 at 0.9 on FFHQ and computes in
# fp16; here both are as in Table 5.
UNET64 = dict(CIFAR10_UNET, img_resolution=64, channel_mult=(1, 2, 2, 2), label_dim=0)
EDM_TRAINING64 = EDM_TRAINING | dict(steps=781_250, batch=256, lr=2e-4)
TABLE5_64 = TABLE5 | dict(batch=512, c=4.0, steps=976_563)

PRESETS = {  # name -> the data, the network of the teacher, its training, the distillation
    "digits": dict(
        data="digits",
        network=dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=24, channel_mult=(1, 2),
                     num_blocks=2, attn_resolutions=(4,), dropout=0.0, channel_mult_emb=2),
        teacher=dict(steps=1000, batch=64, lr=3e-3, lr_end=0.0, ema_halflife=20_000),
        distill=dict(steps=760, batch=64, warmup=60, lr=1e-3, fake_lr=2e-3, lr_end=0.1, c=0.3,
                     ema_halflife=20_000, ema_rampup=0.2, samples=1797),
    ),
    # Two hours of one core; with a GPU, a network nine times as large.
    "fashion-mnist": dict(
        data=FASHION, network=dict(FASHION_UNET, model_channels=16, channel_mult=(1, 2, 4), num_blocks=1),
        teacher=dict(steps=5000, batch=64, lr=2e-3, lr_end=0.0, ema_halflife=40_000, every=40_000),
        distill=dict(steps=1500, batch=64, warmup=100, lr=5e-4, fake_lr=1e-3, lr_end=0.1, c=1.0,
                     ema_halflife=20_000, ema_rampup=0.2, every=12_800, samples=4000),
    ),
    "fashion-mnist-gpu": dict(
        data=FASHION, network=dict(FASHION_UNET, model_channels=64, channel_mult=(1, 2, 2), num_blocks=2),
        teacher=dict(steps=20_000, batch=256, lr=1e-3, lr_end=0.0, ema_halflife=100_000, every=500_000),
        distill=dict(steps=10_000, batch=256, lr=1e-4, fake_lr=2e-4, lr_end=0.1, warmup=200, c=1.0,
                     ema_halflife=100_000, every=100_000),
    ),
    "cifar10-uncond": dict(
        data=None, network=CIFAR10_UNET | dict(label_dim=0), teacher=EDM_TRAINING,
        distill=TABLE5 | dict(steps=1_953_125)),
    "cifar10-cond": dict(
        data=None, network=CIFAR10_UNET | dict(label_dim=10), teacher=EDM_TRAINING,
        distill=TABLE5 | dict(steps=3_125_000)),
    "ffhq-64": dict(
        data=None, network=UNET64 | dict(dropout=0.05), teacher=EDM_TRAINING64, distill=TABLE5_64),
    "afhqv2-64": dict(
        data=None, network=UNET64 | dict(dropout=0.25), teacher=EDM_TRAINING64,
        distill=TABLE5_64 | dict(lr=5e-6, fake_lr=5e-6)),
}  # fmt: skip


# B.3's noise levels and weight 1 lose all variety on so small a network, guidance some of it.
TEXT_DIGITS = dict(
    teacher=dict(vae_steps=300, steps=7000, batch=32, lr=4e-3, lr_rampup=10_000, lr_end=0.0, beta1=0.9,
                 ema_halflife=5000, every=40_000),
    distill=dict(steps=900, batch=64, lr=1e-3, fake_lr=2e-3, lr_end=0.1, warmup=100, c=0.3,
                 ema_halflife=10_000, ema_rampup=0.2),
)  # fmt: skip

TEXT_PRESETS = {  # name -> the training of its teacher, the distillation
    "pixart-digits": TEXT_DIGITS,
    # Its twin that predicts velocities, distilled at the levels that it is trained on, a logit-normal t.
    "flow-digits": dict(
        predicts="velocity", teacher=TEXT_DIGITS["teacher"],
        distill=TEXT_DIGITS["distill"] | dict(sigma_mean=0.0, sigma_std=1.0, fake_sigma_mean=0.0,
                                              fake_sigma_std=1.0),
    ),
    # B.3, whose 4 GPUs accumulate 8 times: 1024 / 4 / 8 images at a time.  Not in it, and ours: c, digits'
    # times the root of the ratio of dimensions; guidance, that of PixArt's own pipeline; the moving average,
    # with its half-life.
    "pixart-512": dict(
        teacher=None,
        distill=dict(steps=16_000, batch=1024, micro_batch=32, lr=5e-6, fake_lr=5e-6, beta1=0.0, beta2=0.999,
                     sigma_init=2.5, sigma_distribution="pixart", fake_sigma_distribution="pixart",
                     weighting="one", fake_weighting="noise", c=2.4, guidance=4.5, precision="bf16",
                     checkpointing=True, warmup=0, ema_halflife=500_000, every=100_000),
    ),
}  # fmt: skip


# What the commands that train take for a preset.
TEACHERS = {name: {"data": p["data"]} | p["teacher"] for name, p in PRESETS.items()}
TEACHERS |= {name: preset["teacher"] for name, preset in TEXT_PRESETS.items() if preset["teacher"]}
DISTILLATIONS = {name: {"data": p["data"]} | p["distill"] for name, p in PRESETS.items()}
TEXT_DISTILLATIONS = {name: preset["distill"] for name, preset in TEXT_PRESETS.items()}


# ----------------------------------------------------------------------------------------------
# Settings.

DEVICE = "auto", "cpu, cuda, mps, or auto: a GPU if there is one", ("auto", "cpu", "cuda", "mps")
LEAST_IMAGES = 5  # of an evaluation: an image, its three neighbours, and one that is none of them
DATA = "'digits', or a folder or zip of images (default: by preset)"
SIGMA_INIT = "sigma* of a one-step generator whose file names none; SiD's have 2.5"


@dataclass(frozen=True)
class Training:
    """What every training has."""

    preset: str = option("digits", "defaults for all that follows, and the network", PRESETS)
    out: str = option(None, "folder of the run (default out/edm/PRESET-TASK-SEED)")
    seed: int = option(0, "of everything random", within="seed")
    resume: bool = option(False, "go on from the newest good checkpoint in --out, or start")
    # optimisation
    steps: int = option(None, "updates", within="count")
    batch: int = option(128, "images per update, over all processes", within="many")
    micro_batch: int = option(
        0, "images at a time on one process; 0: its whole share of the batch", within="some"
    )
    lr: float = option(1e-3, "learning rate", within="positive")
    lr_rampup: int = option(0, "images over which the learning rate grows to its value", within="some")
    lr_end: float = option(
        1.0, "learning rates fall along a cosine to this share of theirs; 1: constant", within="share"
    )
    beta1: float = option(0.0, "Adam's first beta", within="below one")
    beta2: float = option(0.99, "Adam's second beta", within="below one")
    ema_halflife: int = option(
        4000, "half-life of the moving average of the weights, in images", within="count"
    )
    ema_rampup: float = option(
        0.05, "the half-life is at most this share of the images so far", within="positive"
    )
    # the machine
    device: str = option(*DEVICE)
    precision: str = option("no", "what the networks compute in; weights and losses stay float32 (no)",
                            ("no", "bf16", "fp16"))  # fmt: skip
    compile: bool = option(False, "torch.compile the networks; eager, with a message, where it cannot")
    threads: int = option(0, "CPU threads; 0: torch's choice", within="threads")
    # the record
    every: int = option(20_000, "images between two checkpoints, with sample grids", within="count")
    keep: int = option(2, "checkpoints to keep", within="count")

    sharding = "ddp"  # no option, but of text-to-image


@dataclass(frozen=True)
class TeacherTraining(Training):
    """Training of a teacher, (B.2) with (B.5) to (B.7)."""

    preset: str = option("digits", "defaults for all that follows, and the network", TEACHERS)
    data: str = option(None, DATA)
    beta1: float = option(0.9, "Adam's first beta", within="below one")
    flip: bool = option(False, "mirror images at random")
    vae_steps: int = option(None, "of the text digits: updates of the VAE, which comes first", within="count")


@dataclass(frozen=True)
class Algorithm2(Training):
    """Algorithm 2, and the choices of B.2."""

    method: str = option(
        "sim",
        "loss of the generator; full adds what the theorem leaves out; "
        "diff_instruct with --weighting sid is DMD2's first term",
        ("sim", "full", "sid", "diff_instruct"),
    )
    distance: str = option("pseudo_huber", "row of Table 4, for sim and full", sim.DISTANCES)
    c: float = option(None, "where pseudo_huber turns linear, in the units of --space")
    delta: float = option(None, "where huber turns linear, likewise")
    alpha: float = option(None, "power of power and exp (even), or the alpha of sid")
    beta: float = option(None, "scale of exp")
    space: str = option("denoised", "what the distance compares", sim.SPACES)
    sigma_distribution: str = option("edm", "noise levels of the generator's update", sim.SIGMA_DISTRIBUTIONS)
    sigma_mean: float = option(None, "instead of a name: ln sigma ~ N(this, --sigma-std^2)")
    sigma_std: float = option(None, "the standard deviation of ln sigma", within="some")
    weighting: str = option("one", "weight over sigma of the generator's loss", sim.WEIGHTINGS)
    fake_sigma_distribution: str = option("edm", "noise levels of the online update", sim.SIGMA_DISTRIBUTIONS)
    fake_sigma_mean: float = option(None, "instead of a name: ln sigma ~ N(this, --fake-sigma-std^2)")
    fake_sigma_std: float = option(None, "the standard deviation of ln sigma", within="some")
    fake_weighting: str = option("edm", "weight over sigma of the online loss: of denoised images (one), "
                                 "of the noise, or lambda_EDM", ("one", "noise", "edm"))  # fmt: skip
    fake_lr: float = option(2e-3, "learning rate of the online network", within="positive")
    fake_updates: int = option(1, "online updates per generator update", within="count")
    warmup: int = option(0, "first steps, in which only the online network learns", within="some")
    share: bool = option(True, "the last online update and the generator's use the same samples: one forward")
    sigma_init: float = option(2.5, "sigma* of the generator g(z) = D(sigma* z; sigma*)", within="positive")


@dataclass(frozen=True)
class Distillation(Algorithm2):
    """Algorithm 2 on images."""

    teacher: str = option(None, "FILE.pkl of NVlabs or FILE.safetensors of ours; without one, it is trained")
    data: str = option(None, DATA)
    samples: int = option(
        10_000,
        "samples behind metrics.json, where there are data to compare with",
        within=at_least(LEAST_IMAGES),
    )
    evaluate_every: int = option(0, "images between two Frechet distances of the average to --data, of which "
                                 "the best is kept: a choice on the test data; 0: never",
                                 within="some")  # fmt: skip


@dataclass(frozen=True)
class TextDistillation(Algorithm2):
    """Algorithm 2 on text-to-image, B.3."""

    preset: str = option("pixart-digits", "defaults for all that follows", TEXT_PRESETS)
    teacher: str = option(None, "a diffusers pipeline: folder or hub name; the text digits train their own")
    transformer: str = option(None, "its transformer, if elsewhere: FILE in diffusers' or PixArt's naming")
    prompts: str = option(None, "FILE.txt, .jsonl or .csv (default: those of the pipeline's folder)")
    captions: str = option(None, "FILE.safetensors of `prompts.py encode`: features made beforehand")
    guidance: float = option(1.0, "classifier-free guidance of the teacher; 1: none", within="positive")
    fake_guidance: float = option(
        1.0, "the same of the online network, in the generator's update", within="positive"
    )
    sharding: str = option("ddp", "over processes: whole copies, or for big networks shares (fsdp)",
                           ("ddp", "fsdp"))  # fmt: skip
    checkpointing: bool = option(False, "gradient checkpointing: activations made again, for memory")
    samples: int = option(
        1000, "samples of metrics.json, where a classifier can read them", within=at_least(LEAST_IMAGES)
    )


# These decide no result; and these nothing of what a distillation trains, which sees no data.
MACHINE = "out resume device compile sharding threads keep micro_batch checkpointing".split()
EVALUATION = "data samples evaluate_every".split()


def settings(cfg: Training) -> dict[str, Any]:
    """What decides the networks that a run trains, ready for JSON."""
    others = MACHINE + (EVALUATION if isinstance(cfg, Algorithm2) else [])
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in others}


def check(cfg: Training) -> None:
    """Refuse impossible settings, each by its name.  Raises UserError."""
    check_ranges(cfg)
    if isinstance(cfg, Algorithm2):
        for which in ("", "fake_"):
            sigma_sampler(cfg, sim.SIGMA_DISTRIBUTIONS, which)
        surrogate(cfg)


# ----------------------------------------------------------------------------------------------
# Command lines.


NAMES = ("sigma_distribution", "fake_sigma_distribution")


def fitting(preset: dict[str, Any], /, method="sim", distance="pseudo_huber", **others) -> dict[str, Any]:
    """A preset's values, without its c where another loss is chosen, which takes none, and without its mean
    and standard deviation of levels where levels are chosen by name."""
    unfit = [] if method in ("sim", "full") and distance == "pseudo_huber" else ["c"]
    named = [name.removesuffix("distribution") for name in NAMES if others.get(name)]
    unfit += [of + part for of in named for part in ("mean", "std")]
    return {name: value for name, value in preset.items() if name not in unfit}


def parse(cls: type, description: str, argv: Sequence[str] | None = None, presets: dict | None = None) -> Any:
    """Command line -> cls, a dataclass of options.  presets: {name: {field: value}}, for --preset."""
    parser = Parser(description)
    add_options(parser, cls)
    if presets:
        chosen = vars(parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(NAMES)))[0])
        parser.set_defaults(**fitting(presets[chosen["preset"]], **chosen))
    return cls(**vars(parser.parse_args(argv)))


def end_group() -> None:
    """torchrun's processes end what connects them before they exit: threads left running may abort one, in
    torch 2.13 four of 14 runs of six processes on a CPU."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def command_line(main: Callable, cls: type, description: str, argv: Sequence[str] | None = None,
                 presets: dict | None = None) -> int:  # fmt: skip
    """Parse, run main(cfg), return the exit code: 2 and one line for a wrong input."""
    atexit.register(end_group)
    return run(lambda: main(parse(cls, description, argv, presets)))
