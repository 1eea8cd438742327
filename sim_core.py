"""Score Implicit Matching (SIM): the mathematics, in one file.

SIM (Luo et al., NeurIPS 2024, arXiv:2410.16794) turns a diffusion model into a one-step
generator, without data.  Three networks, each with the paper's letter:

    teacher    q      frozen; knows the score of the data
    fake       psi    the online network; learns the score of the generator's samples
    generator  theta  x0 = g(z) in one evaluation

One forward process, in EDM's form, and Tweedie's relation (B.3):

    xt = x0 + sigma * noise              D(xt; sigma) = E[x0 | xt]
    score(xt; sigma) = grad log p(xt; sigma) = (D(xt; sigma) - xt) / sigma**2

Training alternates `fake_loss`, which moves psi, and `generator_loss`, which moves theta.
The second rests on Theorem 3.1: with y = score_fake(xt) - score_teacher(xt),

    grad_theta E d(y)  =  grad_theta E -d'(y)^T (score_fake(xt) - grad log q(xt | x0)).

On the left the law of xt is held still and theta moves the generator's score, which nobody
can differentiate.  On the right theta moves xt and x0, which anybody can.

Conventions.  Tensors are (B, *D) for any D; sigma is (B,), positive, in data units; norms and
inner products sum over *D; losses return (B,) and the caller reduces.  dtype and device follow
the inputs.  A denoiser is any callable denoiser(xt, sigma, **cond) that returns D like xt.
Wrong shapes and values raise ValueError.  Numbers such as (B.3) are the paper's equations, in
its appendix; README.md lists the few that need correcting.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch


def _dot(a, b):
    """Inner product over all axes but the first: (B, *D), (B, *D) -> (B,)."""
    return (a * b).unsqueeze(-1).flatten(1).sum(1)


def _expand(values, like):
    """(B,) -> (B, 1, ..., 1), in the dtype of `like` and ready to broadcast over it."""
    if values.shape != like.shape[:1]:
        raise ValueError(f"need shape {tuple(like.shape[:1])}, got {tuple(values.shape)}")
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _expand_sigma(sigma, like):
    """`_expand`, refusing sigma <= 0, inf and NaN wherever a look costs nothing: on the CPU,
    outside torch.compile and vmap.  On an accelerator it would stall every step."""
    if sigma.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((sigma > 0) & (sigma < math.inf))
        try:
            if bad.any():
                raise ValueError(f"sigma must be positive and finite, got {sigma[bad][0].item()}")
        except RuntimeError:  # vmap hides the values
            pass
    return _expand(sigma, like)


def _positive(**parameter):
    for name, value in parameter.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _same_shape(**tensors):
    if len({t.shape for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")


# ----------------------------------------------------------------------------------------------
# Distances d(y) and their gradients d'(y): Table 4.  value: (B, *D) -> (B,), grad: like y.


@dataclass(frozen=True)
class SquaredL2:
    """d = ||y||^2,  d' = 2y."""

    def value(self, y):
        return _dot(y, y)

    def grad(self, y):
        return 2 * y


@dataclass(frozen=True)
class Power:
    """d = ||y||_alpha^alpha = sum_i y_i^alpha,  d' = alpha y^(alpha-1), alpha even."""

    alpha: int = 4

    def __post_init__(self):
        if self.alpha < 2 or self.alpha % 2:
            raise ValueError(f"alpha must be a positive even integer, got {self.alpha}")

    def value(self, y):
        return _dot(y ** (self.alpha - 1), y)

    def grad(self, y):
        return self.alpha * y ** (self.alpha - 1)


@dataclass(frozen=True)
class Exp(Power):
    """d = exp(beta |y|^alpha) - 1,  d' = alpha beta exp(beta |y|^alpha) y^(alpha-1).

    |y|^alpha is `Power`'s d.  (Table 4 forgets beta in d'.)  Nothing is clipped: once
    beta |y|^alpha passes 88, or 709 in float64, d is inf, and d' is inf where y is not 0 and
    NaN where it is.
    """

    alpha: int = 2
    beta: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        _positive(beta=self.beta)

    def value(self, y):
        return torch.expm1(self.beta * super().value(y))

    def grad(self, y):
        growth = self.beta * torch.exp(self.beta * super().value(y))
        return _expand(growth, y) * super().grad(y)


