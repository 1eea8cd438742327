"""sim_core's numbers: what it refuses, half precision, and the paper's noise levels and weights."""

import ast
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sim_core as sim
from tests.test_core import KINKED, SMOOTH, affine, randn

# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_bad_sigma_is_refused(sigma):
    x, sigmas = torch.zeros(2, 3), torch.tensor([1.0, sigma])
    for call in (sim.score_from_denoised, sim.denoised_from_score, sim.conditional_score):
        with pytest.raises(ValueError, match=f"sigma.*{sigma}"):
            call(x, x, sigmas)
    with pytest.raises(ValueError, match="sigma"):
        sim.fake_loss(affine(1, 0), x, sigmas, x)


def test_bad_shapes_are_refused():
    x, y, sigma = torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2)
    net = affine(0.5, 0.0)
    for call in (
        lambda: sim.sim_loss(x, x, y, "l2"),
        lambda: sim.full_loss(x, y, x, "l2"),
        lambda: sim.sid_loss(x, y, x),
        lambda: sim.diff_instruct_loss(y, x, x),
        lambda: sim.denoising_loss(x, y),
        lambda: sim.denoising_loss(x, x, torch.ones(2, 1)),
        lambda: sim.score_projection(x, x, y),
        lambda: sim.add_noise(x, sigma, y),
        lambda: sim.add_noise(x, torch.ones(3), x),
        lambda: sim.add_noise(x, torch.ones(2, 1), x),
        lambda: sim.score_from_denoised(x, y, sigma),
        lambda: sim.generator_loss(net, net, x, sigma, x, "l2", weight=torch.ones(2, 1)),
        lambda: sim.sid_weight(x, y, sigma),
    ):
        with pytest.raises(ValueError, match=r"\(2, 1\)|\(3,\)"):
            call()


def test_bad_values_are_refused_by_name():
    x, sigma, net = torch.randn(2, 3), torch.ones(2), affine(0.5, 0.0)
    given = net, net, x, sigma, x
    image, latent = torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.long)
    for message, call in {
        "x0.*uint8": lambda: sim.add_noise(image, sigma, x),
        "noise.*int64": lambda: sim.add_noise(x, sigma, latent),
        "denoised.*uint8": lambda: sim.denoising_loss(image, image),
        "y .*uint8": lambda: sim.PseudoHuber().grad(image),
        "sigma.*int64": lambda: sim.edm_weight(torch.ones(2, dtype=torch.long)),
        "x0.*int64": lambda: sim.generator_loss(net, net, latent, sigma, x, "l2"),
        "sigma.*0.5": lambda: sim.add_noise(x, 0.5, x),
        "sigma.*0.25": lambda: sim.generator_loss(net, net, x, 0.25, x, "l2"),
        "sigma.*0.125": lambda: sim.edm_weight(0.125),
        "sigma.*-1": lambda: sim.edm_weight(-sigma),
        "sigma_data.*0": lambda: sim.edm_weight(sigma, 0),
        "weight.*-2": lambda: sim.generator_loss(*given, "l2", weight=-2.0),
        "weight.*-3": lambda: sim.denoising_loss(x, x, torch.tensor([1.0, -3.0])),
        "weight.*nan": lambda: sim.denoising_loss(x, x, math.nan),
        "weight.*function": lambda: sim.generator_loss(*given, "l2", weight=sim.sid_weight),
        "weight.*7": lambda: sim.density_loss(*given, "l2", weight=7.0),
        "weight.*8": lambda: sim.predictions(*given, weight=8.0),
        r"PseudoHuber'>.*PseudoHuber\(\)": lambda: sim.sim_loss(x, x, x, sim.PseudoHuber),
        r"None.*PseudoHuber\(\)": lambda: sim.full_loss(x, x, x, None),
        "unknown space 'pixel'": lambda: sim.generator_loss(*given, "l2", "pixel"),
        "unknown distance 'lpips'": lambda: sim.generator_loss(*given, "lpips"),
        "mean nan": lambda: sim.lognormal_sigma(2, math.nan, 1.0),
        "std nan": lambda: sim.lognormal_sigma(2, 0.0, math.nan),
        "rho nan": lambda: sim.karras_sigma(2, rho=math.nan),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# --- half precision ------------------------------------------------------------------------------

HALF = [torch.float16, torch.bfloat16]


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(HALF),
    exponent=st.floats(-4, 4),
    dims=st.sampled_from([1, 100, 3072]),
    distance=st.sampled_from([*SMOOTH, *KINKED, sim.PseudoHuber(1e-6), sim.Huber(100.0)]),
)
@example(dtype=torch.bfloat16, exponent=-0.15625, dims=3072, distance=sim.Exp(4, 0.05))
def test_distances_are_right_wherever_half_precision_holds_them(dtype, exponent, dims, distance):
    y = (10**exponent * randn(3, dims, seed=dims)).to(dtype)
    y = y[distance.value(y.double()) < math.exp(88)]  # d' of `Exp` is documented as inf from there
    for found, exact in ((d(y), d(y.double())) for d in (distance.value, distance.grad)):
        info = torch.finfo(dtype)
        holds = (exact.abs() < 0.99 * info.max) & (exact.abs() > info.tiny)
        assert found.dtype == dtype
        assert ((found.double() - exact)[holds].abs() <= info.eps * exact[holds].abs()).all()


