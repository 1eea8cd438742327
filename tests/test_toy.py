"""The 2-D laboratory: exact mixtures, networks, metrics, figures."""

import math
from dataclasses import replace

import pytest
import torch

import sim_core as sim
from toy import metrics, plots
from toy.mixtures import TARGETS, Mixture, equal_mixture, make_target
from toy.networks import (
    Denoiser,
    FlowDenoiser,
    Generator,
    VPDenoiser,
    flow_sigma,
    flow_weight,
    vp_betas,
    vp_sigma,
    vp_sigmas,
    vp_weight,
)
from toy.sampler import heun


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def lopsided(dim=2):
    """A small mixture with unequal everything, float64."""
    means = torch.randn(4, dim, generator=rng(1), dtype=torch.float64)
    stds = torch.tensor([0.1, 0.3, 0.2, 0.5], dtype=torch.float64)
    return Mixture(means, stds, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.arange(4))


# --- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, dim", [(0.0, 2), (0.05, 1), (0.7, 3), (5.0, 2)])
def test_density_is_that_of_the_blurred_components(sigma, dim):
    mixture, x = lopsided(dim), torch.randn(50, dim, generator=rng(), dtype=torch.float64)
    by_hand = 0.0
    for mean, std, weight in zip(mixture.means, mixture.stds, mixture.weights):
        covariance = (std**2 + sigma**2) * torch.eye(dim, dtype=torch.float64)
        by_hand += weight * torch.distributions.MultivariateNormal(mean, covariance).log_prob(x).exp()
    sigmas = torch.full((50,), sigma, dtype=torch.float64)
    assert (mixture.log_density(x, sigmas) - by_hand.log()).abs().max() < 1e-9


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_score_is_the_gradient_of_log_density_and_tweedie_holds(dim):
    mixture, sigma = lopsided(dim), torch.rand(50, generator=rng(2), dtype=torch.float64) + 0.05
    x = torch.randn(50, dim, generator=rng(), dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    assert (mixture.score(x, sigma) - expected).abs().max() < 1e-9 * expected.abs().max()
    denoised = mixture.denoiser(x, sigma)
    assert (sim.score_from_denoised(denoised, x, sigma) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_denoiser_is_the_posterior_mean():
    """E[x0 | xt] by brute force: importance-weighted samples of x0."""
    mixture, sigma = lopsided(1), 0.4
    x0 = mixture.sample(400_000, rng())[:, 0]
    for xt in (-1.0, 0.2, 1.3):
        weight = torch.exp(-((xt - x0) ** 2) / (2 * sigma**2))
        expected = (weight * x0).sum() / weight.sum()
        one = torch.tensor([[xt]], dtype=torch.float64)
        found = mixture.denoiser(one, one.new_full((1,), sigma))
        assert found.item() == pytest.approx(expected.item(), abs=0.01)


def test_data_std_is_that_of_samples():
    mixture = lopsided()
    expected = mixture.sample(400_000, rng()).var(0).mean().sqrt().item()
    assert mixture.data_std() == pytest.approx(expected, rel=0.01)


def test_weights_are_shares_of_their_sum_and_each_component_is_its_own_mode():
    whole = Mixture(torch.tensor([[-1.0, 0], [1, 0]]), torch.full((2,), 0.1), torch.tensor([1e38, 3e38]))
    parts = replace(whole, weights=torch.tensor([0.25, 0.75]), modes=torch.tensor([7, 10**12]))
    x = parts.sample(4000, rng())
    assert torch.equal(x, whole.sample(4000, rng())) and whole.modes.tolist() == [0, 1]
    assert torch.equal(whole.log_density(x, 0.1), parts.log_density(x, 0.1))
    assert whole.data_std() == parts.data_std() == pytest.approx((0.01 + 0.75 / 2) ** 0.5)
    found = metrics.mode_metrics(x, whole)
    assert found == metrics.mode_metrics(x.double(), parts) and found["mode_weight_error"] < 0.02
    assert found["modes_covered"] == found["modes"] == 2 and whole.to("cpu").modes is not None
    lone = metrics.mode_metrics(x[x[:, 0] > 0], replace(whole, weights=torch.tensor([0.0, 3.0])))
    assert lone["modes_covered"] == lone["modes"] == 1 and lone["mode_weight_error"] == 0
    stray = metrics.mode_metrics(x, replace(whole, weights=torch.tensor([0.0, 3.0])))
    assert stray["high_quality"] == pytest.approx(0.75 * (1 - math.exp(-4.5)), abs=0.02)
    assert metrics.mode_metrics(x[:50], metrics.sample_law(x[:50]))["modes_covered"] == 50, "each by itself"


@pytest.mark.parametrize("name, value, message", [
    ("weights", [1.0, -1.0], "not negative, got -1"), ("weights", [1.0, math.nan], "finite.*got nan"),
    ("weights", [0.0, 0.0], "more than 0"), ("weights", [1.0, math.inf], "got inf"),
    ("weights", [1.0], r"be \(2,\)"), ("stds", [1.0, -0.1], "got -0.1"), ("stds", [math.nan, 1.0], "got nan"),
    ("stds", [[1.0], [1.0]], r"\(2, 1\)"), ("means", [[0.0, 0.0], [math.nan, 0.0]], "finite, got nan"),
    ("means", [0.0, 0.0], r"\(K, D\), got .*\(2,\)"), ("means", [[0, 0], [1, 0]], "floating-point"),
    ("modes", [0], r"\(2,\)"), ("modes", [0, -1], "got -1"), ("modes", [0.5, 1.0], "integers")])  # fmt: skip
def test_what_is_no_mixture_is_named(name, value, message):
    right = dict(means=torch.zeros(2, 2), stds=torch.ones(2), weights=torch.ones(2))
    with pytest.raises(ValueError, match=f"{name} must.* {message}") as error:
        Mixture(**right | {name: torch.tensor(value)})
    assert "\n" not in str(error.value)


def test_points_of_another_dimension_are_named():
    with pytest.raises(ValueError, match=r"xt must be \(B, 2\), as means, got \(5, 1\)"):
        make_target("ring").score(torch.zeros(5, 1), 0.1)


@pytest.mark.parametrize("away, close", [(1000.0, 1e-3), (10_000.0, 0.02)])
def test_far_from_the_origin_numbers_are_those_at_the_origin(away, close):
    """Up to the rounding of the data to float32, of std 0.1 here and steps of 0.00006 and 0.001."""
    ring = make_target("ring")
    there = replace(ring, means=ring.means + away)
    x, y, z = (ring.sample(2000, rng(seed)) for seed in range(3))
    found = [metrics.mode_metrics(x, ring), metrics.mode_metrics(x + away, there)]
    assert found[0]["high_quality"] == pytest.approx(found[1]["high_quality"], abs=0.003)
    assert found[0]["modes_covered"] == found[1]["modes_covered"] == 8
    assert found[0]["mode_weight_error"] == pytest.approx(found[1]["mode_weight_error"], abs=0.002)
    energies = [metrics.energy_distance(x + shift, y + shift) for shift in (0.0, away)]
    assert energies[0] == pytest.approx(energies[1], rel=close)
    scores = ring.score(x, 0.1), there.score(x + away, 0.1)
    assert (scores[0] - scores[1]).norm() < close * scores[0].norm()
    densities = ring.log_density(x, 0.1), there.log_density(x + away, 0.1)
    assert (densities[0] - densities[1]).abs().mean() < close
    with pytest.warns(UserWarning, match="data of std 0.714, 1e.0[34] off 0"):
        assert there.data_std() == pytest.approx(ring.data_std(), rel=close)
    rows = []
    for law, shift in ((ring, 0.0), (there, away)):
        teacher, fake = replace(law, stds=1.2 * law.stds).denoiser, replace(law, stds=0.9 * law.stds).denoiser
        rows.append(metrics.score_diagnostics(1.1 * z + shift, law, teacher, fake, y[:256]))
    assert rows[1] == pytest.approx(rows[0], rel=close, abs=1e-4)


@pytest.mark.parametrize("scale, fits", [(1.0, True), (50.0, False), (0.01, False)])
def test_data_that_do_not_fit_the_noise_levels_are_warned_of(scale, fits, recwarn):
    ring = make_target("ring")
    std = replace(ring, means=scale * ring.means, stds=scale * ring.stds).data_std()
    assert std == pytest.approx(scale * ring.data_std()) and len(recwarn) == (not fits)


def test_far_away_the_denoiser_stays_finite():
    target = make_target("ring")
    x, sigma = torch.full((1, 2), 1e3), torch.tensor([0.01])
    assert target.denoiser(x, sigma).isfinite().all()


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    target = make_target(name)
    assert target.weights.sum().item() == pytest.approx(1, abs=1e-4)
    assert sorted(set(target.modes.tolist())) == list(range(int(target.modes.max()) + 1))
    x = target.sample(20_000, rng())
    assert x.std(0).square().mean().sqrt().item() == pytest.approx(target.data_std(), rel=0.03)
    assert x.abs().max() < plots.LIMIT + 0.4 and x.mean(0).abs().max() < 0.2, "fits the figures"
    found = metrics.mode_metrics(x, target)
    assert found["modes_covered"] == found["modes"] and found["high_quality"] > 0.98
    assert found["mode_weight_error"] < 0.03


def test_named_targets_are_as_described():
    ring, grid = make_target("ring"), make_target("grid")
    assert ring.means.shape == (8, 2) and ring.stds.unique().tolist() == pytest.approx([0.1])
    assert ring.means.norm(dim=1).tolist() == pytest.approx([1.0] * 8)
    assert grid.means.shape == (25, 2) and grid.stds.unique().tolist() == pytest.approx([0.05])
    assert torch.pdist(grid.means).min().item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="unknown target 'mnist'"):
        make_target("mnist")


# --- networks ------------------------------------------------------------------------------------


def test_preconditioning_at_initialisation():
    """F = 0: D is the best linear denoiser of data with std sigma_data."""
    x, sigma = torch.randn(6, 2), torch.tensor([0.01, 0.1, 0.5, 1.0, 10.0, 80.0])
    expected = 0.7**2 / (sigma[:, None] ** 2 + 0.7**2) * x
    assert (Denoiser(sigma_data=0.7)(x, sigma) - expected).abs().max() < 1e-6


def test_sigma_may_be_a_number():
    x, target = torch.randn(6, 2), make_target("ring")
    networks = Denoiser(), VPDenoiser(width=8), target.log_density, target.score, target.denoiser
    for of in (*networks, lambda _, sigma: vp_weight(sigma)):
        expected = of(x, torch.full((6,), 0.7))
        for sigma in (0.7, torch.tensor(0.7), torch.tensor([0.7]), torch.tensor([0.7] * 6).double()):
            assert (of(x, sigma) - expected).abs().max() <= 1e-6 * expected.abs().max()
    for of in networks:
        for xt, sigma, words in (x, x[:3, 0], r"\(6,\), got \(3,\)"), (x.int(), 0.7, "got torch.int32"):
            with pytest.raises(ValueError, match=f"must be .*{words}"):
                of(xt, sigma)


def test_the_denoiser_is_its_formula():
    network, x, sigma = Denoiser(width=8, sigma_data=0.7), torch.randn(6, 2), torch.rand(6) + 0.1
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5)
    s, level = sigma[:, None], sigma.log()[:, None] / 4
    angle, root = level * network.frequencies, (sigma[:, None] ** 2 + 0.7**2).sqrt()
    said, h = network.embed(torch.cat([level, angle.sin(), angle.cos()], 1)), x / root
    for i, layer in enumerate(network.layers):
        scale, shift = said[:, 16 * i : 16 * i + 8], said[:, 16 * i + 8 : 16 * i + 16]
        h = torch.nn.functional.silu((1 + scale) * layer(h) + shift)
    expected = 0.7**2 / root**2 * x + 0.7 * s / root * network.out(h)
    assert torch.allclose(network(x, sigma), expected, rtol=1e-4, atol=1e-5)


