"""sim_core's distances, scores and losses against closed forms and autograd."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sim_core as sim

SMOOTH = [sim.SquaredL2(), *map(sim.Power, (4, 6)), sim.Exp(2, 0.3), sim.Exp(4, 0.05), sim.PseudoHuber(0.3)]
KINKED = [sim.L1(), sim.Huber(0.5)]
shapes = st.tuples(st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3)).map(lambda s: (s[0], *s[1]))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def away_from_kinks(distance, y):
    kinks = {sim.L1: [0.0], sim.Huber: [-0.5, 0.5]}.get(type(distance), [])
    return all((y - k).abs().min() > 1e-4 for k in kinks)


# --- Table 4 -------------------------------------------------------------------------------------

# d and d' of one vector, written again from the table with plain floats.
BY_HAND = {
    "l2": (lambda y: sum(v * v for v in y), lambda y: [2 * v for v in y]),
    "power": (lambda y: sum(v**4 for v in y), lambda y: [4 * v**3 for v in y]),
    "exp": (
        lambda y: math.exp(0.3 * sum(v * v for v in y)) - 1,
        lambda y: [2 * 0.3 * math.exp(0.3 * sum(w * w for w in y)) * v for v in y],
    ),
    "l1": (lambda y: sum(map(abs, y)), lambda y: [math.copysign(1, v) for v in y]),
    "huber": (
        lambda y: sum(v * v / 2 if abs(v) <= 0.5 else 0.5 * (abs(v) - 0.25) for v in y),
        lambda y: [max(-0.5, min(0.5, v)) for v in y],
    ),
    "pseudo_huber": (
        lambda y: math.sqrt(sum(v * v for v in y) + 0.1**2) - 0.1,
        lambda y: [v / math.sqrt(sum(w * w for w in y) + 0.1**2) for v in y],
    ),
}


@pytest.mark.parametrize("name", sim.DISTANCES)
def test_distances_are_those_of_table_4(name):
    distance, y = sim.make_distance(name), [0.3, -0.7, 1.1]
    tensor = torch.tensor([y, [-v for v in y]], dtype=torch.float64)
    value, grad = BY_HAND[name]
    assert distance.value(tensor).tolist() == pytest.approx([value(y)] * 2, rel=1e-12)
    assert distance.grad(tensor)[0].tolist() == pytest.approx(grad(y), rel=1e-12)
    assert torch.equal(distance.grad(tensor)[1], -distance.grad(tensor)[0]), "d' must be odd"


@settings(deadline=None, max_examples=40)
@given(shape=shapes, seed=st.integers(0, 99), distance=st.sampled_from(SMOOTH + KINKED))
def test_grad_is_the_derivative_of_value(shape, seed, distance):
    y = randn(*shape, seed=seed).requires_grad_()
    if not away_from_kinks(distance, y):
        return
    value = distance.value(y)
    assert value.shape == shape[:1]
    (expected,) = torch.autograd.grad(value.sum(), y)
    assert distance.grad(y).shape == shape
    assert (distance.grad(y) - expected).abs().max() < 1e-12 * (1 + expected.abs().max())


@pytest.mark.parametrize("distance", SMOOTH + KINKED, ids=repr)
def test_gradcheck_of_distances(distance):
    y = randn(3, 2, 2, seed=3).requires_grad_()
    assert away_from_kinks(distance, y)
    assert torch.autograd.gradcheck(distance.value, y)
    assert torch.autograd.gradcheck(distance.grad, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("c", [1e-30, 1e-3, 0.05])
def test_pseudo_huber_at_zero(dtype, c):
    y = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    distance = sim.PseudoHuber(c)
    assert distance.value(y).tolist() == [0, 0] and not distance.grad(y).any()
    (second,) = torch.autograd.grad(distance.grad(y).sum(), y)
    assert second.isfinite().all()


def test_pseudo_huber_limits():
    y = randn(5, 3)
    unit = y / y.norm(dim=1, keepdim=True)
    assert (sim.PseudoHuber(1e-9).grad(y) - unit).abs().max() < 1e-12
    assert (1e6 * sim.PseudoHuber(1e6).grad(y) - y).abs().max() < 1e-9
    small = torch.full((1, 1), 1e-6)
    assert sim.PseudoHuber(0.1).value(small).item() == pytest.approx(1e-12 / 0.2, rel=1e-5), "cancellation"


def test_exp_overflows_as_documented():
    assert sim.Exp().value(torch.tensor([[20.0, 0.0]])).isinf().all()
    grad = sim.Exp().grad(torch.tensor([[20.0, 0.0]]))
    assert grad[0, 0].isinf() and grad[0, 1].isnan()


@pytest.mark.parametrize(
    "make, message",
    [
        (partial(sim.Power, alpha=3), "alpha.*3"),
        (partial(sim.Power, alpha=0), "alpha.*0"),
        (partial(sim.Exp, alpha=5), "alpha.*5"),
        (partial(sim.Exp, beta=-1.0), "beta.*-1"),
        (partial(sim.Huber, delta=0.0), "delta.*0"),
        (partial(sim.PseudoHuber, c=-0.1), "c must.*-0.1"),
        (partial(sim.make_distance, "lpips"), "unknown distance 'lpips'"),
        (partial(sim.make_distance, "l2", c=0.1), "l2.*c"),
    ],
)
def test_bad_distances_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- scores --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    seed=st.integers(0, 99),
    sigma=st.floats(1e-3, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_tweedie_round_trip(shape, seed, sigma, dtype):
    x0, noise, denoised = (randn(*shape, seed=seed + i, dtype=dtype) for i in range(3))
    sigma = torch.full(shape[:1], sigma, dtype=dtype)
    xt = sim.add_noise(x0, sigma, noise)
    back = sim.denoised_from_score(sim.score_from_denoised(denoised, xt, sigma), xt, sigma)
    tolerance = 20 * torch.finfo(dtype).eps * xt.abs().max().clamp_min(1)
    assert back.dtype == dtype and (back - denoised).abs().max() < tolerance
    wide = sigma.view(-1, *[1] * (len(shape) - 1))
    assert ((sim.conditional_score(xt, x0, sigma) + noise / wide) * wide**2).abs().max() < tolerance


def test_conditional_score_is_the_gradient_of_the_normal_density():
    x0, sigma = randn(4, 3), torch.tensor([0.1, 0.5, 1.0, 7.0], dtype=torch.float64)
    xt = randn(4, 3, seed=1).requires_grad_()
    log_q = torch.distributions.Normal(x0, sigma[:, None].expand_as(x0)).log_prob(xt).sum()
    (expected,) = torch.autograd.grad(log_q, xt)
    assert (sim.conditional_score(xt, x0, sigma) - expected).abs().max() < 1e-12


# --- losses on tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("distance", SMOOTH, ids=repr)
def test_sim_loss_value_and_every_gradient(distance):
    fake, teacher, target = (randn(3, 2, seed=i).requires_grad_() for i in range(3))
    by_hand = -(distance.grad(fake - teacher) * (fake - target)).sum(1)
    assert torch.equal(sim.sim_loss(fake, teacher, target, distance), by_hand)
    assert torch.autograd.gradcheck(partial(sim.sim_loss, distance=distance), (fake, teacher, target))


def test_the_surrogate_by_hand():
    """y = 0.4, residual 0.5: squared L2 gives -2 * 0.4 * 0.5, and the sign matters."""
    fake, teacher, target = torch.tensor([[1.0]]), torch.tensor([[0.6]]), torch.tensor([[0.5]])
    assert sim.sim_loss(fake, teacher, target, "l2").item() == pytest.approx(-0.4)
    assert sim.sim_loss(fake, teacher, target, "l1").item() == pytest.approx(-0.5)
    assert sim.sid_loss(fake, teacher, target, alpha=1.0).item() == pytest.approx(-0.2)
    assert sim.sid_loss(fake, teacher, target, alpha=1.2).item() == pytest.approx(-0.2 - 0.2 * 0.16)
    assert sim.diff_instruct_loss(fake, teacher, target).item() == pytest.approx(0.4 * 0.5)
    assert sim.denoising_loss(fake, target, 3.0).item() == pytest.approx(0.75)
    assert sim.score_projection(fake, teacher, target).item() == pytest.approx(0.1)


def test_neighbours():
    """SiD and the full gradient from SIM and ||y||^2: alpha = 1 is half of the one, 1/2 half of the other."""
    fake, teacher, target = (randn(5, 3, seed=i).requires_grad_() for i in range(3))
    half, full = (loss(fake, teacher, target, "l2") / 2 for loss in (sim.sim_loss, sim.full_loss))
    square = (fake - teacher).square().sum(1)
    for alpha in (0.5, 1.0, 1.2):
        assert (sim.sid_loss(fake, teacher, target, alpha) - half - (1 - alpha) * square).abs().max() < 1e-12
    assert (sim.sid_loss(fake, teacher, target, 0.5) - full).abs().max() < 1e-12
    assert torch.equal(sim.sid_loss(fake, teacher, target), sim.sid_loss(fake, teacher, target, 1.2))
    sim.diff_instruct_loss(fake, teacher, target).sum().backward()
    assert fake.grad is None and teacher.grad is None
    assert torch.equal(target.grad, (fake - teacher).detach())


@pytest.mark.parametrize("distance", SMOOTH, ids=repr)
def test_full_loss_adds_the_distance(distance):
    triple = [randn(3, 2, seed=i).requires_grad_() for i in range(3)]
    added = sim.full_loss(*triple, distance) - sim.sim_loss(*triple, distance)
    assert (added - distance.value(triple[0] - triple[1])).abs().max() < 1e-12
    assert torch.autograd.gradcheck(partial(sim.full_loss, distance=distance), triple)


# --- losses on networks --------------------------------------------------------------------------


def affine(scale, shift):
    return lambda xt, sigma: scale * xt + shift * sigma.view(-1, *[1] * (xt.ndim - 1))


def batch(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(*shape, generator=rng, dtype=torch.float64) for _ in range(2))
    return (x0.requires_grad_(), torch.rand(shape[0], generator=rng, dtype=torch.float64) + 0.3, noise)


@settings(deadline=None, max_examples=30)
@given(shape=shapes, seed=st.integers(0, 99), distance=st.sampled_from(SMOOTH))
def test_generator_loss_is_sim_loss_in_each_space(shape, seed, distance):
    x0, sigma, noise = batch(*shape, seed=seed)
    teacher, fake = affine(0.7, 0.1), affine(0.5, -0.2)
    xt = sim.add_noise(x0, sigma, noise)
    wide = sigma.view(-1, *[1] * (len(shape) - 1))
    d = {"fake": fake(xt, sigma), "teacher": teacher(xt, sigma)}
    in_space = {
        "denoised": (d["fake"], d["teacher"], x0),
        "noise": ((xt - d["fake"]) / wide, (xt - d["teacher"]) / wide, noise),
        "score": tuple(sim.score_from_denoised(v, xt, sigma) for v in (d["fake"], d["teacher"], x0)),
    }
    for space, tensors in in_space.items():
        for got, want in zip(sim.predictions(teacher, fake, x0, sigma, noise, space), tensors):
            assert (got - want).abs().max() < 1e-10 * (1 + want.abs().max())
        expected = sim.sim_loss(*tensors, distance)
        loss = sim.generator_loss(teacher, fake, x0, sigma, noise, distance, space)
        assert loss.shape == shape[:1]
        assert ((loss - expected).abs() / (1 + expected.abs())).max() < 1e-10
        got, want = (torch.autograd.grad(v.sum(), x0, retain_graph=True)[0] for v in (loss, expected))
        assert (got - want).abs().max() < 1e-9 * (1 + want.abs().max())


@pytest.mark.parametrize("form", [sim.generator_loss, sim.density_loss])
def test_gradient_of_the_generator_loss_on_gaussians(form):
    """x0 ~ N(m, v), teacher N(0, v): E d of the score gap is (m/s)^2, s = v + sigma^2; d/dm = 2m/s^2."""
    m, v, sigma, n = 0.8, 0.5, 0.6, 400_000
    s, rng = v + sigma**2, torch.Generator().manual_seed(0)
    mean = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    x0 = mean + math.sqrt(v) * torch.randn(n, 1, generator=rng, dtype=torch.float64)
    noise = torch.randn(n, 1, generator=rng, dtype=torch.float64)
    sigmas = torch.full((n,), sigma, dtype=torch.float64)

    def denoiser(centre):
        return lambda xt, sigma: xt + sigma[:, None] ** 2 * (centre - xt) / s

    loss = form(denoiser(0.0), denoiser(m), x0, sigmas, noise, "l2", "score")
    (grad,) = torch.autograd.grad(loss.mean(), mean)
    assert grad.item() == pytest.approx(2 * m / s**2, rel=0.03)


def test_gradient_flows_through_xt_and_both_networks():
    x0, sigma, noise = batch(6, 2)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sim.generator_loss(affine(scale, 0.1), affine(0.5, -0.2), x0, sigma, noise, "l2").sum().backward()
    assert scale.grad.abs() > 0, "the core freezes nothing by itself"
    networks = affine(scale, 0.1), affine(scale, 0)
    assert not sim.density_loss(*networks, x0.detach(), sigma, noise, "l2").requires_grad
    full = x0.grad.clone()
    # by hand: y = (0.5 - 0.7) xt - 0.3 s, residual = -0.5 x0 + 0.5 s n - 0.2 s; dy/dx0 = -0.2, dr/dx0 = -0.5
    s, xt = sigma[:, None], (x0 + sigma[:, None] * noise).detach()
    y, residual = -0.2 * xt - 0.3 * s, 0.5 * xt - 0.2 * s - x0.detach()
    assert (full - -2 * (-0.2 * residual + -0.5 * y)).abs().max() < 1e-12


def test_fake_loss_never_reaches_the_generator():
    x0, sigma, noise = batch(6, 2)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = sim.fake_loss(affine(scale, 0.1), x0, sigma, noise, sim.edm_weight(sigma))
    error = 0.7 * (x0 + sigma[:, None] * noise) + 0.1 * sigma[:, None] - x0
    expected = sim.edm_weight(sigma) * error.square().sum(1)
    assert (loss - expected).abs().max() < 1e-12
    loss.sum().backward()
    assert x0.grad is None and scale.grad.abs() > 0


def test_denoising_loss_is_least_at_the_true_denoiser():
    """For x0 ~ N(0, 1) the best linear denoiser is xt / (1 + sigma^2) (B.2, B.3)."""
    x0, noise = (randn(100_000, 1, seed=seed) for seed in (0, 1))
    sigma = torch.full((100_000,), 0.7, dtype=torch.float64)
    scale = torch.tensor(1 / 1.49, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(sim.fake_loss(lambda x, s: scale * x, x0, sigma, noise).mean(), scale)
    assert abs(grad) < 0.02


def test_conditions_reach_both_networks():
    x0, sigma, noise = batch(4, 2)
    seen = []

    def network(xt, sigma, labels):
        seen.append(labels)
        return xt * labels[:, None]

    labels = torch.tensor([1, 0, 2, 3])
    sim.generator_loss(network, network, x0, sigma, noise, "l2", labels=labels)
    sim.fake_loss(network, x0, sigma, noise, labels=labels)
    sim.density_loss(network, network, x0, sigma, noise, "l2", labels=labels)
    assert len(seen) == 5 and all(s is labels for s in seen)


def test_weights_and_weightings():
    x0, sigma, noise = batch(5, 3)
    networks = affine(0.7, 0.1), affine(0.5, -0.2)
    loss = partial(sim.generator_loss, *networks, x0, sigma, noise, "l2")
    plain = loss()
    assert torch.equal(loss(weight=3.0), 3 * plain) and torch.equal(loss(weight=sigma), sigma * plain)
    mean_error = (x0 - networks[0](sim.add_noise(x0, sigma, noise), sigma)).abs().mean(1)
    noises = sim.predictions(*networks, x0, sigma, noise, "noise")
    for space in sim.SPACES:  # w_SiD and the noise's weight squared L2 alike in all
        triple = sim.predictions(*networks, x0, sigma, noise, space)
        weight = {name: of(triple, sigma, space, 0.8) for name, of in sim.WEIGHTINGS.items()}
        assert (weight["sid"] * loss(space) - plain / mean_error).abs().max() < 1e-10
        assert (weight["noise"] * loss(space) - sim.sim_loss(*noises, "l2")).abs().max() < 1e-10
        assert weight["one"] == 1 and torch.equal(weight["edm"], sim.edm_weight(sigma, 0.8))
        assert not weight["sid"].requires_grad


@pytest.mark.parametrize("name", sim.DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_follows_the_inputs(name, dtype):
    x0, noise = randn(4, 3, 2).to(dtype), randn(4, 3, 2, seed=1).to(dtype)
    sigma = torch.rand(4) + 0.5  # float32 whatever the data
    net = lambda xt, sigma: 0.5 * xt
    for space in sim.SPACES:
        assert sim.generator_loss(net, lambda x, s: 0.3 * x, x0, sigma, noise, name, space).dtype == dtype
        assert sim.density_loss(net, lambda x, s: 0.3 * x, x0, sigma, noise, name, space).dtype == dtype
    assert sim.fake_loss(net, x0, sigma, noise, sim.edm_weight(sigma)).dtype == dtype
    assert sim.score_from_denoised(x0, noise, sigma).dtype == dtype


def test_empty_and_one_dimensional_batches():
    for shape in ((0, 3), (4,)):
        loss = sim.generator_loss(affine(0.7, 0.1), affine(0.5, 0.1), *batch(*shape), "pseudo_huber")
        assert loss.shape == shape[:1]


@pytest.mark.parametrize("name", sim.DISTANCES)
def test_under_torch_func(name):
    x0, sigma, noise = batch(4, 3)

    def one(x0, sigma, noise):
        net = affine(0.7, 0.1), affine(0.5, -0.2)
        return sim.generator_loss(*net, x0[None], sigma[None], noise[None], name)[0]

    per_sample = torch.func.vmap(torch.func.grad(one))(x0.detach(), sigma, noise)
    loss = sim.generator_loss(affine(0.7, 0.1), affine(0.5, -0.2), x0, sigma, noise, name)
    (expected,) = torch.autograd.grad(loss.sum(), x0)
    assert (per_sample - expected).abs().max() < 1e-12


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 cannot compile isinstance of a union"
)
@pytest.mark.parametrize("name", sim.DISTANCES)
def test_under_torch_compile(name):
    x0, sigma, noise = batch(4, 3)
    teacher, fake = affine(0.7, 0.1), affine(0.5, -0.2)

    def loss(x0, sigma, noise):
        triple = sim.predictions(teacher, fake, x0, sigma, noise, "score")
        return sim.weigh(sim.full_loss(*triple, name), sim.WEIGHTINGS["sid"](triple, sigma, "score", 0.5))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert (compiled(x0, sigma, noise) - loss(x0, sigma, noise)).abs().max() < 1e-12