def test_pseudo_huber_where_squares_overflow():
    y = torch.full((1, 100), 30.0, dtype=torch.float16)
    assert sim.PseudoHuber().grad(y)[0, 0].item() == pytest.approx(0.1, rel=1e-3)
    assert sim.PseudoHuber().value(y).item() == pytest.approx(299.9, rel=1e-3)
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        y = torch.full((1, 4), 3e30, dtype=dtype)
        assert sim.PseudoHuber().grad(y)[0, 0].item() == pytest.approx(0.5, rel=error)
        assert sim.PseudoHuber().value(y).item() == pytest.approx(6e30, rel=error)


@pytest.mark.parametrize("dtype", HALF)
def test_levels_weights_and_scores_in_half_precision(dtype):
    sigma = torch.tensor([1e-4, 0.002, 0.5, 20.0, 156.0], dtype=dtype)
    x0, teacher = randn(5, 12).to(dtype), randn(5, 12, seed=1).to(dtype)
    for weight in (sim.edm_weight, partial(sim.sid_weight, x0, teacher)):
        exact = weight(sigma.double())
        assert ((weight(sigma) - exact) / exact).abs().max() < 1e-2 and weight(sigma).isfinite().all()
    xt = sim.add_noise(x0, sigma, teacher)
    exact = sim.score_from_denoised(x0.double(), x0.double() + 1e-4, sigma)
    assert xt.isfinite().all() and exact[0, 0].item() == pytest.approx(-1e4, rel=0.01)
    near = torch.zeros(5, 12, dtype=dtype), torch.full((5, 12), 1e-4, dtype=dtype)
    assert sim.score_from_denoised(*near, sigma)[0, 0].item() == pytest.approx(-1e4, rel=0.01)
    loss = sim.denoising_loss(x0, (x0.double() + 1e-3).to(dtype), sim.edm_weight(sigma))
    assert loss.dtype == dtype and loss.isfinite().all()
    for name, draw in sim.SIGMA_DISTRIBUTIONS.items():
        seeded = lambda: torch.Generator().manual_seed(0)
        found, exact = (draw(20_000, generator=seeded(), dtype=d) for d in (dtype, None))
        normal = exact > torch.finfo(dtype).tiny
        assert found.dtype == dtype and (found > 0).all() and found.isfinite().all(), name
        gap = ((found - exact) / exact)[normal].abs().max()
        assert gap < torch.finfo(dtype).eps, "the same draws, rounded"
    extreme = torch.cat([sim.lognormal_sigma(99, mean, 1.0, dtype=dtype) for mean in (-150.0, 150.0)])
    assert (extreme > 0).all() and extreme.isfinite().all()


def test_mixed_dtypes_give_those_of_x0():
    x0, noise, sigma = randn(2, 3).float(), randn(2, 3, seed=1).float(), torch.ones(2, dtype=torch.float64)
    assert sim.add_noise(x0, sigma, noise).dtype == torch.float32
    for loss in (sim.generator_loss, sim.density_loss):
        assert loss(affine(0.7, 0.1), affine(0.5, 0.1), x0, sigma.float(), noise, "l2").dtype == torch.float32
    assert sim.fake_loss(lambda xt, s: xt, x0, sigma, noise, sim.edm_weight(sigma)).dtype == torch.float32
    assert sim.sid_weight(x0, noise, sigma).dtype == torch.float32