@dataclass(frozen=True)
class L1:
    """d = ||y||_1,  d' = sign(y).

    Biased in `sim_loss`, and wherever Table 4 is differentiated as printed.  The theorem needs
    the derivative of d'(y(xt)); where sign jumps that is a Dirac, which autograd takes for 0.
    `density_loss` has the right gradient.  verify_identity.py measures both.
    """

    def value(self, y):
        return _dot(y, y.sign())

    def grad(self, y):
        return y.sign()


@dataclass(frozen=True)
class Huber:
    """d = sum_i (y_i^2/2 if |y_i| <= delta else delta (|y_i| - delta/2)),  d' = y clipped."""

    delta: float = 0.5

    def __post_init__(self):
        _positive(delta=self.delta)

    def value(self, y):
        clipped = self.grad(y)
        return _dot(clipped, y - clipped / 2)

    def grad(self, y):
        return y.clamp(-self.delta, self.delta)


@dataclass(frozen=True)
class PseudoHuber:
    """d = sqrt(||y||^2 + c^2) - c,  d' = y / sqrt(||y||^2 + c^2).

    The paper's choice: ||d'|| < 1, so that no sample outweighs the others.  c is the ||y|| at
    which d turns from quadratic to linear; as c -> 0, d' -> y/||y||, and 0 at y = 0.
    (Table 4's factors 2 are spurious; Algorithm 2 has them right.)
    """

    c: float = 0.1

    def __post_init__(self):
        _positive(c=self.c)

    def _root(self, y):  # c^2 must not underflow to 0, where the root has no derivative
        return torch.sqrt(_dot(y, y) + max(self.c**2, torch.finfo(y.dtype).tiny))

    def value(self, y):
        return _dot(y, y) / (self._root(y) + self.c)  # root - c without the cancellation

    def grad(self, y):
        return y / _expand(self._root(y), y)


DISTANCES = {"l2": SquaredL2, "power": Power, "exp": Exp}
DISTANCES |= {"l1": L1, "huber": Huber, "pseudo_huber": PseudoHuber}


def make_distance(name, **parameters):
    """make_distance("power", alpha=6).  ValueError for an unknown name or an unfit parameter."""
    if name not in DISTANCES:
        raise ValueError(f"unknown distance {name!r}; choose from {', '.join(DISTANCES)}")
    try:
        return DISTANCES[name](**parameters)
    except TypeError:
        raise ValueError(f"distance {name!r} does not take {', '.join(parameters)}") from None


# ----------------------------------------------------------------------------------------------
# The forward process and its scores.  Gradient flows through every tensor.


def add_noise(x0, sigma, noise):
    """xt = x0 + sigma * noise."""
    _same_shape(x0=x0, noise=noise)
    return x0 + _expand_sigma(sigma, x0) * noise


def score_from_denoised(denoised, xt, sigma):
    """Tweedie: score = (denoised - xt) / sigma**2, in 1/data units (B.3)."""
    _same_shape(denoised=denoised, xt=xt)
    return (denoised - xt) / _expand_sigma(sigma, xt) ** 2


def denoised_from_score(score, xt, sigma):
    """Tweedie the other way: denoised = xt + sigma**2 * score (B.3)."""
    _same_shape(score=score, xt=xt)
    return xt + _expand_sigma(sigma, xt) ** 2 * score


def conditional_score(xt, x0, sigma):
    """grad_xt log q(xt | x0) = (x0 - xt) / sigma**2 = -noise / sigma."""
    return score_from_denoised(x0, xt, sigma)


def score_projection(u, score, conditional_score):
    """u^T (score - conditional_score): (B, *D) three times -> (B,).

    The score-projection identity (A.1): over x0 ~ p and noise ~ N(0, I) its mean is 0 for every
    function u(xt), if `score` is that of the diffused p.  All else follows from it.
    """
    _same_shape(u=u, score=score, conditional_score=conditional_score)
    return _dot(u, score - conditional_score)


# ----------------------------------------------------------------------------------------------
# Losses on tensors (fake, teacher, target), (B, *D) each -> (B,), in any one of three spaces:
#     score (s_psi, s_q, grad log q),  denoised (D_psi, D_q, x0),  noise (eps_psi, eps_q, noise).


