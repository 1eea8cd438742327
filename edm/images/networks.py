"""The EDM networks (Karras et al. 2022): U-Net, preconditioner, and the one-step generator on top.

`EDMPrecond` is the denoiser(xt, sigma, **cond) that sim_core asks for, around `SongUNet` as DDPM++ ("vp") or
NCSN++ ("ve"); its state dict has the released checkpoints' names.  Images x are (B, C, H, W), sigma is (B,).

    x -> conv -> blocks -> down -> blocks -> ... -> in0, in1 -> blocks -> up -> blocks -> ... -> F
             \\______\\_________\\___ skips, concatenated, last first ___/_____/__________/
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQRT_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two

ARCHITECTURES = {  # of the released models; "vp" and "ve" name the network only: all use EDM's process
    "ddpmpp": dict(embedding_type="positional", encoder_type="standard", channel_mult_noise=1,
                   resample_filter=(1, 1)),
    "ncsnpp": dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
                   resample_filter=(1, 3, 3, 1)),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Layers.  gain scales the Xavier-uniform weights: layers that end a residual branch start near 0.


def xavier_(weight: Tensor, gain: float) -> Tensor:
    fan_out, fan_in = weight.shape[0] * weight[0, 0].numel(), weight[0].numel()
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    return nn.init.uniform_(weight, -bound, bound)


def linear(n_in: int, n_out: int, bias=True) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=bias, dtype=torch.float32)
    xavier_(layer.weight, 1)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6, dtype=torch.float32)


class Conv2d(nn.Module):
    """Convolution that may halve or double the resolution, with a fixed low-pass filter.

    The filter comes first.  `fused`, in NCSN++'s auxiliary path, is the other order: a convolution
    with wider padding, then the filter without any."""

    def __init__(self, n_in: int, n_out: int, kernel: int, *, up=False, down=False, fused=False, taps=(1, 1),
                 gain=1.0):  # fmt: skip
        super().__init__()
        weight = torch.empty(n_out, n_in, kernel, kernel, dtype=torch.float32)
        self.weight = nn.Parameter(xavier_(weight, gain))
        self.bias = nn.Parameter(weight.new_zeros(n_out))
        self.up, self.down, self.fused, self.pad = up, down, fused, (len(taps) - 1) // 2
        if up or down:
            taps = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps[:, None] * taps / taps.sum() ** 2)[None, None])

    def resample(self, x: Tensor, padding: int) -> Tensor:
        """Depthwise filter with stride 2."""
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        how = dict(groups=x.shape[1], stride=2, padding=padding)
        return F.conv_transpose2d(x, 4 * taps, **how) if self.up else F.conv2d(x, taps, **how)

    def forward(self, x: Tensor) -> Tensor:
        pad = self.weight.shape[-1] // 2
        if self.fused:
            x = F.conv2d(x, self.weight, padding=pad + self.pad)
            return self.resample(x, 0) + self.bias[:, None, None]
        if self.up or self.down:
            x = self.resample(x, self.pad)
        return F.conv2d(x, self.weight, self.bias, padding=pad)


class Block(nn.Module):
    """Residual block: norm, conv (which may resample), + noise embedding, norm, conv; then attention.

    Sums are scaled by sqrt(1/2).  emb (B, E) comes with its nonlinearity already applied."""

    def __init__(self, n_in: int, n_out: int, emb_channels: int, *, up=False, down=False, attention=False,
                 taps=(1, 1), dropout=0.0):  # fmt: skip
        super().__init__()
        resampling = dict(up=up, down=down, taps=taps)
        self.dropout = dropout
        self.norm0 = group_norm(n_in)
        self.conv0 = Conv2d(n_in, n_out, 3, **resampling)
        self.affine = linear(emb_channels, n_out)
        self.norm1 = group_norm(n_out)
        self.conv1 = Conv2d(n_out, n_out, 3, gain=1e-5)
        self.skip = Conv2d(n_in, n_out, 1, **resampling) if n_in != n_out or up or down else None
        self.norm2 = group_norm(n_out) if attention else None
        self.qkv = Conv2d(n_out, 3 * n_out, 1, gain=math.sqrt(0.2)) if attention else None
        self.proj = Conv2d(n_out, n_out, 1, gain=1e-5) if attention else None

    def attend(self, x: Tensor) -> Tensor:
        """One head over all channels; the 3C channels of qkv are ordered (channel, then q, k, v)."""
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).permute(0, 2, 3, 1).reshape(B, 1, H * W, C, 3).unbind(-1)  # (B, 1, HW, C)
        out = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return self.proj(out.reshape(B, H, W, C).permute(0, 3, 1, 2))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None].to(h.dtype)))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (self.skip(x) if self.skip else x)) * SQRT_HALF
        return (self.attend(self.norm2(x)) + x) * SQRT_HALF if self.qkv else x


# ----------------------------------------------------------------------------------------------
# The U-Net.


class SongUNet(nn.Module):
    """F(x, c_noise, labels) -> like x.  Arguments and defaults as in EDM's checkpoints."""

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, label_dim=0, augment_dim=0,
                 model_channels=128, channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4,
                 attn_resolutions=(16,), dropout=0.10, label_dropout=0, embedding_type="positional",
                 channel_mult_noise=1, encoder_type="standard", decoder_type="standard",
                 resample_filter=(1, 1)):  # fmt: skip
        known = {"embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "residual"),
                 "decoder_type": ("standard",)}  # fmt: skip
        for name, value in zip(known, (embedding_type, encoder_type, decoder_type)):
            if value not in known[name]:
                raise ValueError(f"{name} must be one of {', '.join(known[name])}, got {value!r}")
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(f"resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times")
        super().__init__()
        self.label_dropout = label_dropout
        self.noise_channels = model_channels * channel_mult_noise
        emb_channels = model_channels * channel_mult_emb
        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            freqs = 16 * torch.randn(self.noise_channels // 2, dtype=torch.float32)
            self.map_noise.register_buffer("freqs", freqs)
        else:
            self.map_noise = None
        self.map_label = linear(label_dim, self.noise_channels) if label_dim else None
        self.map_augment = linear(augment_dim, self.noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = linear(self.noise_channels, emb_channels)
        self.map_layer1 = linear(emb_channels, emb_channels)

        def block(n_in, n_out, **how):
            return Block(n_in, n_out, emb_channels, taps=resample_filter, dropout=dropout, **how)

        widths = [model_channels * mult for mult in channel_mult]
        self.enc, skips = nn.ModuleDict(), []  # skips: channels of each skip connection, in order
        for level, width in enumerate(widths):
            res = img_resolution >> level
            name, attention = f"{res}x{res}", res in attn_resolutions
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(in_channels, model_channels, 3)
                now, aux = model_channels, in_channels
            else:
                self.enc[f"{name}_down"] = block(now, now, down=True)
                if encoder_type == "residual":
                    residual = Conv2d(aux, now, 3, down=True, fused=True, taps=resample_filter)
                    self.enc[f"{name}_aux_residual"] = residual
                    aux = now
            skips.append(now)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(now, width, attention=attention)
                skips.append(now := width)

        self.dec = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            name, attention = f"{res}x{res}", res in attn_resolutions
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(now, now, attention=True)  # whatever attn_resolutions says
                self.dec[f"{name}_in1"] = block(now, now)
            else:
                self.dec[f"{name}_up"] = block(now, now, up=True)
            for i in range(num_blocks + 1):
                last = attention and i == num_blocks
                self.dec[f"{name}_block{i}"] = block(now + skips.pop(), width, attention=last)
                now = width
        self.dec[f"{name}_aux_norm"] = group_norm(now)
        self.dec[f"{name}_aux_conv"] = Conv2d(now, out_channels, 3, gain=1e-5)

    def embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Noise level (B,) or (1,), labels (B, label_dim), augmentations (B, augment_dim) -> (B, E)."""
        half = self.noise_channels // 2
        if self.map_noise is not None:
            freqs = 2 * math.pi * self.map_noise.freqs
        else:
            freqs = 10_000 ** (-torch.arange(half, device=c_noise.device, dtype=c_noise.dtype) / (half - 1))
        angle = torch.outer(c_noise, freqs.to(c_noise.dtype))
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        if self.map_label is not None:
            if self.training and self.label_dropout:
                drawn = torch.rand(len(class_labels), 1, device=class_labels.device, dtype=torch.float32)
                class_labels = class_labels * (drawn >= self.label_dropout)
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None,
                augment_labels: Tensor | None = None) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):  # small, and sensitive: full precision
            emb = self.embed(c_noise, class_labels, augment_labels)
        aux, skips = x, []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * SQRT_HALF
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        return x


# ----------------------------------------------------------------------------------------------
# The denoiser and the generator.


def per_sample(sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma, a number or a tensor of one or of B, as (B,) for x (B, ...): on its device, float32 at least."""
    exact = torch.promote_types(x.dtype, torch.float32)
    sigma = torch.as_tensor(sigma, dtype=exact, device=x.device).reshape(-1)
    if len(sigma) not in (1, len(x)):
        raise ValueError(f"sigma must be a number or ({len(x)},), got {len(sigma)} of them")
    return sigma.expand(len(x))


class EDMPrecond(nn.Module):
    """denoiser(x, sigma, class_labels, augment_labels) -> D, the denoised image, like x.

        D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)         (EDM, arXiv:2206.00364, table 1)
        c_skip = s^2 / (sigma^2 + s^2)        c_out   = sigma s / sqrt(sigma^2 + s^2)
        c_in   = 1 / sqrt(sigma^2 + s^2)      c_noise = log(sigma) / 4,        s = sigma_data

    x: (B, C, H, W), in [-1, 1] plus noise.  sigma: (B,), or one for all.  class_labels: (B, label_dim),
    one-hot, or one row for all; none means zeros; ignored by an unconditional network.  augment_labels:
    (B, augment_dim) or none.  Raises ValueError for labels of another shape, such as class indices.
    The arithmetic here is float32, or float64 if the weights are, whatever F computes in."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim=0, sigma_data=0.5, **unet):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data = sigma_data
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                           sigma_data=sigma_data, **unet)  # fmt: skip
        self.model = SongUNet(img_resolution, img_channels, img_channels, label_dim, **unet)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.img_channels, self.img_resolution, self.img_resolution

    def without_augmentation(self) -> "EDMPrecond":
        """Itself, its map_augment dropped.

        That layer has no bias: without augment_labels, or with zeros, it adds nothing to D and gets no
        gradient, so a network that is trained without augmentations must not carry it.
        """
        if self.model.map_augment is not None:
            self.model.map_augment, self.config["augment_dim"] = None, 0
        return self

    def forward(self, x: Tensor, sigma: float | Tensor, class_labels: Tensor | list | None = None,
                augment_labels: Tensor | None = None) -> Tensor:  # fmt: skip
        dtype = torch.promote_types(self.model.map_layer0.weight.dtype, torch.float32)
        x = x.to(dtype)
        sigma = per_sample(sigma, x).reshape(-1, 1, 1, 1)
        if self.label_dim:
            given = x.new_zeros(1, self.label_dim) if class_labels is None else class_labels
            class_labels = torch.as_tensor(given, dtype=dtype, device=x.device)
            if class_labels.shape not in ((len(x), self.label_dim), (1, self.label_dim)):
                shapes = f"({len(x)}, {self.label_dim}), got {tuple(class_labels.shape)}"
                raise ValueError(f"class_labels must be one-hot, of shape {shapes}")
        root = (sigma**2 + self.sigma_data**2).sqrt()
        out = self.model(x / root, sigma.log().flatten() / 4, class_labels, augment_labels)
        return (self.sigma_data / root) ** 2 * x + sigma * self.sigma_data / root * out.to(dtype)


class Generator(nn.Module):
    """g(z) = D(sigma_init z; sigma_init), z ~ N(0, I): a denoiser used once (B.4)."""

    def __init__(self, denoiser: nn.Module, sigma_init=2.5):
        super().__init__()
        self.denoiser, self.sigma_init = denoiser, sigma_init

    def forward(self, z: Tensor, **cond) -> Tensor:
        sigma = z.new_full((len(z),), self.sigma_init)
        return self.denoiser(self.sigma_init * z, sigma, **cond)
