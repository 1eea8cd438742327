"""Train an EDM teacher: denoising score matching on images (B.2), with a moving average of the weights.

    python edm/train_teacher.py --preset digits
    python edm/train_teacher.py --preset fashion-mnist --precision bf16 --compile
    torchrun --nproc-per-node 4 edm/train_teacher.py --preset cifar10-cond --data cifar-10-batches-bin

Leaves teacher.safetensors (the moving average) in its folder, with the log, its curves, sample grids
by 35 evaluations, and checkpoints to --resume from.  Ctrl-C and SIGTERM save first.
"""

import copy
import dataclasses
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch

import sim_core as sim
from edm import checkpoints, plots
from edm.config import PRESETS, TeacherTraining, UserError, check, command_line
from edm.data import load_fitting, one_hot, to_network
from edm.networks import EDMPrecond
from edm.runs import Run, write_json
from edm.sampler import fixed_latents, heun
from edm.trainer import Batches, MovingAverage, Trainee, compiled, complete, generator_of, make_accelerator

TEACHERS = {name: {"data": p["data"]} | p["teacher"] for name, p in PRESETS.items()}


class TeacherTask:
    """One step: denoise data (B.2).  Serves images here and the latents of text-to-image alike.

    examples(rng, n) -> x0 (n, *D), sigma (n,), weight (n,), cond: a dict of tensors (n, ...)
    """

    def __init__(self, cfg, accelerator, network, examples):
        self.cfg, self.device, self.examples = cfg, accelerator.device, examples
        self.teacher = Trainee(accelerator, network, cfg, cfg.lr)
        self.ema = MovingAverage(network, copy.deepcopy(network).eval(), cfg)
        self.batches = Batches(cfg, accelerator)

    def step(self, n):
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
        self.ema.update((n + 1) * size)
        return {"loss": value, "gradient": norm}

    def state_dict(self):
        return {"teacher": self.teacher.state_dict(), "ema": self.ema.state_dict()}

    def load_state_dict(self, state):
        self.teacher.load_state_dict(state["teacher"])
        self.ema.load_state_dict(state["ema"])


def image_examples(cfg, device, network, data):
    """Images of the data at p_EDM's noise levels, weighted by lambda_EDM: `examples` of a TeacherTask."""
    images, labels = data.images.to(device), None
    if network.label_dim:
        labels = one_hot(data.labels, network.label_dim).to(device)

    def examples(rng, n):
        index = torch.randint(len(images), (n,), generator=rng, device=device)
        x0 = to_network(images[index])
        if cfg.flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=rng, dtype=torch.float32, device=device) < 0.5
            x0 = torch.where(mirrored, x0.flip(3), x0)
        sigma = sim.SIGMA_DISTRIBUTIONS["edm"](n, generator=rng, dtype=torch.float32)
        cond = {} if labels is None else {"class_labels": labels[index]}
        return x0, sigma, sim.edm_weight(sigma, network.sigma_data), cond

    return examples


def learn(cfg, accelerator, task, run, picture, name, write):
    """Train; write(path) writes the network, the last to come, at cfg.out/name.  Returns the exit code."""
    code = complete(cfg, accelerator, task, run, dict, picture, "teacher")
    if code is not None or not accelerator.is_main_process:
        return code or 0
    write_json(run.path / "metrics.json", {"steps": cfg.steps, "seconds": run.history[-1]["seconds"]})
    write(run.path / name)
    print(f"wrote {run.path}/{name}; look at its samples-*.png and curves.png")
    return 0


def main(cfg):
    """Train; cfg.out/teacher.safetensors is there at the end.  Returns the exit code."""
    check(cfg)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/edm/{cfg.preset}-teacher-{cfg.seed}")
    if not cfg.data:
        raise UserError(f"preset {cfg.preset} needs --data: a folder with CIFAR-10's batches, or EDM's zip")
    accelerator = make_accelerator(cfg)
    torch.manual_seed(cfg.seed)
    network = EDMPrecond(**PRESETS[cfg.preset]["network"])
    data = load_fitting(cfg.data, network.shape, network.label_dim)
    run = Run(cfg, accelerator.is_main_process)
    examples = image_examples(cfg, accelerator.device, network, data)
    task = TeacherTask(cfg, accelerator, network.to(memory_format=torch.channels_last), examples)
    if cfg.compile:
        compiled([network], accelerator.device, accelerator.print)
    z, cond = fixed_latents(network, accelerator.device)

    def picture(step):
        samples = heun(task.ema.network, z, **cond)
        if run.first:
            plots.save_grid(run.path / f"samples-{step:07d}.png", samples)

    about = dict(kind="teacher", preset=cfg.preset, images=cfg.steps * cfg.batch)
    write = partial(checkpoints.save, network=task.ema.network, **about)
    return learn(cfg, accelerator, task, run, picture, "teacher.safetensors", write)


if __name__ == "__main__":
    sys.exit(command_line(main, TeacherTraining, __doc__, presets=TEACHERS))