def sim_loss(fake, teacher, target, distance):
    """The SIM surrogate: -d'(y)^T (fake - target), y = fake - teacher (A.4 with u = d'(y)).

    Only its gradient means something, and descends E d(y); its value has no minimum.  Gradient
    flows through all three tensors, inside d'(y) too: to detach d'(y) is another, wrong, loss.
    distance: an instance, or a name from DISTANCES.
    """
    _same_shape(fake=fake, teacher=teacher, target=target)
    distance = make_distance(distance) if isinstance(distance, str) else distance
    return -_dot(distance.grad(fake - teacher), fake - target)


def sid_loss(fake, teacher, target, alpha=1.2):
    """For comparison, SiD (Zhou et al. 2024): -y^T ((teacher - target) + alpha y).

    Equals -y^T (fake - target) + (1 - alpha) ||y||^2, so half of SIM's squared L2 at alpha = 1;
    at any other alpha it adds what the theorem does not contain.
    """
    _same_shape(fake=fake, teacher=teacher, target=target)
    y = fake - teacher
    return -_dot(y, teacher - target + alpha * y)


def diff_instruct_loss(fake, teacher, target):
    """For comparison, Diff-Instruct (and DMD without its regression): sg(y)^T target.

    Gradient flows through target alone.  Under `generator_loss` in noise space its mean is the
    gradient of KL(p_theta || p_q) at level sigma; in denoised space, sigma**2 times that.
    """
    _same_shape(fake=fake, teacher=teacher, target=target)
    return _dot((fake - teacher).detach(), target)  # sg: the KL moves samples, not scores


def denoising_loss(denoised, x0, weight=1.0):
    """Weighted denoising score matching: weight * ||denoised - x0||^2 (B.2).

    weight: a number or (B,).
    """
    _same_shape(denoised=denoised, x0=x0)
    return _weighted(_dot(denoised - x0, denoised - x0), weight)


def _weighted(loss, weight):
    return loss * (_expand(weight, loss) if torch.is_tensor(weight) else weight)


# ----------------------------------------------------------------------------------------------
# Losses on networks: the two updates of Algorithm 2.

SPACES = {"denoised": 0, "noise": 1, "score": 2}  # differences there are sigma**-power as large


def _space_factor(space, sigma, like):
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}; choose from {', '.join(SPACES)}")
    return _expand_sigma(sigma, like) ** -SPACES[space]


def fake_loss(fake, x0, sigma, noise, weight=1.0, **cond):
    """psi's update: `denoising_loss` of fake(xt, sigma) on the generator's samples x0 -> (B,).

    Gradient flows to the fake's parameters alone.
    """
    x0 = x0.detach()  # sg: psi learns where theta is; theta must not come to meet it
    return denoising_loss(fake(add_noise(x0, sigma, noise), sigma, **cond), x0, weight)


def generator_loss(teacher, fake, x0, sigma, noise, distance, space="denoised", *, weight=1.0, **cond):
    """theta's update: weight * `sim_loss` at xt = x0 + sigma * noise -> (B,).

    Gradient flows into x0 directly, and through xt through both networks.  Stopping their
    parameters (s_sg[theta] in A.4) is the caller's part: requires_grad_(False) on both.

    distance  as for `sim_loss`; or another loss of (fake, teacher, target), such as `sid_loss`.
    space     where to apply it.  Only differences count, so the noise and score spaces are the
              denoised one times sigma**-1 and sigma**-2 (a sign, too, but d' is odd).
    weight    a number, (B,), or a function as `sid_weight`, which is called without gradient.
    """
    xt = add_noise(x0, sigma, noise)
    factor = _space_factor(space, sigma, x0)
    d_fake, d_teacher = fake(xt, sigma, **cond), teacher(xt, sigma, **cond)
    loss = distance if callable(distance) else partial(sim_loss, distance=distance)
    if callable(weight):
        with torch.no_grad():
            weight = weight(x0, d_teacher, sigma, space)
    return _weighted(loss(factor * d_fake, factor * d_teacher, factor * x0), weight)


