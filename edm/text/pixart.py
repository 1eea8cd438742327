"""PixArt-alpha as the denoiser(xt, sigma, **cond) that sim_core asks for (B.3).

PixArt, here diffusers' transformer, predicts the noise of a variance-preserving process of 1,000
steps.  EDM's form of it (B.13) is

    D(x; sigma) = x - sigma F(x / sqrt(sigma^2 + 1); t(sigma), caption)

where t is the step whose noise level is nearest.  x: (B, C, H, W), latents of a VAE times its scaling
factor; sigma: (B,), or a number.  The caption is a dict {"caption": (B, L, width), "mask": (B, L)},
features of T5 and which of them count.  The one-step generator is `edm.networks.Generator` on top (B.14).
"""

import torch
from torch import nn

from edm.device import finest
from edm.images.networks import per_sample

STEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 0.02


def sigma_of_t():
    """sigma = sqrt((1 - abar) / abar) of every step t = 0, ..., 999: (1000,), float64, increasing.

    beta is spaced by 1/1000, so that its last value is 0.01998 and sigma ends at the paper's 156.6155.
    """
    beta = BETA_FIRST + (BETA_LAST - BETA_FIRST) * torch.arange(STEPS, dtype=torch.float64) / STEPS
    kept = (1 - beta).cumprod(0)
    return ((1 - kept) / kept).sqrt()


class PixArtDenoiser(nn.Module):
    """denoiser(xt, sigma, caption, mask) -> D, like xt, in float32 (float64 if the weights are).

    transformer: diffusers' PixArtTransformer2DModel, whose learned variance is ignored.  Only the t that it
    is told is rounded (B.3); xt and the formula keep sigma as it was drawn.  Networks of 1,024 pixels also
    take the size of the image and its ratio: those of xt, times the VAE's 8.
    """

    sigma_data = 1.0  # of the latents: a VAE's scaling factor is chosen so

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
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

    @property
    def shape(self):
        """(C, H, W) of a latent."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def timestep(self, sigma):
        """t of the nearest of the 1,000 levels, by |difference| (B.3): (B,) int64."""
        return torch.bucketize(torch.as_tensor(sigma).to(self.edges), self.edges)

    def _size(self, x):
        """What the networks of 1,024 pixels take besides."""
        if not self.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = 8 * x.shape[2], 8 * x.shape[3]
        resolution = x.new_tensor([height, width]).expand(len(x), 2)
        return {"resolution": resolution, "aspect_ratio": x.new_full((len(x), 1), height / width)}

    def forward(self, xt, sigma, caption, mask):
        weights = self.transformer.proj_out.weight.dtype
        exact = torch.promote_types(weights, torch.float32)  # all but the network itself
        x = xt.to(exact)
        sigma = per_sample(sigma, x)
        level = sigma.view(-1, 1, 1, 1)
        scaled = (x / (level**2 + 1).sqrt()).to(weights)
        noise = self.transformer(
            scaled, encoder_hidden_states=caption.to(weights), timestep=self.timestep(sigma),
            encoder_attention_mask=mask, added_cond_kwargs=self._size(scaled), return_dict=False,
        )[0]  # fmt: skip
        return x - level * noise[:, : x.shape[1]].to(exact)


class Guided(nn.Module):
    """Classifier-free guidance: D_null + scale (D - D_null), in one call of twice the batch.

    null: the caption of "", {"caption": (1, L, width), "mask": (1, L)}.
    """

    def __init__(self, denoiser, null, scale):
        super().__init__()
        self.denoiser, self.null, self.scale = denoiser, null, scale

    def forward(self, xt, sigma, caption, mask):
        nobody = torch.ones(len(xt), dtype=torch.bool, device=xt.device)
        both = [torch.cat(pair) for pair in zip((caption, mask), without(caption, mask, self.null, nobody))]
        sigma = per_sample(sigma, xt).repeat(2)
        plain, null = self.denoiser(torch.cat([xt, xt]), sigma, *both).chunk(2)
        return null + self.scale * (plain - null)


def without(caption, mask, null, where):
    """Captions with the null caption in its place where (B,) is true -> caption, mask of the same shape."""
    length, given = null["caption"].shape[1], caption.shape[1]
    if length > given:
        raise ValueError(f"the null caption has {length} tokens, the captions {given}")
    padded = caption.new_zeros(1, given, caption.shape[2])
    padded[:, :length] = null["caption"]
    kept = mask.new_zeros(1, given)
    kept[:, :length] = null["mask"]
    return torch.where(where[:, None, None], padded, caption), torch.where(where[:, None], kept, mask)


@torch.no_grad()
def encode(vae, images, batch=256):
    """Images (N, 3, H, W) in [-1, 1] -> latents, scaled (diffusers' AutoencoderKL; its mean, no draw)."""
    parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean for part in images.split(batch)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae, x, batch=16):
    """Latents, scaled -> images (N, 3, H, W), about [-1, 1], float32."""
    parts = (x.to(vae.device, vae.dtype) / vae.config.scaling_factor).split(batch)
    return torch.cat([vae.decode(part).sample.float() for part in parts])
