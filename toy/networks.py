"""Small networks for points in the plane.  The denoisers are called as denoiser(xt, sigma)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from toy.mixtures import per_sample

Linear = partial(nn.Linear, dtype=torch.float32)  # whatever the default


class Denoiser(nn.Module):
    """An MLP in EDM's preconditioning: D(xt; sigma) = c_skip xt + c_out F(c_in xt, ln(sigma)/4).

    Each hidden layer is scaled and shifted by a function of sigma, as in the U-Nets of the field
    (without it a plain MLP is several times farther from the true denoiser).  xt (B, dim),
    sigma (B,), or a number -> (B, dim).  sigma_data is the data's standard deviation per coordinate.
    """

    def __init__(self, dim=2, width=128, depth=3, sigma_data=0.5):
        super().__init__()
        self.sigma_data, self.depth = sigma_data, depth
        self.register_buffer("frequencies", math.pi * torch.linspace(0.25, 4.0, 8, dtype=torch.float32))
        self.embed = Linear(1 + 2 * 8, 2 * depth * width)
        ones = torch.tensor([1.0, 0.0], dtype=torch.float32).repeat(depth).repeat_interleave(width)
        self.register_buffer("ones", ones, persistent=False)  # a layer's scale is 1 + what is learned
        self.layers = nn.ModuleList(Linear(dim if i == 0 else width, width) for i in range(depth))
        self.out = Linear(width, dim)
        nn.init.zeros_(self.out.weight)  # starts as the best linear denoiser, F = 0
        nn.init.zeros_(self.out.bias)

    def forward(self, xt: Tensor, sigma: float | Tensor) -> Tensor:
        s = per_sample(sigma, xt if torch.is_tensor(sigma) else xt[:1])[:, None]
        c_in = (s.square() + self.sigma_data**2).rsqrt()
        ratio = self.sigma_data * c_in
        h = c_in * xt
        for layer, (scale, shift) in zip(self.layers, self.modulation(s)):
            h = nn.functional.silu(layer(h) * scale + shift)
        return ratio.square() * xt + s * ratio * self.out(h)

    def modulation(self, s: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """s (B, 1), or (1, 1) for all -> of each layer (1 + scale, shift), (B, width) or (1, width)."""
        noise_level = s.log() / 4
        angle = noise_level * self.frequencies
        features = torch.cat([noise_level, angle.sin(), angle.cos()], 1)
        bias = self.embed.bias + self.ones
        embedding = nn.functional.linear(features, self.embed.weight, bias).chunk(2 * self.depth, 1)
        return zip(embedding[::2], embedding[1::2])


class Generator(nn.Module):
    """The one-step generator x0 = g(z) = D(sigma_init z; sigma_init), z ~ N(0, I) (B.4).

    Give it a copy of the teacher: one network evaluation, teacher's weights to start from.
    """

    def __init__(self, denoiser: nn.Module, sigma_init=2.5):
        super().__init__()
        self.denoiser, self.sigma_init = denoiser, sigma_init

    def forward(self, z: Tensor) -> Tensor:
        return self.denoiser(self.sigma_init * z, self.sigma_init)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with SiLU between."""
    layers = [module for i, o in zip(sizes, sizes[1:]) for module in (Linear(i, o), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


# ------------------------------------------------------------------------------------------------
# Listing 1 works in the VP process x_vp = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, t = 1..T-1.
# Dividing by sqrt(abar_t) gives the EDM form with sigma_t = sqrt((1 - abar_t) / abar_t).

VP_STEPS = 1000  # T


def vp_betas() -> Tensor:
    """The linear schedule of DDPM, (T,): 1e-4 to 0.02."""
    return torch.linspace(1e-4, 0.02, VP_STEPS, dtype=torch.float64)


def vp_sigmas() -> Tensor:
    """sigma_t for t = 0..T-1, (T,) float32, increasing from 0.01 to 157."""
    abar = (1 - vp_betas()).cumprod(0)
    return ((1 - abar) / abar).sqrt().float()


def vp_sigma(n: int, *, generator: torch.Generator | None = None, dtype=torch.float32) -> Tensor:
    """n draws of sigma_t with t uniform on 1..T-1 (Listing 1)."""
    device = generator.device if generator else None
    return vp_sigmas().to(device, dtype)[torch.randint(1, VP_STEPS, (n,), generator=generator, device=device)]


def vp_weight(sigma: float | Tensor) -> Tensor:
    """Listing 1's weight T g^2 on VP score errors, for denoised errors: T beta_t (1 + sigma^2) / sigma^4.

    A score in VP coordinates is sqrt(1 + sigma^2) times the EDM one, and g^2 = beta_t.
    """
    sigma = 1.0 * torch.as_tensor(sigma)
    t = torch.searchsorted(vp_sigmas().to(sigma), sigma.contiguous()).clamp_max(VP_STEPS - 1)
    beta = vp_betas().to(sigma)[t]
    return VP_STEPS * beta * (1 + sigma**2) / sigma**4


class VPDenoiser(nn.Module):
    """An epsilon-network on cat[x_vp, t/T] as a denoiser:

    D(xt; sigma) = xt - sigma eps(xt / sqrt(1 + sigma^2), t(sigma) / T).
    """

    def __init__(self, dim=2, width=128, depth=3):
        super().__init__()
        self.epsilon = mlp([dim + 1] + [width] * depth + [dim])
        self.register_buffer("sigmas", vp_sigmas())

    def forward(self, xt: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = per_sample(sigma, xt)
        t = torch.searchsorted(self.sigmas, sigma.contiguous()).clamp_max(VP_STEPS - 1).float()
        s = sigma[:, None]
        return xt - s * self.epsilon(torch.cat([xt * (1 + s**2).rsqrt(), t[:, None] / VP_STEPS], 1))


# ------------------------------------------------------------------------------------------------
# Rectified flow: the straight path x_t = (1 - t) x0 + t noise, and its velocity v = noise - x0.
# Dividing by 1 - t gives the EDM form with sigma = t / (1 - t).


def flow_sigma(n: int, *, generator: torch.Generator | None = None, dtype=torch.float32) -> Tensor:
    """n draws of t / (1 - t), t uniform from 0.001 to 0.999.  Of a logit-normal t, sigma is log-normal."""
    device = generator.device if generator else None
    t = 0.001 + 0.998 * torch.rand(n, generator=generator, device=device, dtype=dtype)
    return t / (1 - t)


def flow_weight(sigma: float | Tensor) -> float | Tensor:
    """1 / t^2: weight 1 on velocities, for denoised errors."""
    return (1 + 1 / sigma) ** 2


class FlowDenoiser(nn.Module):
    """A velocity network on cat[x_t, t] as a denoiser:

    D(xt; sigma) = x_t - t v(x_t, t),   t = sigma / (1 + sigma),   x_t = xt / (1 + sigma).
    """

    def __init__(self, dim=2, width=128, depth=3):
        super().__init__()
        self.velocity = mlp([dim + 1] + [width] * depth + [dim])

    def forward(self, xt: Tensor, sigma: float | Tensor) -> Tensor:
        s = per_sample(sigma, xt)[:, None]
        t, x = s / (1 + s), xt / (1 + s)
        return x - t * self.velocity(torch.cat([x, t], 1))
