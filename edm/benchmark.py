"""How fast is a distillation step, against a plain loop and against what the machine can do?

    python edm/benchmark.py                    # CIFAR-10 architecture, batch 8: ten minutes on two cores
    python edm/benchmark.py --compile          # with torch.compile beside it
    python edm/benchmark.py --batch 128        # on a GPU: images/s, share of its peak, memory

plain     float32, contiguous layout, a generator forward for each of the two updates, Adam in loops
float32   edm/distill.py: channels last, one shared generator forward, fused Adam
bf16      the same in bf16; compiled: with torch.compile
bound     the step's floating-point operations (ours) over this machine's measured bf16 matmul rate

Each variant runs in processes of its own, in turns, so that a drift of the machine's speed hits all
and peak memory is its own; the times are medians over all steps but the first of each process.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch
from torch.utils.flop_counter import FlopCounterMode

import sim_core as sim
from edm.config import DEVICE, DISTILLATIONS, PRESETS, Distillation, command_line
from edm.device import peak_memory, synchronise
from edm.distill import build
from edm.images.networks import EDMPrecond, Generator
from edm.training.trainee import make_accelerator
from toy.command import option
from toy.files import UserError, check_new, replacing


@dataclass(frozen=True)
class Settings:
    preset: str = option("cifar10-uncond", "whose network", PRESETS)
    batch: int = option(8, "images per step", within="many")
    steps: int = option(3, "timed steps of a process, after a first that is not timed", within="count")
    rounds: int = option(2, "processes of each variant, in turns", within="count")
    compile: bool = option(False, "also torch.compile: minutes more")
    threads: int = option(0, "CPU threads; 0: torch's choice", within="threads")
    device: str = option(*DEVICE)
    variant: str = option(None, "run this one alone and print JSON", ("plain", "float32", "bf16", "compiled"))
    gradients: str = option(None, "with --variant, but not plain: file for the first step's gradients")


def distillation(cfg, **more):
    usual = DISTILLATIONS[cfg.preset] | dict(batch=cfg.batch, threads=cfg.threads, device=cfg.device)
    return Distillation(preset=cfg.preset, **usual | more)


def make_teacher(cfg):
    """Of random weights, none of them near zero: every branch takes part."""
    torch.manual_seed(0)
    teacher = EDMPrecond(**PRESETS[cfg.preset]["network"]).eval()
    for weight in teacher.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return teacher.requires_grad_(False)


class Plain:
    """Algorithm 2 word for word, with nothing done for speed."""

    def __init__(self, cfg, accelerator, teacher):
        self.cfg, self.device = cfg, accelerator.device
        self.teacher = teacher.to(self.device)
        self.fake = copy.deepcopy(self.teacher).requires_grad_(True)
        self.generator = Generator(copy.deepcopy(self.fake), cfg.sigma_init)
        self.ema = copy.deepcopy(self.generator)
        self.optimisers = [torch.optim.Adam(net.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), foreach=False)
                           for net in (self.fake, self.generator)]  # fmt: skip

    def draw(self):
        n, shape = self.cfg.batch, self.teacher.shape
        labels = torch.eye(self.teacher.label_dim, device=self.device)[
            torch.randint(self.teacher.label_dim, (n,))] if self.teacher.label_dim else None  # fmt: skip
        return torch.randn(n, *shape, device=self.device), torch.randn(n, *shape, device=self.device), labels

    def step(self, n):
        z, noise, labels = self.draw()
        with torch.no_grad():
            x0 = self.generator(z, class_labels=labels)
        sigma = sim.SIGMA_DISTRIBUTIONS["edm"](self.cfg.batch, device=self.device)
        loss = sim.fake_loss(self.fake, x0, sigma, noise, sim.edm_weight(sigma), class_labels=labels)
        self.update(self.optimisers[0], loss)
        z, noise, labels = self.draw()
        x0 = self.generator(z, class_labels=labels)
        sigma = sim.SIGMA_DISTRIBUTIONS["sim"](self.cfg.batch, device=self.device)
        self.fake.requires_grad_(False)
        loss = sim.generator_loss(
            self.teacher, self.fake, x0, sigma, noise, "pseudo_huber", class_labels=labels
        )
        self.update(self.optimisers[1], loss)
        self.fake.requires_grad_(True)
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.generator.parameters()):
                average.lerp_(weight, 0.001)

    def update(self, optimiser, loss):
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()


def record_gradients(task, path):
    """Save the next gradients of psi and theta to a file, in place of their norms."""
    kept = []

    def norm(trainee):
        gradient = torch.cat([p.grad.flatten() for p in trainee.network.parameters()])
        kept.append(gradient)
        with replacing(path) as temporary:
            torch.save(kept, temporary)
        return gradient.norm()

    for trainee in (task.fake, task.generator):
        trainee.norm = partial(norm, trainee)


def run_variant(cfg):
    """Time one variant in this process."""
    precision = "bf16" if cfg.variant in ("bf16", "compiled") else "no"
    how = distillation(cfg, precision=precision, compile=cfg.variant == "compiled")
    accelerator = make_accelerator(how)
    if cfg.variant == "plain":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    task = (Plain if cfg.variant == "plain" else build)(how, accelerator, make_teacher(cfg))
    if cfg.gradients:
        record_gradients(task, cfg.gradients)
        task.step(0)
        return
    seconds = []
    for n in range(cfg.steps + 1):
        start = time.perf_counter()
        task.step(n)
        synchronise(accelerator.device)
        seconds.append(time.perf_counter() - start)
    memory = peak_memory(accelerator.device)
    print(json.dumps({"first": seconds[0], "seconds": seconds[1:], "memory": memory}))


def flops_per_step(cfg):
    accelerator = make_accelerator(distillation(cfg, batch=1))
    task = build(distillation(cfg, batch=1), accelerator, make_teacher(cfg))
    with FlopCounterMode(display=False) as counter:
        task.step(0)
    return counter.get_total_flops() * cfg.batch


def matmul_rate(device, size=4096, tries=10):
    """bf16 operations per second of a large square product, the best of several."""
    size = 1536 if device.type == "cpu" else size
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(tries + 2):
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def spawn(cfg, variant, *more):
    """Run a variant in a process of its own -> what it prints."""
    command = [sys.executable, __file__, "--variant", variant, *more]
    for name in ("preset", "batch", "steps", "threads", "device"):
        command += [f"--{name}", str(getattr(cfg, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{variant} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return done.stdout


def compare_gradients(cfg):
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / variant) for variant in ("float32", "bf16")]
        for variant, file in zip(("float32", "bf16"), files):
            spawn(cfg, variant, "--gradients", file)
        exact, cast = (torch.load(file, weights_only=True) for file in files)
    for name, a, b in zip(("online network", "generator"), exact, cast):
        a, b = a.double(), b.double()  # sums over tens of millions
        cosine = torch.nn.functional.cosine_similarity(a, b, 0).item()
        error = ((a - b).norm() / a.norm()).item()
        print(f"bf16's gradient of the {name} against float32's: error {error:.3f}, cosine {cosine:.5f}")


def report(cfg, device, flops, rate, seconds, memory):
    bound, plain = flops / rate, statistics.median(seconds["plain"])
    print(f"\n{cfg.preset}, batch {cfg.batch}, {device}: {flops / 1e12:.2f} TFLOP a step; "
          f"bf16 matmul {rate / 1e12:.2f} TFLOP/s")  # fmt: skip
    print("          s/step  images/s  times plain  share of bound  peak memory")
    for variant, times in seconds.items():
        s = statistics.median(times)
        speed = f"{variant:8}{s:8.2f}{cfg.batch / s:10.2f}{plain / s:13.2f}"
        print(f"{speed}{bound / s:16.1%}{memory[variant] / 1e9:10.2f} GB")
    print(f"{'bound':8}{bound:8.2f}{cfg.batch / bound:10.2f}{plain / bound:13.2f}")


def main(cfg):
    if cfg.gradients:
        if cfg.variant in (None, "plain"):
            raise UserError("--gradients is of a --variant, but not plain")
        check_new(cfg.gradients)
    if cfg.variant:
        return run_variant(cfg)
    device = make_accelerator(distillation(cfg)).device
    variants = ["plain", "float32", "bf16"] + ["compiled"] * cfg.compile
    flops, rate = flops_per_step(cfg), 0.0
    seconds, memory = {variant: [] for variant in variants}, dict.fromkeys(variants, 0)
    for _ in range(cfg.rounds):
        rate = max(rate, matmul_rate(device))
        for variant in variants:
            found = json.loads(spawn(cfg, variant).splitlines()[-1])
            seconds[variant] += found["seconds"]
            memory[variant] = max(memory[variant], found["memory"])
            times = " ".join(f"{s:.2f}" for s in found["seconds"])
            print(f"{variant:8} {times} s  (first {found['first']:.1f} s)", flush=True)
    report(cfg, device, flops, rate, seconds, memory)
    compare_gradients(cfg)


if __name__ == "__main__":
    sys.exit(command_line(main, Settings, __doc__))
