"""PixArt-alpha as the denoiser(xt, sigma, **cond) that sim_core asks for (B.3).

PixArt, here diffusers' transformer, predicts the noise of a variance-preserving process of 1,000
steps.  EDM's form of it (B.13) is

    D(x; sigma) = x - sigma F(x / sqrt(sigma^2 + 1); t(sigma), caption)

where t is the step whose noise level is nearest.  x: (B, C, H, W), latents of a VAE times its scaling
factor; sigma: (B,), or a number.  The caption is a dict {"caption": (B, L, width), "mask": (B, L)},
features of T5 and which of them count.  `edm.images.networks.Generator` on top makes one step (B.14).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edm.device import finest
from edm.images.networks import per_sample

STEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 0.02
ARGUMENTS = {  # of a condition -> of diffusers' transformers
    "caption": "encoder_hidden_states",
    "mask": "encoder_attention_mask",
    "pooled": "pooled_projections",
}


def sigma_of_t() -> Tensor:
    """sigma = sqrt((1 - abar) / abar) of every step t = 0, ..., 999: (1000,), float64, increasing.

    beta is spaced by 1/1000, so that its last value is 0.01998 and sigma ends at the paper's 156.6155.
    """
    beta = BETA_FIRST + (BETA_LAST - BETA_FIRST) * torch.arange(STEPS, dtype=torch.float64) / STEPS
    kept = (1 - beta).cumprod(0)
    return ((1 - kept) / kept).sqrt()


class LatentDenoiser(nn.Module):
    """What denoisers around a transformer of diffusers have in common: PixArtDenoiser and FlowDenoiser."""

    sigma_data = 1.0  # of the latents: a VAE's scaling factor is chosen so

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.transformer.proj_out.weight.dtype

    def start(self, xt: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """-> xt and sigma (B, 1, 1, 1) in float32 (float64 if the weights are), like all but the network."""
        x = xt.to(torch.promote_types(self.dtype, torch.float32))
        return x, per_sample(sigma, x).view(-1, 1, 1, 1)

    def predict(self, x: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """What the transformer says of x, without a learned variance, in the dtype of x."""
        given = {ARGUMENTS[name]: self.like_weights(part) for name, part in cond.items()}
        said = self.transformer(
            self.like_weights(x), timestep=timestep, return_dict=False, **given, **self._size(x)
        )[0]
        return said[:, : x.shape[1]].to(x.dtype)

    def like_weights(self, part: Tensor) -> Tensor:
        return part.to(self.dtype) if part.is_floating_point() else part

    def _size(self, x):
        """What the networks of 1,024 pixels take besides."""
        if not getattr(self.transformer, "use_additional_conditions", False):
            return {}
        height, width = 8 * x.shape[2], 8 * x.shape[3]
        size = self.like_weights(x.new_tensor([height, width])).expand(len(x), 2)
        ratio = self.like_weights(x.new_full((len(x), 1), height / width))
        return {"added_cond_kwargs": {"resolution": size, "aspect_ratio": ratio}}


class PixArtDenoiser(LatentDenoiser):
    """denoiser(xt, sigma, caption, mask) -> D, like xt, in float32 (float64 if the weights are).

    transformer: diffusers' PixArtTransformer2DModel, whose learned variance is ignored.  Only the t that it
    is told is rounded (B.3); xt and the formula keep sigma as it was drawn.  Networks of 1,024 pixels also
    take the size of the image and its ratio: those of xt, times the VAE's 8.
    """

    def __init__(self, transformer: nn.Module):
        super().__init__(transformer)
        levels = sigma_of_t()
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("edges", (levels[1:] + levels[:-1]) / 2, persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves with .to(), but the levels keep their float64: in bf16 half of the t would change.

        On a device without float64 edges are rounded down to float32: no float32 sigma changes sides.
        """
        self.levels = self.edges = torch.empty(0)  # to learn the device: float64 may not exist there
        super()._apply(fn, recurse)
        device, levels = self.levels.device, sigma_of_t()
        edges = (levels[1:] + levels[:-1]) / 2
        if finest(device) == torch.float32:
            low = edges.float()
            below = torch.nextafter(low, torch.zeros_like(low))
            levels, edges = levels.float(), torch.where(low.double() > edges, below, low)
        self.levels, self.edges = levels.to(device), edges.to(device)
        return self

    def timestep(self, sigma: float | Tensor) -> Tensor:
        """t of the nearest of the 1,000 levels, by |difference| (B.3): (B,) int64."""
        return torch.bucketize(torch.as_tensor(sigma).to(self.edges), self.edges)

    def draw_levels(self, rng: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        """What it is trained on -> sigma, weight (n,): uniform over the 1,000, weight 1 on the noise."""
        step = torch.randint(len(self.levels), (n,), generator=rng, device=rng.device)
        sigma = self.levels[step].float()
        return sigma, sigma**-2

    def forward(self, xt: Tensor, sigma: float | Tensor, **cond) -> Tensor:
        x, level = self.start(xt, sigma)
        noise = self.predict(x / (level**2 + 1).sqrt(), self.timestep(level.flatten()), cond)
        return x - level * noise


class Guided(nn.Module):
    """Classifier-free guidance: D_null + scale (D - D_null), in one call of twice the batch.

    null: the condition of "", such as {"caption": (1, L, width), "mask": (1, L)}.  It serves whatever is
    called like a denoiser, a velocity too.
    """

    def __init__(self, denoiser: Callable, null: dict[str, Tensor], scale: float):
        super().__init__()
        self.denoiser, self.null, self.scale = denoiser, null, scale

    def forward(self, xt: Tensor, sigma: float | Tensor, **cond) -> Tensor:
        nobody = without(cond, self.null, torch.ones(len(xt), dtype=torch.bool, device=xt.device))
        both = {name: torch.cat([part, nobody[name]]) for name, part in cond.items()}
        sigma = per_sample(sigma, xt).repeat(2)
        plain, null = self.denoiser(torch.cat([xt, xt]), sigma, **both).chunk(2)
        return null + self.scale * (plain - null)


def without(cond: dict[str, Tensor], null: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """Conditions with the null one in their place where (B,) is true, of the same names and shapes."""
    length, given = null["caption"].shape[1], cond["caption"].shape[1]
    if length > given:
        raise ValueError(f"the null caption has {length} tokens, the captions {given}")
    return {name: replaced(part, null[name], where) for name, part in cond.items()}


def replaced(part: Tensor, null: Tensor, where: Tensor) -> Tensor:
    """(B, L, *) with null (1, l, *), l <= L and zeros after it, where (B,) is true."""
    row = part.new_zeros(1, *part.shape[1:])
    row[:, : null.shape[1]] = null
    return torch.where(where.view(-1, *[1] * (part.ndim - 1)), row, part)


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor, batch=256) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> latents, scaled (diffusers' AutoencoderKL; its mean, no draw)."""
    parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean for part in images.split(batch)]
    return (torch.cat(parts) - shift_of(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Any, x: Tensor, batch=16) -> Tensor:
    """Latents, scaled -> images (N, 3, H, W), about [-1, 1], float32."""
    parts = (x.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift_of(vae)).split(batch)
    return torch.cat([vae.decode(part).sample.float() for part in parts])


def shift_of(vae: Any) -> float:
    """What its latents are shifted by: SD3's are."""
    return getattr(vae.config, "shift_factor", None) or 0.0
