"""PixArt as a denoiser: the original's numbers, rounding, guidance, dtypes, and the 1,024-pixel variant."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

import sim_core as sim
from edm.images.networks import Generator
from edm.text.pixart import Guided, PixArtDenoiser, decode, encode, sigma_of_t, without

VECTORS = Path(__file__).parents[2] / "shared/reference/pixart/precond.npz"
needs_vectors = pytest.mark.skipif(
    not VECTORS.exists(), reason=f"the original's numbers are not at {VECTORS}"
)
TINY = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, in_channels=4, out_channels=8,
            cross_attention_dim=24, caption_channels=32, sample_size=8, patch_size=2)  # fmt: skip


class Toy(torch.nn.Module):
    """F(z, t) of the vectors: its second half, the learned variance, must be ignored."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.proj_out = torch.nn.Linear(1, 1, dtype=dtype)
        self.config = SimpleNamespace(in_channels=2, sample_size=2)
        self.use_additional_conditions = False

    def forward(self, z, encoder_hidden_states, timestep, **more):
        first = 0.5 * z[:, :2].tanh() + 0.25 * (0.01 * timestep.to(z.dtype)).cos().view(-1, 1, 1, 1)
        return (torch.cat([first, 1e4 + z], 1),)


def vectors(*names):
    with np.load(VECTORS) as file:
        return [torch.from_numpy(file[name]) for name in names]


def nothing(n):
    return {"caption": torch.zeros(n, 1, 32), "mask": torch.ones(n, 1)}


def denoiser(seed=0, **changes):
    torch.manual_seed(seed)
    network = PixArtTransformer2DModel(**TINY | changes).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return PixArtDenoiser(network)


def captions(n, length=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (n,), generator=rng)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"caption": torch.randn(n, length, 32, generator=rng) * mask[:, :, None], "mask": mask}


# ----------------------------------------------------------------------------------------------
# The preconditioning.


@needs_vectors
def test_levels_are_the_originals():
    (expected,) = vectors("sigma_of_t")
    assert (sigma_of_t() / expected - 1).abs().max() < 1e-10


def test_levels_span_the_papers_range():
    levels = sigma_of_t()
    assert levels.shape == (1000,) and levels.dtype == torch.float64 and (levels.diff() > 0).all()
    assert levels[0].item() == pytest.approx(0.01, abs=1e-6)
    assert levels[-1].item() == pytest.approx(156.6155, abs=5e-5)  # 157.407 with linspace's spacing


@needs_vectors
def test_denoiser_is_the_originals():
    """Which rounds t alone."""
    net, (x, sigma, t, expected) = PixArtDenoiser(Toy()), vectors("x", "sigma_clipped", "t", "D")
    assert torch.equal(net.timestep(sigma), t) and torch.equal(net.timestep(sigma.float()), t)
    assert (net(x, sigma, **nothing(len(x))) - expected).abs().max() < 1e-9


@needs_vectors
def test_generator_is_the_originals():
    z, expected, t = vectors("gen_z", "gen_out", "gen_t")
    generator = Generator(PixArtDenoiser(Toy()), 2.5)
    assert (generator(z, **nothing(len(z))) - expected).abs().max() < 1e-9
    assert torch.equal(generator.denoiser.timestep(torch.full((len(z),), 2.5)), t) and t[0] == 440


@settings(deadline=None)
@given(st.floats(-8, 7, allow_nan=False), st.sampled_from([torch.float32, torch.float64]))
def test_rounding_finds_the_nearest_level(log_sigma, dtype):
    net, sigma = PixArtDenoiser(Toy()), torch.tensor([log_sigma], dtype=dtype).exp()
    t, levels = net.timestep(sigma).item(), sigma_of_t()
    gaps = (levels - sigma.double()).abs()
    assert gaps[t] <= gaps.min() * (1 + 1e-9)
    assert net.timestep(levels[t : t + 1].to(dtype)).item() == t


def test_draws_are_clipped_to_the_range():
    draws = sim.SIGMA_DISTRIBUTIONS["pixart"](100_000, generator=torch.Generator().manual_seed(0))
    assert draws.min().item() == pytest.approx(0.01) and draws.max() <= 156.6155
    first = PixArtDenoiser(Toy()).timestep(draws) == 0
    assert first.float().mean().item() == pytest.approx(0.117, abs=0.005)


# ----------------------------------------------------------------------------------------------
# The real network.


def test_denoiser_is_x_minus_sigma_times_the_predicted_noise():
    net, cond = denoiser(), captions(3)
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.5, 80.0])
    level = sigma.view(-1, 1, 1, 1)
    noise = net.transformer(x / (1 + level**2).sqrt(), cond["caption"], timestep=net.timestep(sigma),
                            encoder_attention_mask=cond["mask"]).sample[:, :4]  # fmt: skip
    assert torch.allclose(net(x, sigma, **cond), x - level * noise, atol=1e-5)
    assert net.shape == (4, 8, 8)


