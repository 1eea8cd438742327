"""Latents that depend on their seed alone, and the teacher's many-step sampler."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from edm.device import finest
from edm.images.data import one_hot, to_uint8
from edm.images.networks import EDMPrecond, Generator
from toy.files import UserError


def latents(seeds: Iterable[int], shape: Sequence[int], label_dim=0) -> tuple[Tensor, Tensor | None]:
    """One latent per seed: z (B, *shape) ~ N(0, I), float32, and class indices (B,), or None without classes.

    Each seed has a CPU generator of its own, for the latent and then the class: a sample depends on
    neither its batch nor its device nor its process.
    """
    z, labels = [], []
    for seed in seeds:
        rng = torch.Generator().manual_seed(int(seed))
        z.append(torch.randn(shape, generator=rng, dtype=torch.float32))
        labels.append(torch.randint(max(1, label_dim), (), generator=rng))
    return torch.stack(z), torch.stack(labels) if label_dim else None


def fixed_latents(
    network: EDMPrecond, device: str | torch.device, rows=8
) -> tuple[Tensor, dict[str, Tensor]]:
    """For pictures: latents of the first seeds, one column per class -> z, {"class_labels": ...} or {}."""
    columns = network.label_dim if 1 < network.label_dim <= 20 else 10
    z, _ = latents(range(rows * columns), network.shape)
    if not network.label_dim:
        return z.to(device), {}
    labels = torch.arange(len(z)) % columns
    return z.to(device), {"class_labels": one_hot(labels, network.label_dim).to(device)}


@torch.no_grad()
def heun(denoiser: Callable, z: Tensor, steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0, **cond) -> Tensor:
    """EDM's deterministic sampler (arXiv:2206.00364, algorithm 1 without churn) -> like z, in float64.

    On MPS, which has no float64, in float32.

    The probability flow dx/dsigma = (x - D(x; sigma)) / sigma from sigma_max z down Karras' ladder of
    `steps` levels to 0, by Heun's second-order steps and a last one of Euler's: 2 steps - 1 evaluations.
    One step is D(sigma_max z; sigma_max).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = [*((top + ramp * (bottom - top)) ** rho).tolist(), 0.0]

    def slope(x, sigma):
        denoised = denoiser(x.float(), z.new_full((len(x),), sigma, dtype=torch.float32), **cond)
        return (x - denoised.to(x.dtype)) / sigma

    x = z.to(finest(z.device)) * levels[0]
    for sigma, following in zip(levels, levels[1:]):
        first = slope(x, sigma)
        step = following - sigma
        if following == 0:
            x = x + step * first
        else:
            x = x + step / 2 * (first + slope(x + step * first, following))
    return x


MAX_SEEDS = 10_000_000


def parse_seeds(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7].  Raises UserError."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if not match:
            raise UserError(f"--seeds: {part!r} is neither a seed nor a range of seeds, such as 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds: the range {part} is empty")
        if last - first + len(seeds) >= MAX_SEEDS:
            raise UserError(f"--seeds {text}: more than {MAX_SEEDS:,} images at a time")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed occurs twice")
    return seeds


def make_sampler(network: EDMPrecond, about: dict[str, Any], steps=18) -> tuple[Callable, int]:
    """-> (sample(z, class_labels) -> images (B, C, H, W), float; evaluations of the network per image).

    about: the notes beside the weights; with a sigma_init among them the network is a one-step
    generator, and steps mean nothing; otherwise a denoiser, for `heun`.  class_labels: (B, label_dim),
    one-hot; without classes they have no columns.
    """
    if "sigma_init" not in about:
        return lambda z, class_labels: heun(network, z, steps, class_labels=class_labels), 2 * steps - 1
    sigma_init = about["sigma_init"]
    if type(sigma_init) not in (int, float) or not 0 < sigma_init < math.inf:
        raise UserError(f"the network's sigma_init must be a positive number, got {sigma_init!r}")
    generator = Generator(network, sigma_init)
    return lambda z, class_labels: generator(z, class_labels=class_labels), 1


def sample_batches(
    sample: Callable, network: EDMPrecond, seeds: Sequence[int], batch: int, label: int | None = None,
    device="cpu") -> Iterator[tuple[Sequence[int], Tensor, Tensor | None]]:  # fmt: skip
    """Yield (seeds, images (B, C, H, W) uint8, class indices (B,) or None), all on the CPU.

    sample: of `make_sampler`, with its network on the device.  label: class of all, else by seed.

    The bits of a convolution depend on how many images go in together (on a CPU by 1e-6, so that of
    1e5 pixels a few truncate to another value).  That number is therefore fixed, 64, or 8 for images of
    32x32 and more on a CPU, where that is as fast; the last call is filled up with zeros.  An image so
    depends on neither batch nor company.  It may still differ between machines and numbers of threads;
    and with a number of threads that does not divide 8 (3 was tried) in its last bits also by its place
    in the call.
    """
    device = torch.device(device)
    size = 8 if device.type == "cpu" and network.img_resolution >= 32 else 64
    for start in range(0, len(seeds), batch):
        some = seeds[start : start + batch]
        z, labels = latents(some, network.shape, network.label_dim)
        if label is not None:
            labels = torch.full((len(z),), label)
        cond = z.new_zeros(len(z), 0) if labels is None else one_hot(labels, network.label_dim)
        chunks = zip(z.split(size), cond.split(size))
        x = torch.cat([fixed_size(sample, *chunk, size, device) for chunk in chunks])
        try:
            images = to_uint8(x).cpu()
        except ValueError as error:
            raise UserError(f"seeds {some[0]} to {some[-1]}: {error}") from None
        yield some, images, labels


@torch.no_grad()
def fixed_size(sample: Callable, z: Tensor, cond: Tensor, size: int, device: torch.device) -> Tensor:
    """sample(z, cond) by a call with `size` images: the missing ones are zeros."""
    z_full, cond_full = (torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) for x in (z, cond))
    return sample(z_full.to(device), cond_full.to(device))[: len(z)]
