"""Algorithm 2: the two updates of a step, for images and text-to-image alike."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

import sim_core as sim
from edm.training.trainee import Batches, MovingAverage, Trainee, generator_of, schedule, shard
from toy.command import sigma_sampler, surrogate

SIGMA_BINS = (0.2, 1.0, 4.0)  # edges of the bins of the log, in units of sigma_data


class Distiller:
    """The two updates of a step, theta's moving average, and what to log.

    teacher    denoiser(xt, sigma, **cond), frozen
    fake       the same, to be trained: psi
    generator  x0 = generator(z, **cond), to be trained: theta
    condition  condition(random generator, n) -> dict of tensors (n, ...), the cond of n samples
    """

    def __init__(self, cfg: Any, accelerator: Accelerator, teacher: Module, fake: Module, generator: Module,
                 condition: Callable):  # fmt: skip
        self.cfg, self.accelerator, self.device = cfg, accelerator, accelerator.device
        self.shape, self.sigma_data, self.condition = fake.shape, fake.sigma_data, condition
        betas, sharded = (cfg.beta1, cfg.beta2), cfg.sharding == "fsdp"
        self.teacher = shard(teacher.requires_grad_(False), sharded)
        self.fake = Trainee(accelerator, fake, schedule(cfg, cfg.fake_lr), betas, sharded)
        average = copy.deepcopy(generator)  # before it is sharded
        self.generator = Trainee(accelerator, generator, schedule(cfg, cfg.lr), betas, sharded)
        self.ema = MovingAverage(generator, average, cfg.ema_halflife, cfg.ema_rampup, sharded)
        self.batches, self.loss = Batches(accelerator, cfg.batch, cfg.micro_batch), surrogate(cfg)
        self.bins = [edge * self.sigma_data for edge in SIGMA_BINS]
        self.edges = torch.tensor(self.bins, device=self.device, dtype=torch.float32)
        self.gaps = self.edges.new_zeros(2, len(self.bins) + 1)  # sums and counts by sigma

    def weight(self, weighting: str, sigma: Tensor, triple: tuple | None = None) -> float | Tensor:
        """Of either loss, by name; w_SiD, theta's, needs what the networks say."""
        space = "denoised" if triple is None else self.cfg.space  # psi's loss is of denoised images
        return sim.WEIGHTINGS[weighting](triple, sigma, space, self.sigma_data)

    # What text-to-image does otherwise.

    def fake_cond(self, draw: dict[str, Any], i: int) -> dict[str, Tensor]:
        """The cond under which psi learns."""
        return draw["cond"][i]

    def judge(self, network: Module) -> Module:
        """psi as it judges the generator."""
        return network

    # Algorithm 2.

    def draw_sigma(self, which: str, rng: torch.Generator) -> Tensor:
        draw = sigma_sampler(self.cfg, sim.SIGMA_DISTRIBUTIONS, which)
        return draw(self.cfg.batch, generator=rng, dtype=torch.float32)

    def draw(self, *numbers) -> dict[str, Any]:
        """Latents, conditions, and both updates' noise levels and noise, as lists of micro-batches."""
        rng, n = generator_of(self.device, self.cfg.seed, *numbers), self.cfg.batch
        how = dict(device=self.device, dtype=torch.float32)
        normal = partial(torch.randn, n, *self.shape, generator=rng, **how)
        parts = dict(
            z=normal(),
            fake_sigma=self.draw_sigma("fake_", rng),
            fake_noise=normal(),
            sigma=self.draw_sigma("", rng),
            noise=normal(),
        )
        levels = torch.cat([parts["fake_sigma"], parts["sigma"]])  # of all processes
        parts = {name: self.batches.split(tensor) for name, tensor in parts.items()} | {"levels": levels}
        cond = {name: self.batches.split(t) for name, t in self.condition(rng, n).items()}
        parts["cond"] = [{name: t[i] for name, t in cond.items()} for i in range(self.batches.count)]
        return parts

    def step(self, n: int) -> dict[str, Tensor]:
        """Step n: the online network's updates, then the generator's.  Returns numbers, on the device.

        cfg.share saves a forward and costs a bias: theta's gradient g is judged where psi has just learned.
        psi' = psi - eta/B sum_i grad l_i holds sample i's own l_i, a fresh sample's not; to first order
            E g(psi', x_i) - E g(psi', x_fresh) = -eta/B Cov(dg/dpsi, grad l), over the samples x.
        Adam multiplies grad l by about 1/sqrt(v), which grows as sqrt(B) while noise rules l's gradient: then
        the bias falls as eta/sqrt(B) only, in step with a batch's noise (tests/test_shared_forward.py).
        """
        seen, share = n * self.cfg.batch, self.cfg.share
        warm, levels = n >= self.cfg.warmup, []
        for update in range(self.cfg.fake_updates):
            draw, last = self.draw(n, update), update == self.cfg.fake_updates - 1
            images = self.images(draw, keep_graph=warm and last and share and self.batches.count == 1)
            fake_loss, fake_norm = self.update_fake(draw, images, seen)
            levels.append(draw["levels"])
        numbers = {"fake_loss": fake_loss, "fake_gradient": fake_norm}
        if warm:
            if not (share and self.batches.count == 1):  # as many forwards again; the same images if shared
                draw, images = (draw if share else self.draw(n, self.cfg.fake_updates)), None
            numbers["surrogate"], numbers["generator_gradient"] = self.update_generator(draw, images, seen)
            self.ema.update((n + 1 - self.cfg.warmup) * self.cfg.batch, self.cfg.batch)
        else:
            numbers["surrogate"] = numbers["generator_gradient"] = torch.zeros_like(fake_loss)
        levels = torch.cat([*levels, draw["levels"]])  # a NaN among them is found where the log is
        return numbers | {"sigma_min": levels.min(), "sigma_max": levels.max()}

    def images(self, draw: dict[str, Any], keep_graph: bool) -> list[Tensor]:
        """x0 = g(z) of every micro-batch."""
        generator = self.generator.wrapped if keep_graph else self.generator.network
        with torch.set_grad_enabled(keep_graph), self.accelerator.autocast():
            return [generator(z, **cond) for z, cond in zip(draw["z"], draw["cond"])]

    def update_fake(self, draw: dict[str, Any], images: list[Tensor], seen: int) -> tuple[Tensor, Tensor]:
        """psi: denoise the generator's samples (B.2)."""

        def loss(i):
            sigma, noise, cond = draw["fake_sigma"][i], draw["fake_noise"][i], self.fake_cond(draw, i)
            weight = self.weight(self.cfg.fake_weighting, sigma)
            return sim.fake_loss(self.fake.wrapped, images[i], sigma, noise, weight, **cond)

        return self.fake.update(loss, self.batches.count, seen)

    def update_generator(
        self, draw: dict[str, Any], images: list[Tensor] | None, seen: int
    ) -> tuple[Tensor, Tensor]:
        """theta: descend the surrogate, through the frozen teacher and online network."""

        def loss(i):
            sigma, noise, cond = draw["sigma"][i], draw["noise"][i], draw["cond"][i]
            x0 = images[i] if images else self.generator.wrapped(draw["z"][i], **cond)
            fake = self.judge(self.fake.network)  # not the wrapped one: its gradients are nobody's
            triple = sim.predictions(self.teacher, fake, x0, sigma, noise, self.cfg.space, **cond)
            self._count(triple, sigma)
            return sim.weigh(self.loss(*triple), self.weight(self.cfg.weighting, sigma, triple))

        self.fake.network.requires_grad_(False)  # spares the work; s_sg[theta] is that psi is not theta
        numbers = self.generator.update(loss, self.batches.count, seen)
        self.fake.network.requires_grad_(True)
        return numbers

    # -- what to look at --

    @torch.no_grad()
    def _count(self, triple, sigma):
        fake, teacher, _ = triple
        gap = (fake - teacher).float().flatten(1).norm(dim=1) * sigma ** sim.SPACES[self.cfg.space]
        where = torch.bucketize(sigma, self.edges)
        self.gaps.index_add_(1, where, torch.stack([gap, torch.ones_like(gap)]))

    def gap_by_sigma(self) -> dict[str, float]:
        """Mean ||D_psi - D_q|| per bin of sigma since the last call; NaN where there was none."""
        sums, counts = self.accelerator.reduce(self.gaps).cpu()
        self.gaps.zero_()
        edges = ("0", *(f"{edge:g}" for edge in self.bins), "inf")
        return {f"gap_{a}_{b}": (s / c).item() for a, b, s, c in zip(edges, edges[1:], sums, counts)}

    def state_dict(self) -> dict[str, Any]:
        return {"fake": self.fake.state_dict(), "generator": self.generator.state_dict(),
                "ema": self.ema.state_dict(), "gaps": self.gaps}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fake.load_state_dict(state["fake"])
        self.generator.load_state_dict(state["generator"])
        self.ema.load_state_dict(state["ema"])
        self.gaps.copy_(state["gaps"])
