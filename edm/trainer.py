"""The training loop of images and of text-to-image alike: Algorithm 2, on any number of processes.

`Trainee` is a network with its optimiser, `Distiller` owns the two updates of a step, `train` repeats
steps and looks after the run.  Every random number of step n comes from (seed, n) and the sample's
place in the whole batch, so a result depends neither on the number of processes nor on interruptions,
and there is no state of a random generator to keep.
"""

import contextlib
import math
import os
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import sim_core as sim
from edm import plots
from edm.config import UserError, surrogate
from edm.device import find_device, peak_memory
from edm.runs import stop_on_signal

LOOKS = 50  # rows of the log
SIGMA_BINS = (0.2, 1.0, 4.0)  # edges of the bins of the log, in units of sigma_data


class Diverged(Exception):
    """Training left the finite numbers."""


# ----------------------------------------------------------------------------------------------
# The machine.


def make_accelerator(cfg):
    """One code path for a CPU, a GPU, and torchrun over several of either."""
    kind = find_device(cfg.device)
    if cfg.precision == "fp16" and kind != "cuda":
        raise UserError("--precision fp16 is for GPUs with CUDA; others take bf16")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo beside nccl: for what no GPU should wait for
        handlers.append(InitProcessGroupKwargs(backend="gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"))
    try:
        accelerator = Accelerator(cpu=kind == "cpu", mixed_precision=cfg.precision, kwargs_handlers=handlers)
    except ValueError as error:  # an old macOS has no bf16
        raise UserError(f"--precision {cfg.precision}: {error}") from None
    if is_sharded(cfg) and (accelerator.num_processes == 1 or cfg.precision == "fp16"):
        raise UserError("--sharding fsdp is for several processes (torchrun), in bf16 or float32")
    if cfg.batch % accelerator.num_processes:
        raise UserError(f"--batch {cfg.batch} does not divide over {accelerator.num_processes} processes")
    Batches(cfg, accelerator)  # refuses an unfit --micro-batch, before a folder is made
    return accelerator


def compiled(networks, device, say):
    """Compile in place; leave them eager, and say so, where there is no working compiler."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a broken toolchain raises
        say(f"torch.compile does not work here ({type(error).__name__}); going on without it")
        return
    for network in networks:
        network.compile()


def generator_of(device, *numbers):
    """A torch.Generator seeded by all of the numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64).item() >> 1
    return torch.Generator(device).manual_seed(seed)


# ----------------------------------------------------------------------------------------------
# Networks that learn.


WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(cfg):
    return getattr(cfg, "sharding", "ddp") == "fsdp"


def shard(network, cfg):
    """FSDP2, with --sharding fsdp: each process keeps a share of the weights, gathered block by block."""
    if is_sharded(cfg):
        for block in [*blocks(network)]:
            fully_shard(block)
        fully_shard(network, reshard_after_forward=True)  # else a look would leave its own weights whole
    return network


def blocks(module):
    """The modules in the outermost lists."""
    for child in module.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from child.children()
        else:
            yield from blocks(child)


class Trainee:
    """A network, its optimiser, and an update over micro-batches."""

    def __init__(self, accelerator, network, cfg, lr):
        self.accelerator, self.network, self.cfg, self.lr = accelerator, shard(network, cfg), cfg, lr
        self.sharded = is_sharded(cfg)
        self.optimiser = torch.optim.Adam(network.parameters(), lr, (cfg.beta1, cfg.beta2), fused=True)
        self.wrapped = network
        if not self.sharded:
            self.wrapped, self.optimiser = accelerator.prepare(network, self.optimiser)

    def rate(self, images):
        """The learning rate after so many images: ramp-up, times a cosine."""
        rate, share = self.lr, images / (self.cfg.steps * self.cfg.batch)
        if self.cfg.lr_rampup:
            rate *= min(1.0, images / self.cfg.lr_rampup)
        return rate * (self.cfg.lr_end + (1 - self.cfg.lr_end) * (0.5 + 0.5 * math.cos(math.pi * share)))

    def update(self, loss_of, count, images):
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
    def no_sync(self):
        """Inside, gradients add up on their process."""
        if not self.sharded:
            with self.accelerator.no_sync(self.wrapped):
                yield
            return
        self.network.set_requires_gradient_sync(False)
        yield
        self.network.set_requires_gradient_sync(True)

    def norm(self):
        """Of the gradient, on the device."""
        if scaler := self.accelerator.scaler:  # fp16: a gradient that overflows is skipped, no divergence
            self.accelerator.unscale_gradients(self.optimiser)
        gradients = {name: p.grad for name, p in self.network.named_parameters()}
        if idle := [name for name, gradient in gradients.items() if gradient is None]:
            raise UserError(f"the loss does not depend on {idle[0]}, a parameter to be trained")
        norm = torch.nn.utils.get_total_norm(gradients.values())
        norm = norm.full_tensor() if self.sharded else norm
        return norm.nan_to_num(0, 0, 0) if scaler else norm

    def state_dict(self):
        """Of all processes together; if sharded, empty but on the first."""
        if self.sharded:
            network, optimiser = whole.get_state_dict(self.network, self.optimiser, options=WHOLE)
        else:
            network, optimiser = self.network.state_dict(), self.optimiser.state_dict()
        return {"network": network, "optimiser": optimiser}

    def load_state_dict(self, state):
        if self.sharded:
            whole.set_state_dict(self.network, self.optimiser, model_state_dict=state["network"],
                                 optim_state_dict=state["optimiser"], options=WHOLE)  # fmt: skip
        else:
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])


