"""The shared forward's bias, measured in the plane: theta judged on the samples psi has just learned from.

At a fixed state of a real Distiller, many online updates at once (vmap): by how much does the mean gradient of
theta on the update's own samples differ from that on others?  Both at the same psi, noise and noise levels.
"""

import dataclasses
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.func import functional_call, vmap

import sim_core as sim
from edm.config import Distillation
from edm.trainer import Batches, Distiller, make_accelerator
from tests.by_hand import Learner, flat
from toy.mixtures import ring
from toy.networks import Denoiser, Generator

BATCHES, TOTAL, ROUNDS, SCOUTS = (8, 32, 128, 512), 8192, 32, 16
ARMS = {"sgd": (1e-3, False), "sgd/2": (5e-4, False), "adam": (4e-3, True), "adam/2": (2e-3, True)}


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
    cfg = Distillation(seed=seed, device="cpu", threads=1, steps=steps + 1, batch=256, warmup=200, lr=2e-3,
                       fake_lr=4e-3, beta2=0.999)  # fmt: skip
    teacher, fake, generator, average = nets[0], nets[1], Generator(nets[2]), Generator(nets[3])
    task = Distiller(cfg, make_accelerator(cfg), teacher, fake, generator, average, (2,), lambda *_: {}, std)
    for n in range(steps):
        task.step(n)
    return task


class Bench:
    """Updates of `batch` samples each by `rate`, at once, on the task's own draws of `total`."""

    def __init__(self, task, batch, rate, adam, total=TOTAL):
        self.task, self.count, self.rate, self.adam, self.beta2 = task, total // batch, rate, adam, task.cfg.beta2
        task.cfg = dataclasses.replace(task.cfg, batch=total)
        task.batches = Batches(task.cfg, task.accelerator)
        self.fake, self.theta = task.fake.network, [*task.generator.network.parameters()]
        self.buffers = dict(self.fake.named_buffers())

    def many(self, weights):
        """psi with weights of its own for each update."""
        one = lambda w, xt, sigma: functional_call(self.fake, w | self.buffers, (xt, sigma))
        cut = lambda x: x.unflatten(0, (self.count, -1))
        return lambda xt, sigma: vmap(one)(weights, cut(xt), cut(sigma)).flatten(0, 1)

    def draw(self, *numbers):
        """Samples, the generator's draw, and psi's gradients."""
        d = {k: v[0] for k, v in self.task.draw(*numbers).items() if k not in ("range", "cond")}
        x0, w = self.task.generator.network(d["z"]), dict(self.fake.named_parameters())
        w = {k: p.detach().expand(self.count, *p.shape).clone().requires_grad_() for k, p in w.items()}
        weight = self.task.fake_weight(d["fake_sigma"])
        losses = sim.fake_loss(self.many(w), x0, d["fake_sigma"], d["fake_noise"], weight)
        grads = torch.autograd.grad(losses.sum() * self.count / len(x0), [*w.values()])
        return x0, {"sigma": d["sigma"], "noise": d["noise"]}, dict(zip(w, grads))

    def moved(self, grads, squares):
        """psi's new weights.  Adam without momentum, long since warmed up."""
        adam = lambda g, v: g / ((self.beta2 * v + (1 - self.beta2) * g**2).sqrt() + 1e-8) if self.adam else g
        return {k: p.detach() - self.rate * adam(grads[k], squares.get(k))
                for k, p in self.fake.named_parameters()}  # fmt: skip

    def losses(self, fake, x0, how):
        return sim.generator_loss(self.task.teacher, fake, x0, distance="pseudo_huber", **how)

    def measure(self):
        """-> |bias| / |mean gradient|, its standard error, |bias| / a batch's noise, cosine of bias and mean."""
        scouts = [self.draw(0, 1, i)[2] for i in range(SCOUTS)]
        mean = lambda rows: {k: sum(row[k].mean(0) for row in rows) / len(rows) for k in rows[0]}
        squares = mean([{k: g**2 for k, g in row.items()} for row in scouts]) if self.adam else {}
        centre = mean([self.moved(g, squares) for g in scouts])  # a control variate: what every update does
        rest = partial(lambda w, *x: functional_call(self.fake, w, x), centre | self.buffers)
        biases, means = [], []
        for i in range(ROUNDS):
            x0, how, grads = self.draw(0, 2, i)
            fresh, fake = x0.roll(len(x0) // self.count, 0), self.many(self.moved(grads, squares))
            base = self.losses(rest, x0, how)
            bias = self.losses(fake, x0, how) - base - self.losses(fake, fresh, how) + self.losses(rest, fresh, how)
            biases.append(flat(torch.autograd.grad(bias.mean(), self.theta, retain_graph=True)))
            means.append(flat(torch.autograd.grad(base.mean(), self.theta)))
        biases, means = torch.stack(biases).double(), torch.stack(means).double()
        norm, error = length(biases)
        whole, noise = length(means)[0], (means.var(0).sum() * self.count).sqrt()
        cosine = torch.cosine_similarity(biases.mean(0), means.mean(0), 0)
        return tuple(v.item() for v in (norm / whole, error / whole, norm / noise, cosine))


def length(rows):
    """Of the rows' mean, without what their scatter adds; its standard error, by the jackknife."""
    n, gram = len(rows), rows @ rows.T
    off = gram - gram.diag().diag()
    square, without = off.sum() / n / (n - 1), (off.sum() - 2 * off.sum(1)) / (n - 1) / (n - 2)
    norm = square.clamp_min(1e-30).sqrt()
    return norm, ((n - 1) * without.var(correction=0)).sqrt() / (2 * norm)


def test_the_bench_is_the_distillers_step():
    task = distiller(0, steps=202)
    state, squares = task.fake.optimiser.state, {}
    bench = Bench(task, 256, task.cfg.fake_lr, True, total=256)
    for name, p in bench.fake.named_parameters():
        state[p]["step"].fill_(1e6)
        squares[name] = state[p]["exp_avg_sq"].clone()
    x0, how, grads = bench.draw(202, 0)
    loss = bench.losses(bench.many(bench.moved(grads, squares)), x0, how).mean()
    expected = flat(torch.autograd.grad(loss, bench.theta)).norm()
    assert task.step(202)["generator_gradient"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_bias_falls_with_the_batch_and_grows_with_fake_lr(seed):
    task, found = distiller(seed), {}
    print(f"\nseed {seed}   batch   bias/gradient       bias/noise  cosine")
    for arm, (rate, adam) in ARMS.items():
        for batch in BATCHES if "/" not in arm else (32,):
            found[arm, batch] = norm, error, by_noise, cosine = Bench(task, batch, rate, adam).measure()
            print(f"{arm:8} {batch:5}   {norm:.5f} ± {error:.5f}   {by_noise:.5f}     {cosine:5.2f}")
