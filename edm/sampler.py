"""Latents that depend on their seed alone, and the teacher's many-step sampler."""

import torch

from edm.data import one_hot
from edm.device import finest


def latents(seeds, shape, label_dim=0):
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


def fixed_latents(network, device, rows=8):
    """For pictures: latents of the first seeds, one column per class -> z, {"class_labels": ...} or {}."""
    columns = network.label_dim if 1 < network.label_dim <= 20 else 10
    z, _ = latents(range(rows * columns), network.shape)
    if not network.label_dim:
        return z.to(device), {}
    labels = torch.arange(len(z)) % columns
    return z.to(device), {"class_labels": one_hot(labels, network.label_dim).to(device)}


@torch.no_grad()
def heun(denoiser, z, steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0, **cond):
    """EDM's deterministic sampler (arXiv:2206.00364, algorithm 1 without churn) -> like z, in float64.

    On MPS, which has no float64, in float32.

    The probability flow dx/dsigma = (x - D(x; sigma)) / sigma from sigma_max z down Karras' ladder of
    `steps` levels to 0, by Heun's second-order steps and a last one of Euler's: 2 steps - 1 evaluations.
    """
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