class MovingAverage:
    """Of a network's weights.  Its half-life, in images, grows with them: short at first."""

    def __init__(self, network, copy, cfg):
        self.source, self.network, self.cfg = network, shard(copy.requires_grad_(False), cfg), cfg

    @torch.no_grad()
    def update(self, images):
        """After the update that brought the number of images seen to this."""
        halflife = min(self.cfg.ema_halflife, images * self.cfg.ema_rampup)
        share = 1 - 0.5 ** (self.cfg.batch / halflife)
        averages, weights = list(self.network.parameters()), list(self.source.parameters())
        torch._foreach_lerp_(averages, weights, share)

    def state_dict(self):
        return whole.get_model_state_dict(self.network, options=WHOLE)

    def load_state_dict(self, state):
        whole.set_model_state_dict(self.network, state, options=WHOLE)


class Batches:
    """How a batch falls to processes and micro-batches."""

    def __init__(self, cfg, accelerator):
        self.batch, self.share = cfg.batch, cfg.batch // accelerator.num_processes
        self.micro = min(cfg.micro_batch or self.share, self.share)
        if self.share % self.micro:
            raise UserError(f"--micro-batch {self.micro} does not divide {self.share}, a process's share")
        self.count, self.first = self.share // self.micro, accelerator.process_index * self.share

    def split(self, tensor):
        """A whole batch -> this process's micro-batches."""
        return tensor[self.first : self.first + self.share].split(self.micro)


# ----------------------------------------------------------------------------------------------
# Algorithm 2.