# --- the paper's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("name, mean, std", [("edm", -1.2, 1.2), ("sim", -3.5, 2.5), ("pixart", -2.0, 2.0)])
def test_lognormal_distributions(name, mean, std):
    """B.6, B.10 and B.3: median and quartiles of ln sigma, which PixArt's clipping does not touch."""
    sigma = sim.SIGMA_DISTRIBUTIONS[name](200_000, generator=torch.Generator().manual_seed(0))
    quartiles = sigma.log().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    assert quartiles == pytest.approx([mean - 0.6745 * std, mean, mean + 0.6745 * std], abs=0.03)


def test_pixart_is_clipped_not_redrawn():
    sigma = sim.SIGMA_DISTRIBUTIONS["pixart"](200_000, generator=torch.Generator().manual_seed(0))
    assert sigma.min().item() == pytest.approx(0.01) and sigma.max().item() == pytest.approx(156.6155)
    assert (sigma == sigma.min()).float().mean().item() == pytest.approx(0.0964, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_karras_is_the_lower_end_of_the_ladder_as_in_sids_code(dtype):
    draw = sim.SIGMA_DISTRIBUTIONS["karras"]
    sigma = draw(200_000, generator=torch.Generator().manual_seed(0), dtype=dtype).double()
    found = sigma.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)).tolist()
    assert found == pytest.approx([0.01148, 0.0851, 0.9654, 5.839, 14.26], rel=0.03)
    bottom, top = 0.002, (80 ** (1 / 7) + 0.2 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigma.min().item() == pytest.approx(bottom, rel=0.02) and top == pytest.approx(24.4, abs=0.05)
    assert sigma.max().item() == pytest.approx(top, rel=0.005)
    assert sigma.unique().numel() > {torch.float16: 5000, torch.bfloat16: 1000}.get(dtype, 150_000)


def test_weightings():
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert sim.edm_weight(sigma, 0.5).tolist() == pytest.approx([8.0, 4.25])  # B.7
    x0, teacher = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    sigma, x0 = torch.tensor([2.0]), x0.requires_grad_()
    weight = sim.sid_weight(x0, teacher, sigma)  # B.11: C sigma^4 / L1 = 2 * 16 / 3
    assert weight.item() == pytest.approx(32 / 3) and not weight.requires_grad
    assert sim.sid_weight(x0, x0, sigma).item() == pytest.approx(16e5)
    assert sim.edm_weight(sigma).item() == pytest.approx(4.25), "EDM's sigma_data is 0.5"


def test_dmd2s_distribution_matching_is_diff_instruct_weighted_by_w_sid():
    """Its gradient at the samples: (D_fake - D_teacher) / mean |x0 - D_teacher|, DMD2, arXiv:2405.14867."""
    rng = torch.Generator().manual_seed(0)
    x0, fake, teacher, noise = torch.randn(4, 5, 3, 8, dtype=torch.float64, generator=rng)
    sigma = 0.1 + torch.rand(5, dtype=torch.float64, generator=rng)
    x0.requires_grad_()
    triple = sim.predictions(lambda *_: teacher, lambda *_: fake, x0, sigma, noise)
    loss = sim.diff_instruct_loss(*triple) * sim.WEIGHTINGS["sid"](triple, sigma, "denoised", 0.5)
    (found,) = torch.autograd.grad(loss.sum(), x0)
    expected = (fake - teacher) / (x0 - teacher).abs().mean((1, 2), keepdim=True)
    assert (found - expected).abs().max() < 1e-14


def test_samplers_follow_their_generator_and_refuse_nonsense():
    for draw in sim.SIGMA_DISTRIBUTIONS.values():
        a, b, c = (draw(16, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (16,) and (a > 0).all()
        assert draw(3, dtype=torch.float64).dtype == torch.float64
    for bad in (dict(std=-1), dict(std=1, sigma_min=2, sigma_max=1), dict(std=1, sigma_min=-1)):
        with pytest.raises(ValueError, match="sigma_min"):
            sim.lognormal_sigma(4, 0.0, **bad)
    for bad in (dict(sigma_min=0.0), dict(t_max=1.1), dict(sigma_min=90.0)):
        with pytest.raises(ValueError, match="sigma_min"):
            sim.karras_sigma(4, **bad)


def test_the_core_imports_torch_and_the_standard_library_only():
    tree = ast.parse(Path(sim.__file__).read_text("utf-8"))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules == {"math", "collections.abc", "dataclasses", "functools", "torch"}
