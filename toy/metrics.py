"""How far are these samples from the target, and is the online network keeping up?"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from toy.mixtures import Mixture

SIGMAS = (0.1, 0.2, 0.5, 1.0)  # where scores are compared
# (n, D), (m, D) -> (n, m), of differences: squares multiplied out lose all digits far from the origin.
distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(x: Tensor, y: Tensor, chunk=500) -> float:
    """E|X - Y| over all pairs of two samples (n, D), (m, D)."""
    sums = [distances(part, y).sum(1).cpu().double().sum() for part in x.split(chunk)]  # MPS has no double
    return sum(sums).item() / (len(x) * len(y))


def energy_distance(x: Tensor, y: Tensor, within_y: float | None = None) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| between two samples (n, D), (m, D); 0 only if the laws agree.

    All pairs count, X = X' too (a V-statistic), so two samples of one law are `energy_floor` apart
    on average.  within_y: mean_distance(y, y), where it is known already.
    """
    within_y = mean_distance(y, y) if within_y is None else within_y
    return 2 * mean_distance(x, y) - mean_distance(x, x) - within_y


def energy_floor(n: int, m: int, within: float) -> float:
    """Expected `energy_distance` of n samples from m others of one law: (1/n + 1/m) E|X - X'|.

    within: mean_distance(data, data) of the m, corrected here for each point's distance 0 from itself.
    """
    return (1 / n + 1 / m) * within * m / (m - 1)


def mode_metrics(x: Tensor, target: Mixture) -> dict[str, float]:
    """Where samples x (n, D) lie among the target's modes.

    high_quality       share within 3 std of a component's mean (0.989 of a 2-D Gaussian is)
    modes_covered      modes that hold at least a tenth of their weight in high-quality samples
    modes              how many there are
    mode_weight_error  total variation between the modes' weights and the samples' shares, each
                       sample counted for its nearest component: 0 best, 1 worst
    """
    x, modes = x.to(target.means), target.modes.unique(return_inverse=True)[1]  # whatever their numbers
    distance = distances(x, target.means) / target.stds.clamp_min(1e-30)  # a point has none
    nearest = distance.masked_fill(target.weights == 0, math.inf).min(1)
    n_modes = int(modes.max()) + 1
    share = torch.bincount(modes[nearest.indices], minlength=n_modes).to(x) / len(x)
    close = modes[nearest.indices[nearest.values <= 3]]
    good = torch.bincount(close, minlength=n_modes).to(x) / len(x)
    weights = x.new_zeros(n_modes).index_add_(0, modes, target.weights)
    return {
        "high_quality": good.sum().item(),
        "modes_covered": int(((good >= 0.1 * weights) & (weights > 0)).sum()),
        "modes": int((weights > 0).sum()),
        "mode_weight_error": 0.5 * (share - weights).abs().sum().item(),
    }


class Points(Mixture):
    """Made at every step from what a network gives; whether that is finite, the log says."""

    def __post_init__(self):
        pass


def sample_law(samples: Tensor) -> Points:
    """Samples (K, D) as a mixture of K points, whose diffusion is exact: the generator's own law."""
    K = len(samples)
    each = torch.arange(K, device=samples.device)
    return Points(samples, samples.new_zeros(K), samples.new_full((K,), 1 / K), each)


@torch.no_grad()
def score_diagnostics(
    bank: Tensor, target: Mixture, teacher: Callable, fake: Callable, noise: Tensor
) -> dict[str, float]:
    """The generator against target, teacher and online network, at each of SIGMAS.

    bank (K, D): samples of the generator, whose exact diffusion stands in for p_theta,t; noise:
    (n, D), n <= K, the points probed.  All are mean squared distances between scores times
    sigma^2, i.e. between predictions of the unit noise:

    divergence_S   E|s_p - s_target|^2      the true distance that SIM descends
    fake_error_S   E|s_psi - s_p|^2         what the online network gets wrong
    gap_S          E|s_psi - s_teacher|^2   what training can see of it: |D_psi - D_q|^2 / sigma^2
    """
    law, out = sample_law(bank), {}
    for s in SIGMAS:
        sigma = noise.new_full((len(noise),), s)
        xt = bank[: len(noise)] + s * noise
        exact, psi = law.denoiser(xt, sigma), fake(xt, sigma)
        for name, other, one in (
            ("divergence", exact, target.denoiser(xt, sigma)),
            ("fake_error", psi, exact),
            ("gap", psi, teacher(xt, sigma)),
        ):
            out[f"{name}_{s:g}"] = ((one - other).square().sum(1).mean() / s**2).item()
    return out
