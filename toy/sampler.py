"""EDM's deterministic sampler, for the many-step teacher that one step is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor


def heun(denoiser: Callable, z: Tensor, steps=40, sigma_min=0.002, sigma_max=80.0, rho=7.0) -> Tensor:
    """Solve dx/dsigma = (x - D(x; sigma)) / sigma from sigma_max z down to 0 by Heun's rule.

    z (B, dim) ~ N(0, I).  2 * steps - 1 network evaluations; one step is D(sigma_max z; sigma_max).
    Source: EDM, arXiv:2206.00364, Algorithm 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    ladder = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64) ** rho
    ladder = [*ladder.tolist(), 0.0]

    def slope(x, sigma):
        return (x - denoiser(x, x.new_full((len(x),), sigma))) / sigma

    with torch.no_grad():
        x = ladder[0] * z
        for sigma, lower in zip(ladder, ladder[1:]):
            first = slope(x, sigma)
            euler = x + (lower - sigma) * first
            x = euler if lower == 0 else x + (lower - sigma) * (first + slope(euler, lower)) / 2
    return x