def density_loss(teacher, fake, x0, sigma, noise, distance, space="denoised", **cond):
    """SIM with theta in the density of xt instead of on its path: right for jumps of d' too.

        sg(l) log q(xt | x0) + l  at fixed xt,    l = -sg(d'(y))^T (fake - target)

    is (A.4) differentiated as an integral over xt.  Gradient flows through x0 in log q and in
    target; no network is differentiated.  The price is a much noisier estimate.
    """
    xt = add_noise(x0, sigma, noise).detach()  # sg: theta is in log q and target alone
    factor = _space_factor(space, sigma, x0)
    with torch.no_grad():
        d_fake, d_teacher = fake(xt, sigma, **cond), teacher(xt, sigma, **cond)
    loss = sim_loss(factor * d_fake, factor * d_teacher, factor * x0, distance)
    log_q = -_dot(xt - x0, xt - x0) / (2 * sigma.to(x0.dtype) ** 2)
    return loss.detach() * log_q + loss


# ----------------------------------------------------------------------------------------------
# Noise levels and weightings: (B,), in data units.


def lognormal_sigma(
    n, mean, std, sigma_min=0.0, sigma_max=math.inf, *, generator=None, device=None, dtype=None
):
    """n draws of exp(N(mean, std^2)), clipped to [sigma_min, sigma_max] (B.5; B.3's range).

    Clipped, not redrawn: what falls outside stays, at the ends.
    """
    if not (0 <= sigma_min <= sigma_max and sigma_max > 0 and std >= 0):
        given = f"sigma_min {sigma_min}, sigma_max {sigma_max}, std {std}"
        raise ValueError(f"need 0 <= sigma_min <= sigma_max and std >= 0, got {given}")
    device = device or (generator.device if generator else None)
    normal = torch.randn(n, generator=generator, device=device, dtype=dtype)
    return (mean + std * normal).exp().clamp(sigma_min, sigma_max)


def karras_sigma(
    n, sigma_min=0.002, sigma_max=80.0, rho=7.0, t_max=0.8, *, generator=None, device=None, dtype=None
):
    """n draws of SiD's levels: t ~ U[0, t_max] on Karras' ladder, counted from its lower end,

        sigma = (sigma_max^(1/rho) + (1 - t) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,

    so from 0.002 to 24.4, median 0.98.  (B.8) means these and prints others: its index counts from
    the upper end, and would keep the largest levels, 0.084 to 80.
    """
    if not (0 < sigma_min <= sigma_max and 0 < t_max <= 1):
        given = f"sigma_min {sigma_min}, sigma_max {sigma_max}, t_max {t_max}"
        raise ValueError(f"need 0 < sigma_min <= sigma_max and 0 < t_max <= 1, got {given}")
    device, dtype = device or (generator.device if generator else None), dtype or torch.get_default_dtype()
    exact = torch.promote_types(dtype, torch.float32)  # half precision would lose levels of t
    t = t_max * torch.rand(n, generator=generator, device=device, dtype=exact)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return ((top + (1 - t) * (bottom - top)) ** rho).to(dtype)


SIGMA_DISTRIBUTIONS = {
    "edm": partial(lognormal_sigma, mean=-1.2, std=1.2),  # B.6
    "sim": partial(lognormal_sigma, mean=-3.5, std=2.5),  # B.10
    "karras": karras_sigma,  # SiD's code; (B.8) corrected
    "pixart": partial(lognormal_sigma, mean=-2.0, std=2.0, sigma_min=0.01, sigma_max=156.6155),
}


def edm_weight(sigma, sigma_data=0.5):
    """lambda_EDM = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (B.7)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def sid_weight(x0, teacher, sigma, space="score"):
    """w_SiD = C sigma^4 / ||x0 - D_q(xt)||_1, C the number of dimensions (B.11), no gradient.

    sigma^4 is for score differences; in other spaces it is sigma^(2 power), so that squared L2
    comes out weighted alike in all.  The mean error ||.||_1 / C is floored at 1e-5.
    """
    _same_shape(x0=x0, teacher=teacher)
    error = (x0 - teacher).detach().abs().unsqueeze(-1).flatten(1).mean(1)  # sg: as in B.11
    return _space_factor(space, sigma, error) ** -2 / error.clamp_min(1e-5)
