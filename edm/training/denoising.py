"""The training of a teacher: denoising score matching (B.2), of images and of latents alike."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

import sim_core as sim
from edm.training.trainee import Batches, MovingAverage, Trainee, generator_of, schedule


class TeacherTask:
    """One step: denoise data (B.2).  Serves images here and the latents of text-to-image alike.

    examples(rng, n) -> x0 (n, *D), sigma (n,), weight (n,), cond: a dict of tensors (n, ...)
    """

    def __init__(self, cfg: Any, accelerator: Accelerator, network: Module, examples: Callable):
        self.cfg, self.device, self.examples = cfg, accelerator.device, examples
        average = copy.deepcopy(network).eval()
        self.teacher = Trainee(accelerator, network, schedule(cfg, cfg.lr), (cfg.beta1, cfg.beta2), False)
        self.ema = MovingAverage(network, average, cfg.ema_halflife, cfg.ema_rampup, False)
        self.batches = Batches(accelerator, cfg.batch, cfg.micro_batch)

    def step(self, n: int) -> dict[str, Tensor]:
        rng, size = generator_of(self.device, self.cfg.seed, n), self.cfg.batch
        # Dropout takes torch's own generator: a seed for each step and process.
        torch.manual_seed(generator_of("cpu", self.cfg.seed, n, 1 + self.batches.first).initial_seed())
        x0, sigma, weight, cond = self.examples(rng, size)
        noise = torch.randn(x0.shape, generator=rng, device=self.device, dtype=torch.float32)
        x0, sigma, weight, noise = (self.batches.split(t) for t in (x0, sigma, weight, noise))
        cond = {name: self.batches.split(t) for name, t in cond.items()}

        def loss(i):
            mine = {name: t[i] for name, t in cond.items()}
            return sim.fake_loss(self.teacher.wrapped, x0[i], sigma[i], noise[i], weight[i], **mine)

        value, norm = self.teacher.update(loss, self.batches.count, n * size)
        self.ema.update((n + 1) * size, size)
        return {"loss": value, "gradient": norm}

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict(), "ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self.ema.load_state_dict(state["ema"])
