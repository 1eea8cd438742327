"""What the exercises are compared with: `probe(answer)` and the truth, in `toy/exercises.py` side by side.

Everything is float64, in the test bed of `toy/test_bed.py`.  A value is compared sample by sample, at noise
levels from 0.2 to 2; a gradient, over all parameters of the generator, in quadrature at the bed's one level,
and wherever it can be with the left side of the theorem, which knows nothing of the formula asked for.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import sim_core as sim
from toy.classroom import bounded
from toy.marking import Wrong, wanted
from toy.networks import Denoiser, Generator
from toy.test_bed import TestBed

BED, NODES = TestBed(seed=0), 56  # nodes per axis: the gradients asked for converge to 1e-9
DISTANCE, L2 = sim.PseudoHuber(c=0.8), sim.SquaredL2()  # a c whose square is another number
DIRECTION = torch.tensor([1.0, -0.5], dtype=torch.float64)  # along which a vector's gradient is taken


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def draws(seed=1, n=64) -> tuple[Tensor, Tensor, Tensor]:
    """Which latent, noise, level: at random."""
    rng = torch.Generator().manual_seed(seed)
    how = dict(generator=rng, dtype=torch.float64)
    return (
        torch.randint(len(BED.z), (n,), generator=rng),
        torch.randn(n, 2, **how),
        0.2 * 10 ** torch.rand(n, **how),
    )


def generated() -> Tensor:
    """The bed's points g_theta(z_k), a leaf."""
    return BED.net(BED.z).detach().requires_grad_()


def fake_of(means: Tensor) -> Any:
    return BED.law(means.detach())  # sg: s_sg[theta]


def losses(integrand: Callable) -> dict[str, Tensor]:
    """Value and gradient of one number a sample, integrand(x0, noise, sigma, means)."""

    def checked(x0, noise, sigma, means):
        loss = wanted(
            integrand(x0, noise.clone(), sigma.clone(), means), len(x0)
        )  # copies: answers may write
        return loss + 0 * means.sum()  # in case it is cut off

    means, (k, noise, sigma) = generated(), draws()
    value = checked(means[k], noise, sigma, means).detach()
    return {"value": value, "gradient": BED.gradient(checked, NODES)}


def vectors(integrand: Callable) -> dict[str, Tensor]:
    """The same of one vector a sample."""
    along = lambda *drawn: wanted(integrand(*drawn), len(drawn[0]), 2) @ DIRECTION
    means, (k, noise, sigma) = generated(), draws()
    value = wanted(integrand(means[k], noise, sigma, means), len(k), 2).detach()
    return {"value": value, "gradient": losses(along)["gradient"]}


# --- Scores.
def tweedie(answer: Callable) -> dict[str, Tensor]:
    def integrand(x0, noise, sigma, means):
        xt = sim.add_noise(x0, sigma, noise)
        return answer(fake_of(means).denoiser(xt, sigma), xt, sigma)

    return vectors(integrand)


def true_score() -> dict[str, Tensor]:
    return vectors(lambda x0, noise, sigma, means: fake_of(means).score(x0 + sigma[:, None] * noise, sigma))


def conditional(answer: Callable) -> dict[str, Tensor]:
    """Where xt stands still: along the path it is -noise / sigma, without a gradient."""
    return vectors(
        lambda x0, noise, sigma, means: answer(sim.add_noise(x0, sigma, noise).detach(), x0, sigma)
    )


