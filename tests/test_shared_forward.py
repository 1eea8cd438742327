"""The shared forward's bias: theta judged on samples that psi has just learned from (`Distiller.step`).

In the plane, at a fixed state of a real Distiller: the mean gradient of theta on the samples of psi's update,
less that on others; same psi, noise and noise levels.  Many updates at once, so that the rest averages out.
"""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.func import functional_call, vmap

import sim_core as sim
from edm.algorithm2 import Distiller
from edm.config import Distillation
from edm.training.trainee import Batches, make_accelerator
from tests.by_hand import Learner, flat
from toy.mixtures import ring
from toy.networks import Denoiser, Generator

TOTAL, ROUNDS, SCOUTS = 8192, 12, 8  # samples a round; rounds; rounds beforehand, for Adam's moments
RATES = {"sgd": 1e-3, "adam": 4e-3}


def distiller(seed, steps=500):
    """On the ring, in the middle of its training: 200 steps of psi alone, 300 of both."""
    AcceleratorState._reset_state()
    torch.manual_seed(seed)
    target, std = ring(), ring().data_std()
    nets = [Denoiser(width=32, depth=2, sigma_data=std) for _ in range(4)]
    learner = Learner(nets[0], 0.9, 0.99)
    for n in range(800):
        x0, sigma = target.sample(1024), sim.SIGMA_DISTRIBUTIONS["edm"](1024)
        losses = sim.fake_loss(nets[0], x0, sigma, torch.randn_like(x0), sim.edm_weight(sigma, std))
        learner.learn(losses, 5e-3 * (1 - n / 800))
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    rates = dict(lr=2e-3, fake_lr=RATES["adam"], beta2=0.999, warmup=200)
    cfg = Distillation(seed=seed, device="cpu", threads=1, steps=steps + 1, batch=256, **rates)
    nets[1].shape = (2,)
    task = Distiller(cfg, make_accelerator(cfg), nets[0], nets[1], Generator(nets[2]), lambda *_: {})
    for n in range(steps):
        task.step(n)
    return task