class Distiller:
    """The two updates of a step, theta's moving average, and what to log.

    teacher    denoiser(xt, sigma, **cond), frozen
    fake       the same, to be trained: psi
    generator  x0 = generator(z, **cond), to be trained: theta.  average: a copy of it
    condition  condition(random generator, n) -> dict of tensors (n, ...), the cond of n samples
    """

    def __init__(self, cfg, accelerator, teacher, fake, generator, average, shape, condition, sigma_data):
        self.cfg, self.accelerator, self.device = cfg, accelerator, accelerator.device
        self.teacher, self.shape, self.condition = shard(teacher.requires_grad_(False), cfg), shape, condition
        self.fake = Trainee(accelerator, fake, cfg, cfg.fake_lr)
        self.generator = Trainee(accelerator, generator, cfg, cfg.lr)
        self.ema = MovingAverage(generator, average, cfg)
        self.batches, self.loss, self.sigma_data = Batches(cfg, accelerator), surrogate(cfg), sigma_data
        self.bins = [edge * sigma_data for edge in SIGMA_BINS]
        self.edges = torch.tensor(self.bins, device=self.device, dtype=torch.float32)
        self.gaps = self.edges.new_zeros(2, len(self.bins) + 1)  # sums and counts by sigma

    def weight(self, weighting, sigma, triple=None):
        """Of either loss, by name; w_SiD, theta's, needs what the networks say."""
        return sim.WEIGHTINGS[weighting](triple, sigma, self.cfg.space, self.sigma_data)

    # What text-to-image does otherwise.

    def fake_cond(self, draw, i):
        """The cond under which psi learns."""
        return draw["cond"][i]

    def judge(self, network):
        """psi as it judges the generator."""
        return network

    # Algorithm 2.

    def draw_sigma(self, distribution, rng):
        return sim.SIGMA_DISTRIBUTIONS[distribution](self.cfg.batch, generator=rng, dtype=torch.float32)

    def draw(self, *numbers):
        """Latents, conditions, and both updates' noise levels and noise, as lists of micro-batches."""
        rng, n = generator_of(self.device, self.cfg.seed, *numbers), self.cfg.batch
        how = dict(device=self.device, dtype=torch.float32)
        normal = partial(torch.randn, n, *self.shape, generator=rng, **how)
        parts = dict(
            z=normal(),
            fake_sigma=self.draw_sigma(self.cfg.fake_sigma_distribution, rng),
            fake_noise=normal(),
            sigma=self.draw_sigma(self.cfg.sigma_distribution, rng),
            noise=normal(),
        )
        levels = torch.cat([parts["fake_sigma"], parts["sigma"]])  # of all processes
        parts = {name: self.batches.split(tensor) for name, tensor in parts.items()} | {"levels": levels}
        cond = {name: self.batches.split(t) for name, t in self.condition(rng, n).items()}
        parts["cond"] = [{name: t[i] for name, t in cond.items()} for i in range(self.batches.count)]
        return parts

    def step(self, n):
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
            self.ema.update((n + 1 - self.cfg.warmup) * self.cfg.batch)
        else:
            numbers["surrogate"] = numbers["generator_gradient"] = torch.zeros_like(fake_loss)
        levels = torch.cat([*levels, draw["levels"]])  # a NaN among them is found where the log is
        return numbers | {"sigma_min": levels.min(), "sigma_max": levels.max()}

    def images(self, draw, keep_graph):
        """x0 = g(z) of every micro-batch."""
        generator = self.generator.wrapped if keep_graph else self.generator.network
        with torch.set_grad_enabled(keep_graph), self.accelerator.autocast():
            return [generator(z, **cond) for z, cond in zip(draw["z"], draw["cond"])]

    def update_fake(self, draw, images, seen):
        """psi: denoise the generator's samples (B.2)."""

        def loss(i):
            sigma, noise, cond = draw["fake_sigma"][i], draw["fake_noise"][i], self.fake_cond(draw, i)
            weight = self.weight(self.cfg.fake_weighting, sigma)
            return sim.fake_loss(self.fake.wrapped, images[i], sigma, noise, weight, **cond)

        return self.fake.update(loss, self.batches.count, seen)

    def update_generator(self, draw, images, seen):
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

    def gap_by_sigma(self):
        """Mean ||D_psi - D_q|| per bin of sigma since the last call; NaN where there was none."""
        sums, counts = self.accelerator.reduce(self.gaps).cpu()
        self.gaps.zero_()
        edges = ("0", *(f"{edge:g}" for edge in self.bins), "inf")
        return {f"gap_{a}_{b}": (s / c).item() for a, b, s, c in zip(edges, edges[1:], sums, counts)}

    def state_dict(self):
        return {"fake": self.fake.state_dict(), "generator": self.generator.state_dict(),
                "ema": self.ema.state_dict(), "gaps": self.gaps}  # fmt: skip

    def load_state_dict(self, state):
        self.fake.load_state_dict(state["fake"])
        self.generator.load_state_dict(state["generator"])
        self.ema.load_state_dict(state["ema"])
        self.gaps.copy_(state["gaps"])


# ----------------------------------------------------------------------------------------------
# The loop.


class Recent:
    """The numbers of the steps since the last look, kept on the device: no step waits for them."""

    def __init__(self, accelerator):
        self.accelerator, self.rows, self.names = accelerator, [], None

    def add(self, numbers):
        self.names = list(numbers)
        self.rows.append(torch.stack([value.float() for value in numbers.values()]))

    def collect(self, last_step):
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


def agree(stop, accelerator):
    """Whether any process was told to stop.  Over gloo, so that no GPU waits."""
    if accelerator.num_processes == 1:
        return bool(stop)
    flag = torch.tensor([len(stop)])
    dist.all_reduce(flag)
    return bool(flag)


def train(cfg, accelerator, task, run, look, picture, name, score=None):
    """Repeat task.step until cfg.steps or a signal.  Returns "finished" or "interrupted".

    task     has step(n), state_dict(), load_state_dict(state)
    look     look() -> more numbers for the log, of which there are about LOOKS rows
    picture  picture(step), called with every checkpoint, on every process: networks may be in shares
    score    score(step) -> more numbers, every cfg.evaluate_every images and at the end, on every process
    """
    state = run.load(accelerator.print) if cfg.resume else None
    start = state["step"] if state else 0
    if state:
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


def complete(cfg, accelerator, task, run, look, picture, name, score=None):
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
    return 0
