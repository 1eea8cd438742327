"""Gaussian mixtures whose density, score and denoiser are exact at every noise level.

A mixture sum_k w_k N(m_k, s_k^2 I), blurred by N(0, sigma^2 I), is again a mixture with
variances s_k^2 + sigma^2: so all that a diffusion model has to learn is known here in closed
form.  `TARGETS` maps names to 2-D examples; `make_target` builds one.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

FITTING = (0.05, 5.0)  # data_std for which the noise levels here, 0.002 to 80, were made


def per_sample(sigma: float | Tensor, xt: Tensor) -> Tensor:
    """sigma, a number or a tensor of one or of B, as (B,) for xt (B, D), in its type."""
    if not xt.is_floating_point():
        raise ValueError(f"xt must be floating-point, got {xt.dtype}")
    sigma = torch.as_tensor(sigma, dtype=xt.dtype, device=xt.device)
    if sigma.numel() not in (1, len(xt)):
        raise ValueError(f"sigma must be a number or ({len(xt)},), got {tuple(sigma.shape)}")
    return sigma.reshape(-1).expand(len(xt))


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, stds_k^2 I) in D dimensions, K components.

    means (K, D), stds (K,) in data units, weights (K,), which are divided by their sum.  modes (K,) says
    which visible blob, arm or letter a component belongs to, for those who count them; without it, each is
    its own.  Raises ValueError for what is no mixture.
    Every function of (xt, sigma) takes (B, D) and (B,) or a number; gradient flows through everything.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    modes: Tensor | None = None

    def __post_init__(self):
        means = torch.as_tensor(self.means)
        if not means.is_floating_point() or means.ndim != 2 or not means.numel():
            raise ValueError(f"means must be floating-point, (K, D), got {means.dtype} {tuple(means.shape)}")
        like, K = {"device": means.device, "dtype": means.dtype}, len(means)
        modes = torch.as_tensor(range(K) if self.modes is None else self.modes, device=means.device)
        stds, weights = (torch.as_tensor(part, **like) for part in (self.stds, self.weights))
        for name, value in {"stds": stds, "weights": weights, "modes": modes, "means": means}.items():
            if value.shape[:1] != (K,) or (value.ndim > 1 and name != "means"):
                raise ValueError(f"{name} must be ({K},), as there are means, got {tuple(value.shape)}")
            if (bad := ~value.isfinite() | ((value < 0) & (name != "means"))).any():
                rule = "finite" if name == "means" else "finite and not negative"
                raise ValueError(f"{name} must be {rule}, got {value[bad][0].item():g}")
        if modes.is_floating_point():
            raise ValueError(f"modes must be integers, got {modes.dtype}")
        exact = weights.cpu().double()
        if not 0 < (total := exact.sum()) < math.inf:
            raise ValueError(f"weights must add up to more than 0, got {total.item()}")
        vars(self).update(means=means, stds=stds, weights=(exact / total).to(**like), modes=modes.long())

    def _posterior(self, xt, sigma):
        """At sigma: component variances, unnormalised log posteriors, (B, K), and m_k - xt, (B, K, D)."""
        if xt.ndim != 2 or xt.shape[1] != self.means.shape[1]:
            raise ValueError(f"xt must be (B, {self.means.shape[1]}), as means, got {tuple(xt.shape)}")
        variance = self.stds**2 + per_sample(sigma, xt)[:, None] ** 2
        away = self.means - xt[:, None]  # differences first: no cancellation
        logits = self.weights.log() - away.square().sum(2) / (2 * variance) - xt.shape[1] / 2 * variance.log()
        return variance, logits, away

    def log_density(self, xt: Tensor, sigma: float | Tensor) -> Tensor:
        """log p(xt; sigma) -> (B,)."""
        _, logits, _ = self._posterior(xt, sigma)
        return logits.logsumexp(1) - xt.shape[1] / 2 * math.log(2 * math.pi)

    def score(self, xt: Tensor, sigma: float | Tensor) -> Tensor:
        """grad_xt log p(xt; sigma) -> (B, D): posterior mean of (m_k - xt) / (s_k^2 + sigma^2)."""
        variance, logits, away = self._posterior(xt, sigma)
        share = logits.softmax(1) / variance
        return (share[:, :, None] * away).sum(1)

    def denoiser(self, xt: Tensor, sigma: float | Tensor) -> Tensor:
        """E[x0 | xt] -> (B, D), by Tweedie."""
        return xt + per_sample(sigma, xt)[:, None] ** 2 * self.score(xt, sigma)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, (n, D), on the generator's device (which must be the mixture's)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        like = {"device": self.means.device, "dtype": self.means.dtype}
        return self.means[k] + self.stds[k, None] * torch.randn(
            n, self.means.shape[1], generator=generator, **like
        )

    def data_std(self) -> float:
        """Root mean variance per coordinate: what EDM calls sigma_data.  Warns of one that does not fit."""
        centre = self.weights @ self.means
        variance = self.weights @ (self.stds**2 + ((self.means - centre) ** 2).mean(1))
        std, off = variance.sqrt().item(), centre.square().mean().sqrt().item()
        if not FITTING[0] <= std <= FITTING[1] or off > 3 * std:
            fits = "the noise levels are for data about 0, of std {:g} to {:g}: centre and scale them"
            warnings.warn(f"data of std {std:.3g}, {off:.3g} off 0; {fits.format(*FITTING)}", stacklevel=2)
        return std

    def to(self, device: str | torch.device) -> "Mixture":
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def equal_mixture(means: Iterable, std: float, modes: Iterable | None = None) -> Mixture:
    """Equal weights, one std.  std: float."""
    means = torch.as_tensor(means, dtype=torch.float32)
    K = len(means)
    modes = torch.arange(K) if modes is None else torch.as_tensor(modes)
    return Mixture(means, means.new_full((K,), float(std)), means.new_full((K,), 1 / K), modes)


def _circle(n, radius=1.0, turn=0.0):
    angle = 2 * math.pi * (torch.arange(n, dtype=torch.float32) + turn) / n
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def ring() -> Mixture:
    """8 Gaussians, radius 1, std 0.1."""
    return equal_mixture(_circle(8), 0.1)


def grid() -> Mixture:
    """5 x 5 Gaussians, spacing 0.6, std 0.05."""
    ticks = 0.6 * (torch.arange(5, dtype=torch.float32) - 2.0)
    return equal_mixture(torch.cartesian_prod(ticks, ticks), 0.05)


def two_rings() -> Mixture:
    """5 Gaussians at radius 0.45 and 10 at radius 1.2, std 0.08."""
    return equal_mixture(torch.cat([_circle(5, 0.45), _circle(10, 1.2, turn=0.5)]), 0.08)


def pinwheel() -> Mixture:
    """5 curved arms of 12 Gaussians, std 0.05; a mode is an arm."""
    radius = torch.linspace(0.3, 1.3, 12, dtype=torch.float32)
    arms = torch.arange(5).repeat_interleave(12)
    angle = 2 * math.pi * arms.float() / 5 + 0.9 * radius.repeat(5)
    return equal_mixture(radius.repeat(5)[:, None] * torch.stack([angle.cos(), angle.sin()], 1), 0.05, arms)


def _empirical(points, modes):
    """2,000 points of scikit-learn, centred, scaled to std 0.7 a coordinate, each a Gaussian of std 0.05."""
    points = torch.as_tensor(points, dtype=torch.float32)
    points = points - points.mean(0)
    return equal_mixture(0.7 * points / points.square().mean().sqrt(), 0.05, modes)


def moons() -> Mixture:
    """scikit-learn's two moons as 2,000 kernels, std 0.05."""
    from sklearn.datasets import make_moons

    return _empirical(*make_moons(2000, noise=0.0, random_state=0))