def test_generator_is_the_denoiser_at_sigma_init():
    network, z = Denoiser(), torch.randn(5, 2)
    torch.nn.init.normal_(network.out.weight)
    assert torch.allclose(Generator(network, 2.5)(z), network(2.5 * z, torch.full((5,), 2.5)), atol=1e-6)


def test_vp_process():
    abar = (1 - vp_betas()).cumprod(0)
    assert vp_sigmas()[0].item() == pytest.approx(0.0100005, rel=1e-4)
    assert vp_sigmas()[-1].item() == pytest.approx(157.407, rel=1e-4)
    drawn = vp_sigma(50_000, generator=rng())
    assert len(drawn.unique()) == 999 and drawn.min() == vp_sigmas()[1], "t runs over 1..T-1"
    t = torch.tensor([1, 300, 999])
    sigma = vp_sigmas()[t]
    # Listing 1: T g^2 |s_vp - grad log q|^2 with s_vp = sqrt(1 + sigma^2) s, s error = D error / sigma^2
    expected = 1000 * vp_betas()[t] / abar[t] / sigma.double() ** 4
    assert (vp_weight(sigma) / expected - 1).abs().max() < 1e-4


def test_vp_adapter_feeds_the_network_what_listing_1_does():
    network, t = VPDenoiser(width=8), torch.tensor([1, 42, 999])
    sigma, x0, noise = vp_sigmas()[t], torch.randn(3, 2), torch.randn(3, 2)
    abar = (1 - vp_betas()).cumprod(0).float()[t, None]
    x_vp = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    epsilon = network.epsilon(torch.cat([x_vp, t[:, None] / 1000], 1))
    xt = sim.add_noise(x0, sigma, noise)
    assert (network(xt, sigma) - (xt - sigma[:, None] * epsilon)).abs().max() < 1e-4


