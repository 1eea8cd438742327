"""The training loop: repeats a task's steps, looks after the run, and tells what came of it."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from edm.device import peak_memory, slow_in_bf16
from edm.training import plots
from toy.command import stop_on_signal
from toy.files import UserError, naming

LOOKS = 50  # rows of the log


class Diverged(Exception):
    """Training left the finite numbers."""


class Recent:
    """The numbers of the steps since the last look, kept on the device: no step waits for them."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.rows, self.names = accelerator, [], None

    def add(self, numbers: dict[str, Tensor]) -> None:
        self.names = list(numbers)
        self.rows.append(torch.stack([value.float() for value in numbers.values()]))

    def collect(self, last_step: int) -> dict[str, float]:
        """Means as floats, over steps and processes.  Raises Diverged at the first non-finite step."""
        table = self.accelerator.gather(torch.stack(self.rows)[None]).cpu()  # (processes, steps, numbers)
        first = last_step + 1 - len(self.rows)
        self.rows = []
        bad = (~table.isfinite()).any(2).any(0)
        if bad.any():
            i = int(bad.nonzero()[0])
            found = ", ".join(f"{name} {v:.3g}" for name, v in zip(self.names, table[:, i].mean(0).tolist()))
            raise Diverged(f"no longer finite at step {first + i} ({found})")
        return dict(zip(self.names, table.mean((0, 1)).tolist()))


def agree(stop: list[int], accelerator: Accelerator) -> bool:
    """Whether any process was told to stop.  Over gloo, so that no GPU waits."""
    if accelerator.num_processes == 1:
        return bool(stop)
    flag = torch.tensor([len(stop)])
    dist.all_reduce(flag)
    return bool(flag)


def train(cfg: Any, accelerator: Accelerator, task: Any, run: Any, look: Callable, picture: Callable,
          name: str, score: Callable | None = None) -> str:  # fmt: skip
    """Repeat task.step until cfg.steps or a signal.  Returns "finished" or "interrupted".

    task     has step(n), state_dict(), load_state_dict(state)
    look     look() -> more numbers for the log, of which there are about LOOKS rows
    picture  picture(step), called with every checkpoint, on every process: networks may be in shares
    score    score(step) -> more numbers, every cfg.evaluate_every images and at the end, on every process
    """
    if cfg.precision == "bf16" and slow_in_bf16(accelerator.device.type):
        accelerator.print("warning: on this CPU bf16 is slower than float32", file=sys.stderr)
    state = run.load(accelerator.print) if cfg.resume else None
    start = state["step"] if state else 0
    if state:
        with naming(run.checkpoints):
            task.load_state_dict(state)
            if accelerator.scaler:
                accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.print(f"going on from step {start}")
    every, looks = max(1, cfg.every // cfg.batch), max(1, cfg.steps // LOOKS)
    scores = max(1, cfg.evaluate_every // cfg.batch) if score else 0
    recent, before = Recent(accelerator), run.history[-1]["seconds"] if run.history else 0.0
    clock = time.perf_counter()
    bar = tqdm(total=cfg.steps * cfg.batch, initial=start * cfg.batch, unit="img", desc=name, mininterval=1,
               unit_scale=True, disable=not accelerator.is_main_process)  # fmt: skip

    def due(step, every):
        return every and (step % every == 0 or step == cfg.steps)

    def log(step):
        numbers = recent.collect(step) | look()
        try:
            numbers |= score(step) if due(step, scores) else {}
        except UserError as error:  # NaN is no image
            raise Diverged(f"{error} after step {step - 1}") from None
        seconds = before + time.perf_counter() - clock
        row = {"step": step, "images": step * cfg.batch, "seconds": seconds} | numbers
        run.log(row | {"peak_memory_gb": peak_memory(accelerator.device) / 1e9})
        bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k in ("fake_loss", "loss", "std")})

    def save(step):
        scaler = {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler else {}
        try:
            picture(step)  # first: NaN here, and the state is not worth keeping
        except ValueError as error:
            raise Diverged(f"{error} after step {step - 1}") from None
        state = task.state_dict() | scaler
        if accelerator.is_main_process:
            run.save(step, state)

    with bar, stop_on_signal() as stop:
        if not state:
            picture(0)
        step = start
        while step < cfg.steps and not agree(stop, accelerator):
            recent.add(task.step(step))
            step += 1
            bar.update(cfg.batch)
            if any(due(step, often) for often in (looks, every, scores)):
                log(step)
            if due(step, every):
                save(step)
        if step < cfg.steps and step > start:
            if recent.rows:
                log(step)
            save(step)
    return "finished" if step == cfg.steps else "interrupted"


def complete(cfg: Any, accelerator: Accelerator, task: Any, run: Any, look: Callable, picture: Callable,
             name: str, score: Callable | None = None) -> int | None:  # fmt: skip
    """`train`, its curves, and what the user is told.  Returns an exit code, or None: there is more to do."""
    try:
        status = train(cfg, accelerator, task, run, look, picture, name, score)
    except Diverged as error:
        words = f"{name}: stopped: {error}; lower --lr; the last good checkpoint is kept"
        accelerator.print(words, file=sys.stderr)
        return 1
    if accelerator.is_main_process:
        plots.save_curves(run.path / "curves.png", run.history)
    if status == "finished":
        return None
    accelerator.print(f"stopped by a signal and saved; --resume --out {cfg.out} goes on")
    return 130
