"""The loop of images against the same steps by hand: every option, in the weights of all networks."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from edm import distill, train_teacher
from edm.config import MACHINE, TEACHERS, Distillation, TeacherTraining, command_line
from edm.images.data import Images
from edm.images.networks import EDMPrecond
from edm.training.trainee import make_accelerator
from tests.by_hand import (
    Learner,
    denoising_loss,
    draw_sigma,
    edm_weight,
    flat,
    follow,
    generator_loss,
    levels,
    relative,
)

DATA_STD = 0.8  # of the teacher: not what anything has by default
UNET = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=8, channel_mult=(1,), num_blocks=1,
            attn_resolutions=(), dropout=0.3, channel_mult_emb=2, sigma_data=DATA_STD)  # fmt: skip
TINY = dict(device="cpu", threads=1, steps=3, batch=8, ema_rampup=1.0)
METHODS = Distillation.__dataclass_fields__["method"].metadata["choices"]

MANY = dict(seed=3, steps=4, batch=6, lr=3e-3, lr_rampup=10, lr_end=0.1, beta1=0.8, beta2=0.9,
            ema_halflife=12, c=3.0, space="noise", sigma_distribution="pixart", weighting="edm", warmup=1,
            fake_sigma_distribution="karras", fake_lr=5e-3, fake_updates=2, share=False, micro_batch=2,
            sigma_init=1.5)  # fmt: skip
OPTIONS = [  # each case is about its last option, and the first ones see the most
    MANY, {}, *(dict(method=name) for name in METHODS[1:]), dict(method="sid", alpha=0.5),
    dict(distance="huber", delta=0.05), dict(distance="power", alpha=6), dict(distance="exp", beta=0.003),
    dict(weighting="sid"), dict(fake_weighting="one"), dict(fake_weighting="noise"),
    dict(weighting="noise"), dict(space="score", weighting="noise"),
    dict(space="noise", fake_weighting="noise"),
    dict(sigma_mean=-2.0, sigma_std=0.5), dict(sigma_std=0.5, sigma_mean=-2.0),
    dict(fake_sigma_mean=0.5, fake_sigma_std=0.7), dict(fake_sigma_std=0.7, fake_sigma_mean=0.5),
    dict(ema_rampup=0.3), dict(warmup=2),
    dict(lr_rampup=10), dict(seed=3), dict(steps=4), dict(batch=6), dict(lr=3e-3), dict(fake_lr=5e-3),
    dict(lr_end=0.1), dict(beta1=0.8), dict(beta2=0.9), dict(ema_halflife=12), dict(distance="l2"),
    dict(distance="power"), dict(beta=0.003, distance="exp"), dict(distance="l1"), dict(distance="huber"),
    dict(c=3.0), dict(beta=0.003, distance="exp", alpha=4), dict(space="noise"), dict(space="score"),
    dict(weighting="edm"), *(dict(sigma_distribution=name) for name in ("sim", "karras", "pixart")),
    dict(sigma_init=1.5), *(dict(fake_sigma_distribution=name) for name in ("sim", "karras", "pixart")),
    dict(fake_updates=3), dict(space="score", weighting="sid"), dict(method="sid", weighting="sid"),
    dict(fake_updates=2, share=False),
]  # fmt: skip


def config(**changes):
    return Distillation(**TINY | dict(fake_lr=0.02) | changes)


def network(**changes):
    """A teacher in which every branch counts, and dropout, but when it learns."""
    torch.manual_seed(0)
    made = EDMPrecond(**UNET | changes).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return made.requires_grad_(False)


def generator_of(*numbers):
    """The random numbers of a step, of an update in it."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator().manual_seed(seed)


def rate(cfg, lr, step):
    """Of the learning, at a step: a ramp times a cosine that ends at a share of it."""
    ramp = min(1.0, step * cfg.batch / cfg.lr_rampup) if cfg.lr_rampup else 1.0
    return lr * ramp * (cfg.lr_end + (1 - cfg.lr_end) * (1 + math.cos(math.pi * step / cfg.steps)) / 2)


def kept(cfg, updates):
    """What the moving average keeps at its n-th update."""
    return 0.5 ** (cfg.batch / min(cfg.ema_halflife, cfg.ema_rampup * updates * cfg.batch))