def test_a_velocity_network_is_a_denoiser():
    """Of the exact velocity E[noise - x0 | x_t] on the straight path, the exact denoiser; in float64."""
    target, network = make_target("grid"), FlowDenoiser(width=8)
    exact = Mixture(target.means.double(), target.stds.double(), target.weights.double())
    sigma = torch.logspace(-3, 3, 40, dtype=torch.float64)
    xt = sim.add_noise(exact.sample(40), sigma, torch.randn(40, 2, dtype=torch.float64))

    def velocity(given):
        x_t, t = given[:, :2], given[:, 2]
        x0 = exact.denoiser(x_t / (1 - t[:, None]), t / (1 - t))
        return (x_t - (1 - t[:, None]) * x0) / t[:, None] - x0

    network.velocity.forward = velocity
    assert (network(xt, sigma) - exact.denoiser(xt, sigma)).abs().max() < 1e-9
    x0, noise = torch.randn(2, 40, 2, dtype=torch.float64)
    t = (sigma / (1 + sigma))[:, None]
    x_t = (1 - t) * x0 + t * noise
    network.velocity.forward = lambda given: noise - x0 if torch.allclose(given[:, :2], x_t) else 0
    assert (network(sim.add_noise(x0, sigma, noise), sigma) - x0).abs().max() < 1e-9


