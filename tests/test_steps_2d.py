"""The plane's loop against the same steps by hand: every option, in the weights of all networks."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from toy import logbook, train_2d
from toy.config import MACHINE, Config, resolve
from toy.mixtures import make_target
from toy.networks import Denoiser, VPDenoiser, mlp, vp_betas, vp_sigmas

TINY = dict(
    steps=4, teacher_steps=5, warmup=2, batch=16, width=8, bank=32, fake_lr=0.03, samples=20, no_pictures=True
)
VP = dict(sigma_distribution="vp", fake_sigma_distribution="vp", network="vp")
METHODS = Config.__dataclass_fields__["method"].metadata["choices"]

OPTIONS = [  # each case is about its last option
    dict(target="grid"), dict(seed=3), *(dict(method=name) for name in METHODS[1:]),
    dict(distance="l2"), dict(distance="power"), dict(distance="exp"), dict(distance="l1"),
    dict(distance="huber"), dict(c=0.7), dict(distance="huber", delta=0.05), dict(distance="power", alpha=6),
    dict(distance="exp", alpha=4), dict(distance="exp", beta=2.0), dict(method="sid", alpha=0.5),
    dict(method="density", distance="l2"), dict(method="density", space="score"), dict(space="noise"),
    dict(space="score"), *(dict(sigma_distribution=name) for name in ("sim", "karras", "pixart", "vp")),
    dict(weighting="edm"), dict(target="grid", weighting="edm"), dict(weighting="sid"),
    dict(space="score", weighting="sid"), dict(method="sid", weighting="sid"), dict(teacher="exact"),
    dict(fake="exact"), dict(fake="exact", bank=8), dict(fake="exact", space="noise"),
    *(dict(fake_sigma_distribution=name) for name in ("sim", "karras", "pixart", "vp")),
    dict(fake_updates=3), dict(warmup=0), dict(warmup=5), dict(steps=6), dict(batch=24), dict(lr=5e-3),
    dict(fake_lr=1e-3), dict(beta2=0.9), dict(schedule="constant"), dict(ema=0.1), dict(ema=0.0),
    VP, dict(width=12), VP | dict(width=12), dict(sigma_init=1.3),
]  # fmt: skip


def config(tmp_path, **changes):
    return resolve(Config(**TINY | {"out": str(tmp_path / "run")} | changes))


def plain_network(cfg):
    if cfg.network == "vp":
        return VPDenoiser(width=cfg.width)
    return Denoiser(width=cfg.width, sigma_data=make_target(cfg.target).data_std())


def make_teacher(cfg):
    """Of weights in which every branch counts."""
    torch.manual_seed(7)
    network = plain_network(cfg)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.7 * p[0].numel() ** -0.5)
    return network.requires_grad_(False)


# --- by hand -------------------------------------------------------------------------------------


def draw_sigma(name, n, rng):
    if name == "vp":
        return vp_sigmas()[torch.randint(1, 1000, (n,), generator=rng)]
    if name == "karras":
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return (high + (1 - 0.8 * torch.rand(n, generator=rng)) * (low - high)) ** 7
    mean, std = {"edm": (-1.2, 1.2), "sim": (-3.5, 2.5), "pixart": (-2.0, 2.0)}[name]
    sigma = (mean + std * torch.randn(n, generator=rng)).exp()
    return sigma.clamp(0.01, 156.6155) if name == "pixart" else sigma


def slope(cfg, y):
    """d'(y), Table 4."""
    a = cfg.alpha or (2 if cfg.distance == "exp" else 4)
    beta, c, delta = cfg.beta or 0.3, cfg.c or 0.1, cfg.delta or 0.5
    total = lambda v: v.sum(1, keepdim=True)
    return {"l2": lambda: 2 * y, "power": lambda: a * y ** (a - 1), "l1": lambda: y.sign(),
            "exp": lambda: a * beta * (beta * total(y**a)).exp() * y ** (a - 1),
            "huber": lambda: y.clamp(-delta, delta),
            "pseudo_huber": lambda: y / (total(y**2) + c**2).sqrt()}[cfg.distance]()  # fmt: skip


def exact_denoiser(means, stds):
    """E[x0 | xt] of equally many points, each blurred by its std."""

    def denoiser(xt, sigma):
        s2, v = sigma[:, None] ** 2, sigma[:, None] ** 2 + stds**2
        share = (-((xt[:, None] - means) ** 2).sum(2) / (2 * v) - v.log()).softmax(1)
        mean = (s2[:, :, None] * means + stds[:, None] ** 2 * xt[:, None]) / v[:, :, None]
        return (share[:, :, None] * mean).sum(1)

    return denoiser