def assert_same(program, hand):
    for found, expected in zip(program[0], hand[0], strict=True):
        assert relative(found, expected) < 1e-4
    for found, expected in zip(program[1], hand[1], strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def assert_last_matters(options, by_hand):
    """Without the last of the options, another result."""
    if options:
        one, other = by_hand(options)[0], by_hand(dict([*options.items()][:-1]))[0]
        assert max(relative(a, b) for a, b in zip(one, other)) > 0.01


# ----------------------------------------------------------------------------------------------
# Distillation.


@functools.cache
def run_by_hand(cfg, label_dim=10):
    """-> how far theta, psi and theta's average get in all steps, and each step's numbers."""
    teacher = network(label_dim=label_dim)
    theta, psi, average = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(3))
    of_theta, of_psi = (Learner(net, cfg.beta1, cfg.beta2) for net in (theta, psi))
    numbers = []

    def draw(*which):
        rng = generator_of(cfg.seed, *which)
        normal = lambda: torch.randn(cfg.batch, *teacher.shape, generator=rng).double()
        z, of_psi = normal(), (draw_sigma(levels(cfg, "fake_"), cfg.batch, rng), normal())
        of_theta = draw_sigma(levels(cfg), cfg.batch, rng), normal()
        labels = torch.eye(10)[torch.randint(10, (cfg.batch,), generator=rng)] if label_dim else None
        told = lambda net: lambda x, sigma: net(x, sigma.double(), labels)
        g = lambda: told(theta)(cfg.sigma_init * z, torch.full((cfg.batch,), cfg.sigma_init))
        return of_psi, of_theta, told, g

    for n in range(cfg.steps):
        for update in range(cfg.fake_updates):
            (sigma, noise), _, told, g = drawn = draw(n, update)
            weights = {"one": 1.0, "noise": sigma**-2.0, "edm": edm_weight(sigma, DATA_STD)}
            weight = weights[cfg.fake_weighting]
            of_psi.learn(denoising_loss(told(psi), g(), sigma, noise, weight), rate(cfg, cfg.fake_lr, n))
        numbers.append(dict(fake_loss=of_psi.loss, fake_gradient=of_psi.gradient))
        if n < cfg.warmup:
            continue
        _, (sigma, noise), told, g = drawn if cfg.share else draw(n, cfg.fake_updates)
        losses = generator_loss(cfg, told(teacher), told(psi), g(), sigma, noise, DATA_STD)
        of_theta.learn(losses, rate(cfg, cfg.lr, n))
        numbers[-1] |= dict(surrogate=of_theta.loss, generator_gradient=of_theta.gradient)
        follow(average, theta, kept(cfg, n + 1 - cfg.warmup))
    return [flat(net) - flat(teacher) for net in (theta, psi, average)], numbers


def run(cfg, label_dim=10):
    """The same by the program."""
    teacher = network(label_dim=label_dim)
    start, task = flat(teacher), distill.build(cfg, make_accelerator(cfg), teacher)
    numbers = [{name: v.item() for name, v in task.step(n).items()} for n in range(cfg.steps)]
    assert torch.equal(flat(task.teacher), start)
    networks = task.generator.network, task.fake.network, task.ema.network
    return [flat(net) - start for net in networks], numbers


PARTS = [dict(micro_batch=2), dict(micro_batch=4, share=False), dict(micro_batch=3, batch=6, fake_updates=2)]


@pytest.mark.parametrize("options", PARTS, ids=str)
def test_micro_batches_change_nothing(options):
    assert_same(run(config(**options)), run_by_hand(config(**options)))