def test_sigma_may_be_a_number():
    net, cond, x = denoiser(), captions(3), torch.randn(3, 4, 8, 8)
    null = {name: part[:1] for name, part in cond.items()}
    for of in (net, Guided(net, null, 2.0)):
        for sigma in (2.5, 2, torch.tensor([2.5])):
            expected = of(x, torch.full((3,), float(sigma)), **cond)
            assert torch.equal(of(x, sigma, **cond), expected)
    assert net.timestep(2.5).item() == net.timestep(torch.tensor([2.5])).item()
    with pytest.raises(ValueError, match=r"sigma must be a number or \(3,\), got 2 of them"):
        net(x, torch.ones(2), **cond)


def test_what_is_masked_does_not_count():
    net, cond = denoiser(), captions(3)
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.5, 80.0])
    padded = {"caption": torch.cat([cond["caption"], torch.randn(3, 2, 32)], 1),
              "mask": torch.cat([cond["mask"], torch.zeros(3, 2).long()], 1)}  # fmt: skip
    assert torch.allclose(net(x, sigma, **padded), net(x, sigma, **cond), atol=1e-5)
    other = cond | {"caption": cond["caption"] + 1}
    assert (net(x, sigma, **other) - net(x, sigma, **cond)).abs().max() > 0.01


def test_weights_in_bf16_keep_levels_and_arithmetic_exact():
    net, cond = denoiser(), captions(4)
    low = copy.deepcopy(net).to(torch.bfloat16)
    assert low.levels.dtype == low.edges.dtype == torch.float64 and torch.equal(low.levels, net.levels)
    sigma = sigma_of_t()[[3, 440, 441, 999]].float()
    assert low.timestep(sigma).tolist() == [3, 440, 441, 999]
    x = torch.randn(4, 4, 8, 8) * sigma.view(-1, 1, 1, 1)
    exact, rough = net(x, sigma, **cond), low(x, sigma, **cond)
    assert rough.dtype == torch.float32
    assert ((exact - rough).flatten(1).norm(dim=1) / (sigma * 16)).max() < 0.05
    assert not torch.equal(exact, rough)


def test_float64_and_gradients_to_input_and_caption():
    net = denoiser().double()
    cond = {k: v.double() for k, v in captions(2).items()}
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    cond["caption"].requires_grad_(True)
    out = net(x, torch.tensor([0.5, 3.0], dtype=torch.float64), **cond)
    assert out.dtype == torch.float64
    gradients = torch.autograd.grad(out.square().sum(), [x, cond["caption"]])
    assert all(g.abs().sum() > 0 for g in gradients)


def test_large_networks_are_told_the_size_of_the_image():
    net, cond, seen = denoiser(use_additional_conditions=True), captions(2), []
    assert denoiser(sample_size=128).transformer.use_additional_conditions  # by default at 1,024 pixels
    inner = net.transformer.forward
    net.transformer.forward = lambda *a, **k: seen.append(k["added_cond_kwargs"]) or inner(*a, **k)
    sigma = torch.tensor([0.5, 3.0])
    assert net(torch.randn(2, 4, 8, 8), sigma, **cond).isfinite().all()
    net(torch.randn(2, 4, 4, 8), sigma, **cond)
    assert [s["resolution"].tolist() for s in seen] == [[[64, 64]] * 2, [[32, 64]] * 2]
    assert [s["aspect_ratio"].tolist() for s in seen] == [[[1]] * 2, [[0.5]] * 2]


# ----------------------------------------------------------------------------------------------
# Guidance.


def null_caption():
    return captions(1, 1, seed=9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance(scale):
    net, cond, null = denoiser(), captions(3), null_caption()
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.5, 80.0])
    plain = net(x, sigma, **cond)
    nobody = net(x, sigma, **{k: v.expand(3, *v.shape[1:]) for k, v in null.items()})
    guided = Guided(net, null, scale)(x, sigma, **cond)
    expected = nobody + scale * (plain - nobody)
    assert (guided - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (plain - nobody).abs().max() > 0.01


def test_captions_are_hidden_where_asked():
    cond, null = captions(3), null_caption()
    caption, mask = without(cond, null, torch.tensor([False, True, False])).values()
    for i in (0, 2):
        assert torch.equal(caption[i], cond["caption"][i]) and torch.equal(mask[i], cond["mask"][i])
    assert torch.equal(caption[1, :1], null["caption"][0]) and mask[1].tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="the null caption has 7 tokens, the captions 5"):
        without(cond, captions(1, 7), torch.tensor([True] * 3))


# ----------------------------------------------------------------------------------------------
# The VAE.


def test_latents_are_scaled():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
                        down_block_types=("DownEncoderBlock2D",) * 2, scaling_factor=0.25,
                        up_block_types=("UpDecoderBlock2D",) * 2).eval()  # fmt: skip
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    x = encode(vae, images, batch=2)
    assert x.shape == (5, 4, 8, 8) and torch.allclose(
        x, 0.25 * vae.encode(images).latent_dist.mean, atol=1e-6
    )
    assert torch.allclose(decode(vae, x, batch=2), vae.decode(4 * x).sample, atol=1e-5)