def generator_loss(cfg, teacher, fake, x0, sigma, noise):
    """Of (fake, teacher, target), in the space of the distance -> (B,)."""
    s = sigma[:, None]
    unit, xt = s ** {"denoised": 0, "noise": 1, "score": 2}[cfg.space], x0 + s * noise
    if cfg.method == "density":  # theta in log q(xt | x0) and in the target, nowhere else
        xt = xt.detach()
        d_fake, d_teacher = fake(xt, sigma).detach(), teacher(xt, sigma).detach()
        inner = -(slope(cfg, (d_fake - d_teacher) / unit) * (d_fake - x0) / unit).sum(1)
        return inner.detach() * -((xt - x0) ** 2).sum(1) / (2 * sigma**2) + inner
    d_fake, d_teacher = fake(xt, sigma), teacher(xt, sigma)
    error = (x0 - d_teacher).detach().abs().mean(1)
    data_std = make_target(cfg.target).data_std()
    weight = {"one": 1.0, "edm": 1 / data_std**2 + 1 / sigma**2, "sid": unit[:, 0] ** 2 / error}[
        cfg.weighting
    ]
    y, residual, pull = (d_fake - d_teacher) / unit, (d_fake - x0) / unit, (d_teacher - x0) / unit
    if cfg.method == "sid":
        loss = -y * (pull + (1.2 if cfg.alpha is None else cfg.alpha) * y)
    elif cfg.method == "diff_instruct":
        loss = y.detach() * x0 / unit
    else:
        loss = -slope(cfg, y) * residual
        loss = loss + slope(cfg, y).detach() * y if cfg.method == "full" else loss  # d'(y) dy = d(d(y))
    return weight * loss.sum(1)


def denoising_loss(cfg, network, x0, sigma, noise):
    """Weighted as lambda_EDM says, or as Listing 1's T g^2 on scores of its process -> (B,)."""
    weight = 1 / make_target(cfg.target).data_std() ** 2 + 1 / sigma**2
    if cfg.network == "vp":
        t = (vp_sigmas() == sigma[:, None]).int().argmax(1)
        weight = 1000 * vp_betas()[t].float() * (1 + sigma**2) / sigma**4
    return weight * ((network(x0 + sigma[:, None] * noise, sigma) - x0) ** 2).sum(1)


class Learner:
    """Adam on what a network has, at a rate that falls along a cosine over `steps`, or does not."""

    def __init__(self, network, lr, steps, betas, cosine=True):
        self.parameters, self.lr, self.steps, self.betas = [*network.parameters()], lr, steps, betas
        self.cosine, self.n = cosine, 0
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in "mv")

    def learn(self, loss, step):
        """On the mean of the loss, at the rate of that step."""
        self.n, (b1, b2) = self.n + 1, self.betas
        rate = self.lr * ((1 + math.cos(math.pi * step / self.steps)) / 2 if self.cosine else 1.0)
        gradients = torch.autograd.grad(loss.mean(), self.parameters)
        for p, m, v, g in zip(self.parameters, self.means, self.squares, gradients):
            m.lerp_(g, 1 - b1)
            v.lerp_(g**2, 1 - b2)
            p.data -= rate * m / (1 - b1**self.n) / ((v / (1 - b2**self.n)).sqrt() + 1e-8)


def follow(average, network, decay, step):
    """The moving average after that step: a copy at first, then ever slower down to its decay."""
    keep = min(decay, (1 + step) / (10 + step)) if step else 0.0
    for a, p in zip(average.parameters(), network.parameters()):
        a.data.lerp_(p.data, 1 - keep)