def test_a_network_without_labels():
    assert_same(run(config(), label_dim=0), run_by_hand(config(), label_dim=0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_by_hand(options):
    cfg = config(**options)
    assert_same(run(cfg), run_by_hand(cfg))
    assert_last_matters(options, lambda given: run_by_hand(config(**given)))


# ----------------------------------------------------------------------------------------------
# The teacher's training.

TEACHER_OPTIONS = [
    dict(seed=3, steps=4, batch=6, lr=3e-3, lr_rampup=10, lr_end=0.1, beta1=0.5, flip=True), {},
    dict(seed=3), dict(steps=4), dict(batch=6), dict(lr=3e-3), dict(lr_rampup=10), dict(lr_end=0.1),
    dict(beta1=0.5), dict(beta2=0.5), dict(ema_halflife=12), dict(ema_rampup=0.3), dict(flip=True),
]  # fmt: skip


def pixels():
    """Thirty images, each of its own class and side."""
    noise = torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return Images(noise, torch.arange(30) % 10, "noise")


@functools.cache
def learn_by_hand(cfg, dropout=0.3):
    """-> how far the network and its average get in all steps, and each step's numbers."""
    data, teacher = pixels(), network(dropout=dropout).requires_grad_(True).train()
    start, average, learner = flat(teacher), copy.deepcopy(teacher), Learner(teacher, cfg.beta1, cfg.beta2)
    numbers = []
    for n in range(cfg.steps):
        rng = generator_of(cfg.seed, n)
        index = torch.randint(len(data), (cfg.batch,), generator=rng)
        x0, labels = data.images[index].double() / 127.5 - 1, torch.eye(10)[data.labels[index]]
        if cfg.flip:
            mirrored = torch.rand(cfg.batch, generator=rng) < 0.5
            x0 = torch.stack([x.flip(2) if mirror else x for x, mirror in zip(x0, mirrored)])
        sigma = draw_sigma("edm", cfg.batch, rng)
        noise = torch.randn(cfg.batch, 1, 8, 8, generator=rng)
        torch.set_rng_state(generator_of(cfg.seed, n, 1).get_state())  # of dropout
        told = lambda x, sigma: teacher(x, sigma.double(), labels)  # noqa: B023
        losses = denoising_loss(told, x0, sigma, noise, edm_weight(sigma, DATA_STD))
        learner.learn(losses, rate(cfg, cfg.lr, n))
        numbers.append(dict(loss=learner.loss, gradient=learner.gradient))
        follow(average, teacher, kept(cfg, n + 1))
    return [flat(net) - start for net in (teacher, average)], numbers


def learn(cfg, dropout=0.3):
    """The same by the program."""
    accelerator, teacher = make_accelerator(cfg), network(dropout=dropout).requires_grad_(True).train()
    start, examples = flat(teacher), train_teacher.image_examples(cfg, accelerator.device, teacher, pixels())
    task = train_teacher.TeacherTask(cfg, accelerator, teacher, examples)
    numbers = [{name: v.item() for name, v in task.step(n).items()} for n in range(cfg.steps)]
    assert not task.ema.network.training
    return [flat(net) - start for net in (task.teacher.network, task.ema.network)], numbers


@pytest.mark.parametrize("options", TEACHER_OPTIONS, ids=str)
def test_the_teachers_steps_are_those_by_hand(options):
    cfg = TeacherTraining(**TINY | options)
    assert_same(learn(cfg), learn_by_hand(cfg))
    assert_last_matters(options, lambda given: learn_by_hand(TeacherTraining(**TINY | given)))


def test_the_teachers_micro_batches_change_nothing():
    cfg = TeacherTraining(**TINY, micro_batch=2)
    assert_same(learn(cfg, dropout=0.0), learn_by_hand(cfg, dropout=0.0))


@pytest.mark.parametrize("cls, cases", [(Distillation, OPTIONS), (TeacherTraining, TEACHER_OPTIONS)])
def test_every_option_has_its_case(cls, cases):
    names = {f.name for f in dataclasses.fields(cls)} - {*MACHINE}
    names -= {
        *"preset teacher data samples evaluate_every every precision vae_steps".split()
    }  # of no one step
    assert {[*options][-1] for options in cases if options} == names


@pytest.mark.parametrize(
    "words, message",
    [
        ("--vae-steps 5", "--vae-steps is for the preset pixart-digits"),
        ("--preset pixart-digits --data digits", "preset pixart-digits has data of its own"),
        ("--preset pixart-digits --flip", "preset pixart-digits has data of its own"),
        ("--preset pixart-digits --vae-steps 0", "--vae-steps must be at least 1, got 0"),
        ("--preset cifar10-cond", "preset cifar10-cond needs --data"),
    ],
)
def test_a_teacher_refuses_what_its_kind_does_not_have(words, message, tmp_path, capsys):
    given = [*words.split(), "--device", "cpu", "--out", str(tmp_path / "new")]
    assert command_line(train_teacher.main, TeacherTraining, "", given, TEACHERS) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_vae_steps_are_the_vaes(monkeypatch, tmp_path):
    class Heeded(Exception):
        pass

    def train_vae(images, steps):
        raise Heeded(steps)

    monkeypatch.setattr("edm.text.digits.train_vae", train_vae)
    for words, steps in (([], 300), (["--vae-steps", "7"], 7)):
        given = ["--preset", "pixart-digits", "--device", "cpu", "--out", str(tmp_path / str(steps)), *words]
        with pytest.raises(Heeded, match=str(steps)):
            command_line(train_teacher.main, TeacherTraining, "", given, TEACHERS)
