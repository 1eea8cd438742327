"""The plane's loop against the same steps by hand: every option, in the weights of all networks."""

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import by_hand
from tests.by_hand import Learner, flat, follow, generator_loss, levels, relative
from toy import logbook, train_2d
from toy.config import MACHINE, Config, resolve
from toy.folder import Folder
from toy.mixtures import make_target
from toy.networks import Denoiser, FlowDenoiser, VPDenoiser, mlp, vp_betas, vp_sigmas

TINY = dict(steps=4, warmup=2, batch=16, width=8, bank=32, fake_lr=0.03, samples=20, no_pictures=True)
VP = dict(sigma_distribution="vp", fake_sigma_distribution="vp", network="vp")
FLOW = dict(fake_sigma_distribution="flow", network="flow")
METHODS = Config.__dataclass_fields__["method"].metadata["choices"]

MANY = dict(target="grid", seed=3, c=0.7, sigma_distribution="pixart", fake_sigma_distribution="karras",
            steps=5, weighting="edm", fake_updates=2, warmup=1, batch=24, lr=5e-3, fake_lr=0.01, beta2=0.9,
            schedule="constant", eps=1e-5, ema=0.1, sigma_init=1.3)  # fmt: skip
OPTIONS = [  # each case is about its last option, and the first ones see the most
    MANY, {}, VP, dict(fake="exact"), dict(teacher="exact"), *(dict(method=name) for name in METHODS[1:]),
    dict(method="sid", alpha=0.5), dict(distance="huber", delta=0.05), dict(distance="power", alpha=6),
    dict(distance="exp", beta=2.0), dict(c=0.7), dict(space="score"), dict(weighting="sid"),
    dict(sigma_mean=-2.0, sigma_std=0.5), dict(sigma_std=0.5, sigma_mean=-2.0), dict(weighting="noise"),
    dict(fake_sigma_mean=0.5, fake_sigma_std=0.7), dict(fake_sigma_std=0.7, fake_sigma_mean=0.5),
    dict(sigma_distribution="vp"), dict(fake="exact", bank=8), dict(target="grid"), dict(seed=3),
    dict(distance="l2"), dict(distance="power"), dict(distance="exp"), dict(distance="l1"),
    dict(distance="huber"), dict(distance="exp", alpha=4), dict(space="noise"),
    dict(method="density", distance="l2"), dict(method="density", space="score"), dict(weighting="edm"),
    *(dict(sigma_distribution=name) for name in ("sim", "karras", "pixart")),
    dict(fake="exact", space="noise"), dict(target="grid", weighting="edm"),
    dict(space="score", weighting="sid"), dict(method="sid", weighting="sid"),
    *(dict(fake_sigma_distribution=name) for name in ("sim", "karras", "pixart", "vp", "flow")),
    dict(network="flow"), dict(sigma_distribution="flow"), dict(network="flow", width=12),
    dict(fake_updates=3), dict(warmup=0), dict(warmup=5), dict(steps=6), dict(batch=24), dict(lr=5e-3),
    dict(fake_lr=1e-3), dict(beta2=0.9), dict(schedule="constant"), dict(schedule="trapezoid"),
    dict(eps=1e-2), dict(ema=0.1), dict(ema=0.0), dict(width=12), VP | dict(width=12), dict(sigma_init=1.3),
]  # fmt: skip


def config(**changes):
    return resolve(Config(**TINY | changes))


def plain_network(cfg):
    if cfg.network != "edm":
        return (VPDenoiser if cfg.network == "vp" else FlowDenoiser)(width=cfg.width)
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
    if name == "flow":
        t = 0.001 + 0.998 * torch.rand(n, generator=rng)
        return t / (1 - t)
    return by_hand.draw_sigma(name, n, rng)


def exact_denoiser(means, stds):
    """E[x0 | xt] of equally many points, each blurred by its std."""

    def denoiser(xt, sigma):
        s2, v = sigma[:, None] ** 2, sigma[:, None] ** 2 + stds**2
        share = (-((xt[:, None] - means) ** 2).sum(2) / (2 * v) - v.log()).softmax(1)
        mean = (s2[:, :, None] * means + stds[:, None] ** 2 * xt[:, None]) / v[:, :, None]
        return (share[:, :, None] * mean).sum(1)

    return denoiser


def denoising_loss(cfg, network, x0, sigma, noise):
    """Weighted by lambda_EDM, or by Listing 1's T g^2 on scores of its process, or by 1 on velocities."""
    weight = by_hand.edm_weight(sigma, make_target(cfg.target).data_std())
    if cfg.network == "vp":
        t = (vp_sigmas() == sigma[:, None]).int().argmax(1)
        weight = 1000 * vp_betas()[t].float() * (1 + sigma**2) / sigma**4
    if cfg.network == "flow":
        weight = ((1 + sigma) / sigma) ** 2
    return by_hand.denoising_loss(network, x0, sigma, noise, weight)


def cosine(step, steps):
    return (1 + math.cos(math.pi * step / steps)) / 2


def shares(step, steps):
    return dict(trapezoid=min(1.0, (steps - step) / (0.3 * steps)), cosine=cosine(step, steps), constant=1.0)


def ramp(decay, step):
    """What the moving average keeps: at first nothing, then ever more up to its decay."""
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