def by_hand(cfg):
    """-> the generator as a function of (its network, z), and the networks theta, psi, average."""
    rng, target, teacher = torch.Generator().manual_seed(cfg.seed), make_target(cfg.target), make_teacher(cfg)
    normal = lambda n=cfg.batch: torch.randn(n, 2, generator=rng)
    torch.manual_seed(cfg.seed)
    psi = copy.deepcopy(teacher).requires_grad_(True)
    theta = mlp([2] + [cfg.width] * 3 + [2]) if cfg.network == "vp" else copy.deepcopy(psi)
    one_step = lambda net, z: net(cfg.sigma_init * z, torch.full((len(z),), cfg.sigma_init))
    g = (lambda net, z: net(z)) if cfg.network == "vp" else one_step
    bank, average = normal(cfg.bank), copy.deepcopy(theta)
    how = cfg.steps, (0.0, cfg.beta2), cfg.schedule == "cosine"
    of_psi, of_theta = Learner(psi, cfg.fake_lr, *how), Learner(theta, cfg.lr, *how)
    judge = exact_denoiser(target.means, target.stds) if cfg.teacher == "exact" else teacher

    def psi_learns(step):
        x0 = g(theta, normal()).detach()
        sigma, noise = draw_sigma(cfg.fake_sigma_distribution, cfg.batch, rng), normal()
        of_psi.learn(denoising_loss(cfg, psi, x0, sigma, noise), step)

    exact = cfg.fake == "exact"
    for _ in range(0 if exact else cfg.warmup):
        psi_learns(0)
    for step in range(cfg.steps):
        for _ in range(0 if exact else cfg.fake_updates):
            psi_learns(step)
        points = g(theta, bank).detach()
        fake = exact_denoiser(points, torch.zeros(len(bank))) if exact else psi
        z = bank[torch.randint(len(bank), (cfg.batch,), generator=rng)] if exact else normal()
        sigma, noise = draw_sigma(cfg.sigma_distribution, cfg.batch, rng), normal()
        of_theta.learn(generator_loss(cfg, judge, fake, g(theta, z), sigma, noise), step)
        follow(average, theta, cfg.ema, step)
    return g, theta, psi, average


# --- against the program -------------------------------------------------------------------------


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def changes(cfg):
    """What a run by hand changes, of theta, psi and the average, and where they start."""
    start = [flat(net.parameters()) for net in by_hand(dataclasses.replace(cfg, steps=0, warmup=0))[1:]]
    g, *networks = by_hand(cfg)
    return [flat(net.parameters()) - s for net, s in zip(networks, start)], start, g, networks


@pytest.fixture(autouse=True)
def few_looks(monkeypatch):
    monkeypatch.setattr(train_2d, "LOGS", 1)
    monkeypatch.setattr(logbook, "N_LOG", 40)
    monkeypatch.setattr(logbook, "N_PROBE", 20)


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_a_run_is_its_steps_by_hand(tmp_path, options):
    cfg = config(tmp_path, **options)
    teacher = make_teacher(cfg)
    train_2d.main(cfg, lambda *args: teacher)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    hand, start, g, networks = changes(cfg)
    body = "" if cfg.network == "vp" else "denoiser."
    prefixes = ("generator", body), ("fake", ""), ("ema", f"module.{body}")
    for net, s, (part, prefix), expected in zip(networks, start, prefixes, hand):
        found = flat(state[part][prefix + name] for name, _ in net.named_parameters()) - s
        assert (relative(found, expected) < 1e-4) if expected.any() else not found.any(), part
    z = torch.randn(cfg.samples, 2, generator=torch.Generator().manual_seed(cfg.seed + 2))
    samples = np.load(tmp_path / "run/samples.npz")["generator"]  # of the average, not of theta
    assert np.abs(g(networks[2], z).detach().numpy() - samples).max() < 1e-4
    if options:  # and the option, the last one, matters
        other = changes(config(tmp_path, **dict([*options.items()][:-1])))[0]
        assert any(a.shape != b.shape or (a - b).norm() > 0.01 * b.norm() for a, b in zip(other, hand))


def test_every_option_has_its_case():
    decide = {f.name for f in dataclasses.fields(Config)} - {*MACHINE, "teacher_steps", "samples"}
    assert {[*options][-1] for options in OPTIONS} == decide


@pytest.mark.parametrize("options", [{}, dict(fake_sigma_distribution="sim"), VP, dict(width=12)], ids=str)
def test_the_teacher_is_its_steps_by_hand(tmp_path, options):
    cfg = config(tmp_path, teacher_steps=75, **options)
    target = make_target(cfg.target)
    torch.manual_seed(0)
    network = plain_network(cfg)
    start, average, rng = flat(network.parameters()), copy.deepcopy(network), torch.Generator().manual_seed(0)
    learner = Learner(network, 5e-3, 75, (0.9, 0.99))
    for step in range(75):
        x0, sigma = target.sample(16, rng), draw_sigma(cfg.fake_sigma_distribution, 16, rng)
        learner.learn(denoising_loss(cfg, network, x0, sigma, torch.randn(16, 2, generator=rng)), step)
        follow(average, network, 1 - 1 / (0.02 * 75), step)
    torch.manual_seed(0)
    found = train_2d.train_teacher(cfg, target, torch.Generator().manual_seed(0), batch=16)
    assert relative(flat(found.parameters()) - start, flat(average.parameters()) - start) < 1e-2
    assert not any(p.requires_grad for p in found.parameters())
