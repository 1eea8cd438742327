"""A teacher of your own, for `python edm/check_teacher.py edm/example_teacher.py`: copy it, put yours in.

`shape` and `denoiser` are needed; all else makes more checks possible.  xt = x0 + sigma noise is float32,
(B, *shape), and sigma (B,), in the units of the data; D = E[x0 | xt].  Here a network that predicts the
velocity noise - x0 on the straight path stands in for yours, in closed form: the data are four Gaussians.
What else a network may predict, and how that becomes D, with s = sigma.reshape(-1, 1, 1, 1):

    the noise, VP    D = xt - s F(xt / sqrt(1 + s^2), step of sigma)
    a velocity       D = xt / (1 + s) - s / (1 + s) F(xt / (1 + s), t),  t = sigma / (1 + sigma)
    v, VP            D = xt / (1 + s^2) - s / sqrt(1 + s^2) F(xt / sqrt(1 + s^2), step of sigma)
    the image        D = F(xt, sigma)
    the score        D = xt + s^2 F(xt, sigma)
"""

import torch

shape = (1, 8, 8)  # of a sample
sigma_min, sigma_max = 0.002, 80.0  # the noise levels that it knows; these are the defaults
sigma_data = 0.5  # the data's standard deviation that it was built for, if there is one

STD = 0.2
MEANS = 0.5 * torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def network(y, t):
    """E[noise - x0 | y] for y = (1 - t) x0 + t noise: yours, in eval mode, its gradients for x left alive."""
    t = t.reshape(-1, 1, 1, 1)
    variance = ((1 - t) * STD) ** 2 + t**2  # of y about its mean
    gap = y[:, None] - (1 - t[:, None]) * MEANS  # (B, 4, C, H, W)
    which = (-gap.square().sum((2, 3, 4)) / (2 * variance.reshape(-1, 1))).softmax(1)
    gap = (which[:, :, None, None, None] * gap).sum(1)
    mean = (which[:, :, None, None, None] * MEANS).sum(1)
    return (t - (1 - t) * STD**2) / variance * gap - mean


def denoiser(xt, sigma):
    s = sigma.reshape(-1, 1, 1, 1)
    t = s / (1 + s)
    return xt / (1 + s) - t * network(xt / (1 + s), t.flatten())


def data(n):
    """n samples of what it was trained on, or fewer.  A conditional teacher also has cond(n): a dictionary of
    tensors that go with them row by row, and become denoiser(xt, sigma, **cond)."""
    rng = torch.Generator().manual_seed(1)
    which = torch.randint(len(MEANS), (n,), generator=rng)
    return MEANS[which] + STD * torch.randn(n, *shape, generator=rng, dtype=torch.float32)