def test_levels_and_weight_of_a_flow():
    sigma = flow_sigma(100_000, generator=rng())
    t = sigma / (1 + sigma)
    assert t.min() > 0.0009 and t.max() < 0.9991 and abs(t.mean() - 0.5) < 0.005
    assert flow_weight(1.0) == 4.0  # D - x0 = -t (v - v'), t = 1/2
    logit = torch.sigmoid(0.3 + 0.7 * torch.randn(100_000, generator=rng()))  # logit-normal t
    same = sim.lognormal_sigma(100_000, mean=0.3, std=0.7, generator=rng(), dtype=torch.float32)
    assert (logit / (1 - logit) / same - 1).abs().max() < 1e-4


def test_heun_follows_the_flow_of_a_gaussian():
    """x(0) = z sigma_max s / sqrt(s^2 + sigma_max^2) for N(0, s^2); Euler's rule is off by 7 %."""
    z = torch.randn(100, 2, generator=rng())
    x = heun(equal_mixture(torch.zeros(1, 2), 0.5).denoiser, z)
    assert (x / z - 80 * 0.5 / math.hypot(80, 0.5)).abs().max() < 0.005


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_heun_counts_its_evaluations_and_one_step_ends_at_the_denoised(steps):
    z, calls, target = torch.randn(6, 2, generator=rng()), [], make_target("ring")
    x = heun(lambda x, sigma: calls.append(1) or target.denoiser(x, sigma), z, steps)
    assert len(calls) == 2 * steps - 1
    if steps == 1:
        assert (x - target.denoiser(80 * z, 80.0)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        heun(target.denoiser, z, 0)


def test_heun_with_the_exact_denoiser_samples_the_target():
    target = make_target("ring")
    x = heun(target.denoiser, torch.randn(4000, 2, generator=rng()))
    data = target.sample(4000, rng(1))
    floor = metrics.energy_floor(4000, 4000, metrics.mean_distance(data, data))
    assert metrics.energy_distance(x, data) < 3 * floor


# --- metrics -------------------------------------------------------------------------------------


def test_energy_distance_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
    # 2 * (3 + 2) / 2 - (0 + 1 + 1 + 0) / 4 - 0
    assert metrics.energy_distance(x, y) == pytest.approx(4.5)
    assert metrics.energy_distance(x, x) == pytest.approx(0, abs=1e-12)


def test_energy_floor_is_the_mean_over_data_sets():
    target, generator = make_target("ring"), rng()
    pairs = [[target.sample(200, generator) for _ in range(2)] for _ in range(400)]
    mean = sum(metrics.energy_distance(x, y) for x, y in pairs) / len(pairs)
    within = sum(metrics.mean_distance(x, x) for x, _ in pairs) / len(pairs)
    assert metrics.energy_floor(200, 200, within) == pytest.approx(mean, rel=0.1)
    assert metrics.energy_floor(4, 2, within=0.5) == pytest.approx((1 / 4 + 1 / 2) * 0.5 * 2)


def test_energy_distance_grows_with_the_error():
    target = make_target("ring")
    x, y = target.sample(2000, rng()), target.sample(2000, rng(1))
    distances = [metrics.energy_distance(x + shift, y) for shift in (0.0, 0.1, 0.3)]
    assert distances == sorted(distances) and distances[2] > 20 * distances[0]


def test_mode_metrics_see_lost_blurred_and_unbalanced_modes():
    target = make_target("ring")
    perfect = metrics.mode_metrics(target.sample(20_000, rng()), target)
    assert perfect["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.003)
    one_mode = target.means[:1] + 0.1 * torch.randn(1000, 2, generator=rng())
    lost = metrics.mode_metrics(one_mode, target)
    assert lost["modes_covered"] == 1 and lost["mode_weight_error"] == pytest.approx(7 / 8)
    off = 1.35 * target.means[1:2].repeat(10, 1)  # by 3.5 std
    bad = metrics.mode_metrics(torch.cat([target.means[:1].repeat(100, 1), off]), target)
    assert bad["modes_covered"] == 1 and bad["high_quality"] == pytest.approx(100 / 110)
    few = torch.cat([target.means[:1].repeat(199, 1), target.means[1:2]])  # a 25th of its weight: not covered
    assert metrics.mode_metrics(few, target)["modes_covered"] == 1
    blurred = metrics.mode_metrics(torch.randn(5000, 2, generator=rng()), target)
    assert blurred["high_quality"] < 0.6


def test_score_diagnostics_against_closed_forms():
    """Bank from N(0, 0.5^2), target N(0.3, 0.5^2): the score gap is 0.3 / (0.25 + sigma^2) everywhere."""
    bank = 0.5 * torch.randn(4000, 2, generator=rng())
    target = equal_mixture(torch.tensor([[0.3, 0.0]]), 0.5)
    fake = equal_mixture(torch.tensor([[0.0, 0.0]]), 0.5).denoiser  # a perfect online network
    teacher = equal_mixture(torch.tensor([[0.0, 0.2]]), 0.5).denoiser  # a wrong teacher
    noise = torch.randn(2000, 2, generator=rng(1))
    out = metrics.score_diagnostics(bank, target, teacher, fake, noise)
    other = metrics.score_diagnostics(bank, target, teacher, teacher, noise)
    assert all(other[k] == value for k, value in out.items() if "divergence" in k)
    for s in (0.5, 1.0):
        total = 0.25 + s**2
        assert out[f"divergence_{s:g}"] == pytest.approx((0.3 * s / total) ** 2, rel=0.25)
        assert out[f"gap_{s:g}"] == pytest.approx((0.2 * s / total) ** 2, rel=1e-3)
        assert out[f"fake_error_{s:g}"] < 0.1 * out[f"divergence_{s:g}"]


# --- figures -------------------------------------------------------------------------------------


def test_limits_are_fixed_and_equal():
    scene_figure = plots.Figure()
    data, field = torch.randn(50, 2), torch.zeros(len(plots.field_points()), 2)
    scene = plots.Scene(scene_figure, data, field, 1e-3, 100)
    scene.draw({"step": 3, "samples": data, "field": field}, [{"step": 3, "energy_distance": 0.1}])
    for ax in scene_figure.axes[:2]:
        assert ax.get_xlim() == ax.get_ylim() == (-plots.LIMIT, plots.LIMIT) and ax.get_aspect() == 1
    assert scene.samples.get_offsets().shape == (50, 2)


def test_the_live_window_draws():
    import matplotlib

    matplotlib.use("Agg")
    data, field = torch.randn(50, 2), torch.zeros(len(plots.field_points()), 2)
    window = plots.Window(data, field, 1e-3, 100)
    window.draw({"step": 3, "samples": data, "field": field}, [{"step": 3, "energy_distance": 0.1}])
    assert window.scene.title.get_text() == "step 3"
    window.pyplot.close("all")


def test_the_movie_moves(tmp_path):
    from PIL import Image, ImageChops

    field = torch.zeros(len(plots.field_points()), 2)
    snapshots = [{"step": i, "samples": torch.full((20, 2), i / 2), "field": field + i / 9} for i in range(3)]
    history = [{"step": i, "energy_distance": 10.0**-i} for i in range(3)]
    plots.convergence_gif(tmp_path / "a.gif", snapshots, history, (torch.randn(50, 2), field, 1e-3, 2))
    with Image.open(tmp_path / "a.gif") as movie:
        frames = []
        for i in range(movie.n_frames):
            movie.seek(i)
            frames.append(movie.convert("RGB"))
    assert len(frames) == 3
    for one, other in zip(frames, frames[1:]):  # every panel changes
        left, _, right, _ = ImageChops.difference(one, other).getbbox()
        assert left < one.width / 3 and right > 2 * one.width / 3
