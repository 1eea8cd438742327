"""Networks that learn, on any number of processes: the machine, the optimiser, the moving average.

Every random number of step n comes from (seed, n) and the sample's place in the whole batch, so a result
depends neither on the number of processes nor on interruptions, and there is no state of a generator to keep.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.fsdp import fully_shard
from torch.nn import Module

from edm.device import find_device, processes
from toy.files import UserError


def make_accelerator(cfg: Any) -> Accelerator:
    """One code path for a CPU, a GPU, and torchrun over several of either."""
    kind = find_device(cfg.device)
    if cfg.precision == "fp16" and kind != "cuda":
        raise UserError("--precision fp16 is for GPUs with CUDA; others take bf16")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if processes() > 1:  # gloo beside nccl: for what no GPU should wait for
        handlers.append(InitProcessGroupKwargs(backend="gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"))
    try:
        accelerator = Accelerator(cpu=kind == "cpu", mixed_precision=cfg.precision, kwargs_handlers=handlers)
    except ValueError as error:  # an old macOS has no bf16
        raise UserError(f"--precision {cfg.precision}: {error}") from None
    if cfg.sharding == "fsdp" and (accelerator.num_processes == 1 or cfg.precision == "fp16"):
        raise UserError("--sharding fsdp is for several processes (torchrun), in bf16 or float32")
    if cfg.batch % accelerator.num_processes:
        raise UserError(f"--batch {cfg.batch} does not divide over {accelerator.num_processes} processes")
    Batches(
        accelerator, cfg.batch, cfg.micro_batch
    )  # refuses an unfit --micro-batch, before a folder is made
    return accelerator


def compiled(networks: Iterable, device: str | torch.device, say: Callable) -> None:
    """Compile in place; leave them eager, and say so, where there is no working compiler."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a broken toolchain raises
        say(f"torch.compile does not work here ({type(error).__name__}); going on without it")
        return
    for network in networks:
        network.compile()


def generator_of(device: str | torch.device, *numbers) -> torch.Generator:
    """A torch.Generator seeded by all of the numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64).item() >> 1
    return torch.Generator(device).manual_seed(seed)


WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(network: Module, sharded: bool) -> Module:
    """FSDP2, with --sharding fsdp: each process keeps a share of the weights, gathered block by block."""
    if sharded:
        for block in [*blocks(network)]:
            fully_shard(block)
        fully_shard(network, reshard_after_forward=True)  # else a look would leave its own weights whole
    return network


def blocks(module: Module) -> Iterator[Module]:
    """The modules in the outermost lists."""
    for child in module.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from child.children()
        else:
            yield from blocks(child)


def schedule(cfg: Any, lr: float) -> Callable:
    """-> rate(images seen): ramp-up, times a cosine that falls to lr_end of lr at the end."""
    total, rampup, end = cfg.steps * cfg.batch, cfg.lr_rampup, cfg.lr_end

    def rate(images):
        grown = min(1.0, images / rampup) if rampup else 1.0
        return lr * grown * (end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * images / total)))

    return rate


class Trainee:
    """A network, its optimiser, and an update over micro-batches.  rate: of `schedule`."""

    def __init__(self, accelerator: Accelerator, network: Module, rate: Callable, betas: tuple[float, float],
                 sharded: bool):  # fmt: skip
        self.accelerator, self.network, self.rate = accelerator, shard(network, sharded), rate
        self.sharded, self.wrapped = sharded, network
        self.optimiser = torch.optim.Adam(network.parameters(), betas=betas, fused=True)
        if not self.sharded:
            self.wrapped, self.optimiser = accelerator.prepare(network, self.optimiser)

    def update(self, loss_of: Callable, count: int, images: int) -> tuple[Tensor, Tensor]:
        """One step on the mean of loss_of(i), a tensor of any shape, i < count.

        Returns the loss and the gradient's norm, on the device.  Gradients of several processes are
        averaged once, at the last micro-batch.
        """
        total = 0.0
        for i in range(count):
            with contextlib.nullcontext() if i == count - 1 else self.no_sync():
                with self.accelerator.autocast():
                    loss = loss_of(i).mean() / count
                self.accelerator.backward(loss)
            total = total + loss.detach()
        norm = self.norm()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(images)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return total, norm

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients add up on their process."""
        if not self.sharded:
            with self.accelerator.no_sync(self.wrapped):
                yield
            return
        self.network.set_requires_gradient_sync(False)
        yield
        self.network.set_requires_gradient_sync(True)

    def norm(self) -> Tensor:
        """Of the gradient, on the device."""
        if scaler := self.accelerator.scaler:  # fp16: a gradient that overflows is skipped, no divergence
            self.accelerator.unscale_gradients(self.optimiser)
        gradients = {name: p.grad for name, p in self.network.named_parameters()}
        if idle := [name for name, gradient in gradients.items() if gradient is None]:
            raise UserError(f"the loss does not depend on {idle[0]}, a parameter to be trained")
        norm = torch.nn.utils.get_total_norm(gradients.values())
        norm = norm.full_tensor() if self.sharded else norm
        return norm.nan_to_num(0, 0, 0) if scaler else norm

    def state_dict(self) -> dict[str, Any]:
        """Of all processes together; if sharded, empty but on the first."""
        if self.sharded:
            network, optimiser = whole.get_state_dict(self.network, self.optimiser, options=WHOLE)
        else:
            network, optimiser = self.network.state_dict(), self.optimiser.state_dict()
        return {"network": network, "optimiser": optimiser}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.sharded:
            whole.set_state_dict(self.network, self.optimiser, model_state_dict=state["network"],
                                 optim_state_dict=state["optimiser"], options=WHOLE)  # fmt: skip
        else:
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])


class MovingAverage:
    """Of a network's weights, kept in a copy of it.

    halflife, in images, is at first less: a share, rampup, of those that there were.
    """

    def __init__(self, network: Module, copy: Module, halflife: int, rampup: float, sharded: bool):
        self.source, self.network = network, shard(copy.requires_grad_(False), sharded)
        self.halflife, self.rampup = halflife, rampup

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """After the update of `batch` images that brought the number of images seen to this."""
        share = 1 - 0.5 ** (batch / min(self.halflife, images * self.rampup))
        averages, weights = list(self.network.parameters()), list(self.source.parameters())
        torch._foreach_lerp_(averages, weights, share)

    def state_dict(self) -> dict[str, Any]:
        return whole.get_model_state_dict(self.network, options=WHOLE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        whole.set_model_state_dict(self.network, state, options=WHOLE)


class Batches:
    """How a batch falls to processes and micro-batches."""

    def __init__(self, accelerator: Any, batch: int, micro_batch: int):
        self.share = batch // accelerator.num_processes
        self.micro = min(micro_batch or self.share, self.share)
        if self.share % self.micro:
            raise UserError(f"--micro-batch {self.micro} does not divide {self.share}, a process's share")
        self.count, self.first = self.share // self.micro, accelerator.process_index * self.share

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A whole batch -> this process's micro-batches."""
        return tensor[self.first : self.first + self.share].split(self.micro)