def slope_of_log_q(xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    xt = xt.clone().requires_grad_()
    log_q = -dot(xt - x0, xt - x0) / (2 * sigma**2)
    return torch.autograd.grad(log_q.sum(), xt, create_graph=True)[0]


# --- (A.1).
@cache
def all_samples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The quadrature as one batch: x0, noise, sigma, and how often each sample is to count."""
    parts = zip(*BED.quadrature(generated().detach(), 40))
    weight, *drawn = (torch.cat(part) for part in parts)
    return *drawn, (len(weight) * weight)[:, None]


def field(xt: Tensor) -> Tensor:
    return torch.stack([xt[:, 0].sin() + xt[:, 1], (xt[:, 0] * xt[:, 1]).cos()], 1)


def scores_at(xt: Tensor, sigma: float | Tensor) -> list[Tensor]:
    """The right score, and that of a law which is 0.2 away."""
    means = generated().detach()
    return [BED.law(each).score(xt, sigma) for each in (means, means + DIRECTION / 5)]


def projection(answer: Callable) -> dict[str, Tensor]:
    """With the right and a wrong score, for fields u that take the quadrature's weights along."""
    x0, noise, sigma, count = all_samples()
    right, wrong = (lambda xt, sigma, i=i: scores_at(xt, sigma)[i] for i in (0, 1))
    gap = lambda xt: wrong(xt, sigma) - right(xt, sigma)
    values = []
    for u, score in ((field, right), (gap, wrong), (field, wrong)):
        mean = answer(lambda xt, u=u: count * u(xt), score, x0.clone(), sigma.clone(), noise.clone())
        mean = torch.tensor(mean, dtype=torch.float64) if isinstance(mean, float) else mean
        values.append(wanted(mean).detach())
    return {"value": torch.stack(values)}


def what_a_wrong_score_leaves() -> dict[str, Tensor]:
    """0, then E u^T (wrong - right)."""
    x0, noise, sigma, count = all_samples()
    xt = sim.add_noise(x0, sigma, noise)
    right, wrong = scores_at(xt, sigma)
    left = [(count * u * (wrong - right)).sum(1).mean() for u in (wrong - right, field(xt))]
    return {"value": torch.stack([0 * left[0], *left])}


# --- Table 4.
def row_of_table_4(distance: sim.Distance, answer: Callable) -> dict[str, Tensor]:
    """d' and its own derivative, at random y."""
    y = (0.8 * draws(2)[1]).requires_grad_()
    value = wanted(answer(y, *vars(distance).values()), len(y), 2)
    slope = torch.autograd.grad(((value + 0 * y) @ DIRECTION).sum(), y)[0]
    return {"value": value.detach(), "derivative": slope}


def row_by_autograd(distance: sim.Distance) -> dict[str, Tensor]:
    slope = lambda y, *_: torch.autograd.grad(distance.value(y).sum(), y, create_graph=True)[0]
    return row_of_table_4(distance, slope)


# --- Losses: the surrogate and the full one, on the triple in denoised space; where the stop is, on scores.
def on_triple(functions: Sequence[Callable], answer: Callable) -> dict[str, Tensor]:
    def integrand(x0, noise, sigma, means):
        fake = fake_of(means).denoiser
        return answer(*functions, *sim.predictions(BED.teacher.denoiser, fake, x0, sigma, noise))

    return losses(integrand)


def left_side(distance: sim.Distance, space: str, law_moves=False) -> Tensor:
    return BED.gradient(BED.objective(distance, space, law_moves), NODES)


def true_loss(loss: Callable, law_moves=False) -> dict[str, Tensor]:
    """The value of sim_core's formula; the gradient of the objective itself, which is another matter."""
    values = on_triple((), partial(loss, distance=DISTANCE))
    return values | {"gradient": left_side(DISTANCE, "denoised", law_moves)}


def printed(answer: Callable) -> dict[str, Tensor]:
    def integrand(x0, noise, sigma, means):
        xt = sim.add_noise(x0, sigma, noise)
        scores = [law.score(xt, sigma) for law in (fake_of(means), BED.law(means), BED.teacher)]
        return answer(L2.grad, *scores, sim.conditional_score(xt, x0, sigma))

    return losses(integrand)


def nothing_trains() -> dict[str, Tensor]:
    weights = sum(p.numel() for p in BED.net.parameters())
    return losses(BED.surrogate(L2)) | {"gradient": torch.zeros(weights, dtype=torch.float64)}


def stopping(answer: Callable) -> dict[str, Tensor]:
    """The score; and the gradient of the surrogate that is made with it."""

    def score(x0, noise, sigma, means):
        return answer(BED.law, means, sim.add_noise(x0, sigma, noise), sigma)

    def surrogate(x0, noise, sigma, means):
        xt, s = sim.add_noise(x0, sigma, noise), wanted(score(x0, noise, sigma, means), len(x0), 2)
        u = L2.grad(s - BED.teacher.score(xt, sigma))
        return -sim.score_projection(u, s, sim.conditional_score(xt, x0, sigma))

    return {"value": vectors(score)["value"], "gradient": losses(surrogate)["gradient"]}


def alphas(answer: Callable) -> dict[str, Tensor]:
    """Gradients of SiD's loss at the two."""
    pair = answer()
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise Wrong(f"it returns {pair}; two numbers are wanted, SIM's alpha and the full gradient's")
    sid = [partial(sim.sid_loss, alpha=float(alpha)) for alpha in pair]
    return dict(zip(("first", "second"), (BED.gradient(BED.on_triple(loss), NODES) for loss in sid)))


# --- What Algorithm 2 draws and weighs.
def levels(answer: Callable) -> dict[str, Tensor]:
    """Quantiles of many draws, on a scale that takes what is not positive."""
    quantiles, at = [], torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    for mean, std in ((-1.2, 1.2), (-3.5, 2.5)):
        first, again = (answer(100_000, mean, std, torch.Generator().manual_seed(0)) for _ in range(2))
        sigma = wanted(first, 100_000, dtype=getattr(first, "dtype", None))
        if not torch.equal(first, again):
            raise Wrong("the same seed gives other levels: rng is not used")
        found = sigma.float().quantile(at)
        quantiles.append(found.sign() * (1 + 1e4 * found.abs()).log())
    return {"value": torch.cat(quantiles)}


def normal_quantiles() -> dict[str, Tensor]:
    s = torch.special.ndtri(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    return {
        "value": torch.cat(
            [(1 + 1e4 * (mean + std * s).exp()).log() for mean, std in ((-1.2, 1.2), (-3.5, 2.5))]
        )
    }


def weights(answer: Callable) -> dict[str, Tensor]:
    sigma = draws()[2]
    return {"value": torch.cat([wanted(answer(sigma, sigma_data), len(sigma)) for sigma_data in (0.5, 2.0)])}


# --- The two updates.
def learning(answer: Callable) -> dict[str, Tensor]:
    """psi is the exact denoiser plus a linear error A xt + b: value, gradients of (A, b) and of theta."""
    psi = [p.requires_grad_() for p in (torch.diag(DIRECTION) / 4, DIRECTION.clone())]
    means, (k, noise, sigma) = generated(), draws()

    def psi_loss(x0, noise, sigma):
        fake = lambda xt, sigma: fake_of(means).denoiser(xt, sigma) + xt @ psi[0] + psi[1]
        loss = wanted(answer(fake, x0, sigma.clone(), noise.clone(), sim.edm_weight(sigma)), len(x0))
        return loss + 0 * (means.sum() + psi[0].sum() + psi[1].sum())

    value = psi_loss(means[k], noise, sigma).detach()
    for weight, *drawn in BED.quadrature(means, NODES):
        (weight * psi_loss(*drawn)).sum().backward()
    return {
        "value": value,
        "gradient of psi": torch.cat([p.grad.flatten() for p in psi]),
        "gradient of theta": means.grad,
    }


def true_learning() -> dict[str, Tensor]:
    """The gradient of E weight |A xt + b|^2: a denoising loss moves psi towards the exact denoiser."""

    def error(fake, x0, sigma, noise, weight):
        xt = sim.add_noise(x0, sigma, noise).detach()
        gap = fake(xt, sigma) - fake_of(generated()).denoiser(xt, sigma)
        return weight * dot(gap, gap)

    value = learning(sim.fake_loss)["value"]
    return learning(error) | {"value": value}


def judging(answer: Callable) -> dict[str, Tensor]:
    return losses(
        lambda x0, noise, sigma, means: answer(
            BED.teacher.denoiser, fake_of(means).denoiser, x0, sigma, noise, DISTANCE.c
        )
    )


def true_judging() -> dict[str, Tensor]:
    return losses(BED.surrogate(DISTANCE, "denoised")) | {"gradient": left_side(DISTANCE, "denoised")}


# --- The loop.
def five_steps(answer: Callable) -> dict[str, Tensor]:
    """How far psi and theta have come in five steps of plain gradient descent, from random networks."""
    rng = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=rng, dtype=torch.float64)
    teacher, fake, body = networks = [Denoiser(width=8).double() for _ in range(3)]
    generator = Generator(body)
    start = [normal(sum(p.numel() for p in network.parameters())) / 3 for network in networks]
    for network, weights in zip(networks, start):
        vector_to_parameters(weights.clone(), network.parameters())
    draw = bounded(lambda: (normal(32, 2), 0.2 + normal(32).abs(), normal(32, 2)), 50)
    optimisers = [torch.optim.SGD(network.parameters(), 1e-3) for network in (fake, generator)]
    answer(teacher.requires_grad_(False), fake, generator, *optimisers, draw, 5)
    now = [parameters_to_vector(network.parameters()).detach() for network in (fake, generator)]
    return {"movement of psi": now[0] - start[1], "movement of theta": now[1] - start[2]}