@functools.cache
def run_by_hand(cfg):
    """-> generator, fake, ema: (network, its start); g(network, z); the log's last row."""
    rng, target, teacher = torch.Generator().manual_seed(cfg.seed), make_target(cfg.target), make_teacher(cfg)
    normal = lambda n=cfg.batch: torch.randn(n, 2, generator=rng)
    torch.manual_seed(cfg.seed)
    psi = copy.deepcopy(teacher).requires_grad_(True)
    theta = mlp([2] + [cfg.width] * 3 + [2]) if cfg.network == "vp" else copy.deepcopy(psi)
    one_step = lambda net, z: net(cfg.sigma_init * z, torch.full((len(z),), cfg.sigma_init))
    g = (lambda net, z: net(z)) if cfg.network == "vp" else one_step
    bank, average, start = normal(cfg.bank), copy.deepcopy(theta), [flat(theta), flat(psi)]
    of_psi, of_theta = (Learner(net, 0.0, cfg.beta2, cfg.eps) for net in (psi, theta))
    share = lambda step: shares(step, cfg.steps)[cfg.schedule]
    judge = exact_denoiser(target.means, target.stds) if cfg.teacher == "exact" else teacher

    def psi_learns(step):
        x0 = g(theta, normal()).detach()
        sigma, noise = draw_sigma(levels(cfg, "fake_"), cfg.batch, rng), normal()
        of_psi.learn(denoising_loss(cfg, psi, x0, sigma, noise), cfg.fake_lr * share(step))

    exact = cfg.fake == "exact"
    for _ in range(0 if exact else cfg.warmup):
        psi_learns(0)
    for step in range(cfg.steps):
        for _ in range(0 if exact else cfg.fake_updates):
            psi_learns(step)
        points = g(theta, bank).detach()
        fake = exact_denoiser(points, torch.zeros(len(bank))) if exact else psi
        z = bank[torch.randint(len(bank), (cfg.batch,), generator=rng)] if exact else normal()
        sigma, noise = draw_sigma(levels(cfg), cfg.batch, rng), normal()
        losses = generator_loss(cfg, judge, fake, g(theta, z), sigma, noise, target.data_std())
        of_theta.learn(losses, cfg.lr * share(step))
        follow(average, theta, ramp(cfg.ema, step))
    row = dict(surrogate=of_theta.loss, generator_gradient=of_theta.gradient)
    row |= {} if exact else dict(fake_loss=of_psi.loss, fake_gradient=of_psi.gradient)
    networks = dict(generator=(theta, start[0]), fake=(psi, start[1]), ema=(average, start[0]))
    return SimpleNamespace(networks=networks, g=g, row=row)


# --- against the program -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_looks(monkeypatch):
    monkeypatch.setattr(train_2d, "LOGS", 1)
    monkeypatch.setattr(logbook, "N_LOG", 40)
    monkeypatch.setattr(logbook, "N_PROBE", 20)


@pytest.mark.parametrize(
    "options", [{}, dict(fake_sigma_distribution="sim"), VP, FLOW, dict(width=12)], ids=str
)
def test_the_teacher_is_its_steps_by_hand(options):
    cfg = config(teacher_steps=75, **options)
    target, rng = make_target(cfg.target), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = plain_network(cfg)
    start, average, learner = flat(network), copy.deepcopy(network), Learner(network, 0.9, 0.99)
    for step in range(75):
        x0, sigma = target.sample(16, rng), draw_sigma(levels(cfg, "fake_"), 16, rng)
        losses = denoising_loss(cfg, network, x0, sigma, torch.randn(16, 2, generator=rng))
        learner.learn(losses, 5e-3 * cosine(step, 75))
        follow(average, network, ramp(1 - 1 / (0.02 * 75), step))
    torch.manual_seed(0)
    found = train_2d.train_teacher(cfg, target, torch.Generator().manual_seed(0), batch=16)
    assert relative(flat(found) - start, flat(average) - start) < 1e-5  # 2e-5 from its last weights
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_is_its_steps_by_hand(tmp_path, options):
    cfg = config(**options)
    teacher, hand = make_teacher(cfg), run_by_hand(cfg)
    train_2d.main(dataclasses.replace(cfg, out=str(tmp_path)), lambda *args: teacher)
    state = Folder(tmp_path, {}).load()
    body = "" if cfg.network == "vp" else "denoiser."
    for name, prefix in (("generator", body), ("fake", ""), ("ema", f"module.{body}")):
        network, start = hand.networks[name]
        found = flat(state[name][prefix + part] for part, _ in network.named_parameters())
        if torch.equal(flat(network), start):
            assert torch.equal(found, start), name
        else:
            assert relative(found - start, flat(network) - start) < 1e-4, name
    row = state["history"][-1]
    assert {name: row[name] for name in hand.row} == pytest.approx(hand.row, rel=1e-3)
    z = torch.randn(cfg.samples, 2, generator=torch.Generator().manual_seed(cfg.seed + 2))
    samples = np.load(tmp_path / "samples.npz")["generator"]  # of the average, not of theta
    assert np.abs(hand.g(hand.networks["ema"][0], z).detach().numpy() - samples).max() < 1e-4
    if options:  # and the option, the last one, matters
        *others, _ = options.items()
        without = run_by_hand(config(**dict(others)))
        changed = []
        for (network, start), (other, its_start) in zip(hand.networks.values(), without.networks.values()):
            one, two = flat(network) - start, flat(other) - its_start
            changed.append(one.shape != two.shape or (one - two).norm() > 0.01 * one.norm())
        assert any(changed)


def test_every_option_has_its_case():
    decide = {f.name for f in dataclasses.fields(Config)} - {*MACHINE, "teacher_steps", "samples"}
    assert {[*options][-1] for options in OPTIONS if options} == decide
