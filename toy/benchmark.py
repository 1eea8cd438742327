"""How much of a step is arithmetic: its time over that of its matrix products alone.

    python toy/benchmark.py
    python toy/benchmark.py --target grid --batch 512   # settings of train_2d.py

The products are those that one step of this very run computes, forward and backward, called again on the
same matrices; both are timed in turns, so that a busy machine slows both.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import trange

from toy import command, train_2d
from toy.config import check, parse_args, resolve
from toy.mixtures import make_target

ROUNDS, STEPS = 20, 50


class Products(TorchDispatchMode):
    """Keeps the calls of every product of two matrices, with or without a bias."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.calls.append((func, [a.detach() if torch.is_tensor(a) else a for a in args], kwargs or {}))
        return func(*args, **kwargs or {})

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def again(self):
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


def seconds(work, *args):
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def measure(cfg):
    """-> milliseconds of a step, of its products, medians of ROUNDS, and the ratios of all."""
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    rng = torch.Generator(cfg.device).manual_seed(cfg.seed)
    target = make_target(cfg.target).to(cfg.device)
    run = train_2d.Run(cfg, train_2d.make_denoiser(cfg, target).requires_grad_(False), rng)

    def steps(n):
        run.step, run.history = 0, [{}]  # nothing to log, no warm-up
        some = replace(cfg, steps=n)
        train_2d.distill(some, run, target, run.teacher, lambda run, losses: None, [])

    steps(STEPS)
    with Products() as one:
        steps(1)
    with Products() as products:
        steps(2)
    del products.calls[: len(one.calls)]  # of the first step, and of what comes before the loop
    times = []
    for _ in trange(ROUNDS, desc="rounds", disable=None):
        both = seconds(steps, STEPS), seconds(lambda: [products.again() for _ in range(STEPS)])
        times.append([1e3 * t / STEPS for t in both])
    ratios = sorted(step / product for step, product in times)
    return *map(statistics.median, zip(*times)), ratios, len(products.calls)


def tell(argv=None):
    cfg = resolve(*parse_args(__doc__, argv))
    check(cfg)
    step, product, ratios, count = measure(cfg)
    print(f"a step takes {step:.2f} ms, its {count} matrix products {product:.2f} ms")
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"  {statistics.median(ratios):.2f} times as long ({spread} in {ROUNDS} rounds)")
    return 0


def cli(argv=None):
    """The command line: returns the exit code."""
    return command.run(lambda: tell(argv))


if __name__ == "__main__":
    sys.exit(cli())