def circles() -> Mixture:
    """scikit-learn's two circles as 2,000 kernels, std 0.05."""
    from sklearn.datasets import make_circles

    return _empirical(*make_circles(2000, noise=0.0, factor=0.5, random_state=0))


def swiss_roll() -> Mixture:
    """scikit-learn's Swiss roll, seen from the side, as 2,000 kernels, std 0.05; one mode."""
    from sklearn.datasets import make_swiss_roll

    return _empirical(make_swiss_roll(2000, noise=0.0, random_state=0)[0][:, [0, 2]], [0] * 2000)


def checkerboard() -> Mixture:
    """8 squares of side 0.6, each 8 x 8 Gaussians of std 0.04; a mode is a square."""
    cells = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])
    inside = (torch.arange(8, dtype=torch.float32) + 0.5) / 8
    corners = cells.repeat_interleave(64, 0) - 2 + torch.cartesian_prod(inside, inside).repeat(8, 1)
    return equal_mixture(0.6 * corners, 0.04, torch.arange(8).repeat_interleave(64))


def letters() -> Mixture:
    """The word SIM, drawn with Gaussians of std 0.04; a mode is a letter."""
    linspace, tensor = (partial(f, dtype=torch.float32) for f in (torch.linspace, torch.tensor))
    bend = linspace(0.25, 1.5, 16) * math.pi
    top = torch.stack([bend.cos(), bend.sin()], 1) * 0.3 + tensor([0.0, 0.3])
    s = torch.cat([top, -top.flip(0)[1:]]) - tensor([1.15, 0.0])
    line = lambda a, b, n: torch.lerp(tensor(a), tensor(b), linspace(0, 1, n)[:, None])
    i = line([-0.45, -0.6], [-0.45, 0.6], 15)
    m = [(0.05, -0.6), (0.05, 0.6), (0.65, -0.2), (1.25, 0.6), (1.25, -0.6)]
    m = torch.cat([line(a, b, 15 if a[0] == b[0] else 12) for a, b in zip(m, m[1:])])
    modes = torch.tensor([0] * len(s) + [1] * len(i) + [2] * len(m))
    return equal_mixture(torch.cat([s, i, m]), 0.04, modes)


TARGETS = {
    f.__name__: f
    for f in (ring, grid, two_rings, pinwheel, moons, circles, swiss_roll, checkerboard, letters)
}


def make_target(name: str) -> Mixture:
    """The mixture of that name, float32 on the CPU.  ValueError for an unknown name."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; choose from {', '.join(TARGETS)}")
    return TARGETS[name]()