class Bench:
    """psi's updates of `batch` samples each, by `rate`, on `total` of the task's own draws at once."""

    def __init__(self, task, batch, rate, adam, total=TOTAL):
        self.task, self.rate, self.adam, self.count = task, rate, adam, total // batch
        task.cfg = dataclasses.replace(task.cfg, batch=total)
        task.batches = Batches(task.accelerator, task.cfg.batch, task.cfg.micro_batch)
        self.psi = {k: p.detach() for k, p in task.fake.network.named_parameters()}
        self.theta = [*task.generator.network.parameters()]

    def fake(self, *args):
        return functional_call(self.task.fake.network, *args)

    def fakes(self, weights):
        """psi with weights of its own for each update."""
        one, cut = lambda w, *x: self.fake(w, x), lambda x: x.unflatten(0, (self.count, -1))
        return lambda xt, sigma: vmap(one)(weights, cut(xt), cut(sigma)).flatten(0, 1)

    def draw(self, *numbers):
        """-> samples, what else theta's update draws, and psi's gradients."""
        d = {k: v[0] for k, v in self.task.draw(*numbers).items() if k not in ("levels", "cond")}
        x0, sigma = self.task.generator.network(d["z"]), d["fake_sigma"]
        psi = {k: p.expand(self.count, *p.shape).clone().requires_grad_() for k, p in self.psi.items()}
        losses = sim.fake_loss(self.fakes(psi), x0, sigma, d["fake_noise"], self.task.weight("edm", sigma))
        gradients = torch.autograd.grad(losses.sum() * self.count / len(x0), [*psi.values()])
        return x0, {k: d[k] for k in ("sigma", "noise")}, dict(zip(psi, gradients))

    def moved(self, gradients, squares):
        """psi's weights after the update; Adam's as after many."""
        beta2, step = self.task.cfg.beta2, dict(gradients)
        if self.adam:
            step = {k: g / ((beta2 * squares[k] + (1 - beta2) * g**2).sqrt() + 1e-8) for k, g in step.items()}
        return {k: p - self.rate * step[k] for k, p in self.psi.items()}

    def gradient(self, *terms):
        """theta's, of the sum of factor * surrogate over (factor, psi, samples, draw)."""
        loss = lambda fake, x0, how: sim.generator_loss(
            self.task.teacher, fake, x0, distance="pseudo_huber", **how
        )
        total = sum(factor * loss(*term).mean() for factor, *term in terms)
        return flat(torch.autograd.grad(total, self.theta, retain_graph=True))

    def measure(self):
        """-> |bias| and its standard error, |mean gradient|, root mean square of a batch's noise."""
        scouts = [self.draw(0, 1, i)[2] for i in range(SCOUTS)]
        mean = lambda rows: {k: torch.cat([row[k] for row in rows]).mean(0) for k in self.psi}
        squares = mean([{k: g**2 for k, g in row.items()} for row in scouts])
        centre = mean([self.moved(row, squares) for row in scouts])
        middle = lambda *x: self.fake(centre, x)  # a control variate: of mean 0, takes most of the noise
        biases, means = [], []
        for i in range(ROUNDS):
            x0, how, gradients = self.draw(0, 2, i)
            fakes, other = self.fakes(self.moved(gradients, squares)), x0.roll(len(x0) // self.count, 0)
            terms = (
                (1, fakes, x0, how),
                (-1, fakes, other, how),
                (-1, middle, x0, how),
                (1, middle, other, how),
            )
            biases.append(self.gradient(*terms))
            means.append(self.gradient((1, lambda *x: self.fake(self.psi, x), x0, how)))
        noise = (torch.stack(means).var(0).sum() * self.count).sqrt()
        return *length(biases), length(means)[0], noise.item()


def length(rows):
    """Of the rows' mean, without what their scatter adds; its standard error, by the jackknife."""
    n, gram = len(rows), torch.stack(rows).double() @ torch.stack(rows).double().T
    off = gram - gram.diag().diag()
    square, without = off.sum() / n / (n - 1), (off.sum() - 2 * off.sum(1)) / (n - 1) / (n - 2)
    norm = square.clamp_min(1e-30).sqrt()
    return norm.item(), (((n - 1) * without.var(correction=0)).sqrt() / (2 * norm)).item()


def test_the_bench_is_the_distillers_step():
    task = distiller(0, steps=202)
    bench, state = Bench(task, 256, RATES["adam"], True, total=256), task.fake.optimiser.state
    for p in task.fake.network.parameters():
        state[p]["step"].fill_(1e6)
    squares = {k: state[p]["exp_avg_sq"].clone() for k, p in task.fake.network.named_parameters()}
    x0, how, gradients = bench.draw(202, 0)
    expected = bench.gradient((1, bench.fakes(bench.moved(gradients, squares)), x0, how)).norm().item()
    assert task.step(202)["generator_gradient"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_bias_falls_with_the_batch_and_grows_with_fake_lr(seed):
    task, found = distiller(seed), {}
    print(f"\nseed {seed}  fake_lr  batch  bias / mean gradient  bias / batch's noise")
    cases = [(k, r, b) for k, r in RATES.items() for b in (8, 32, 128, 512)]
    for kind, rate, batch in cases + [(k, r / 2, 32) for k, r in RATES.items()]:
        bias, error, mean, noise = Bench(task, batch, rate, kind == "adam").measure()
        ratio = f"{bias / mean:.4f} ± {error / mean:.4f}"
        print(f"{kind:6}  {rate:.4f}  {batch:5}     {ratio}     {bias / noise:.4f}")
        found[kind, rate, batch] = bias
        assert bias < 0.15 * noise
    for kind, low, high in (("sgd", 2.5, 6), ("adam", 1.5, 4)):  # 4: 1 / batch, 2: 1 / root of batch
        rate = RATES[kind]
        assert low < found[kind, rate, 32] / found[kind, rate, 128] < high
        assert 1.5 < found[kind, rate, 32] / found[kind, rate / 2, 32] < 2.7
