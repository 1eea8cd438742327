"""Score Implicit Matching (SIM): the mathematics, in one file.

SIM (Luo et al., NeurIPS 2024, arXiv:2410.16794) turns a diffusion model into a
one-step generator without data.  Three networks, one letter each in the paper:

    teacher    q      frozen, knows the score of the data
    fake       psi    online network, learns the score of the generator's samples
    generator  theta  x0 = g(z), one evaluation

and one forward process, in EDM form, with Tweedie's relation (B.3):

    xt = x0 + sigma * noise        D(xt; sigma) = E[x0 | xt]
    score(xt; sigma) = grad log p(xt) = (D(xt; sigma) - xt) / sigma**2

Training alternates `fake_loss` (moves psi only) and `generator_loss` (moves
theta only).  The second is Theorem 3.1: with y = score_fake - score_teacher,

    grad_theta E d(y)  =  grad_theta E -d'(y)^T (score_fake - grad log q(xt|x0)).
    ^ sampling law held still           ^ its *value* hovers about no minimum:
      cannot be differentiated            only its gradient means anything

Conventions.  Tensors are (B, *D) for any D; sigma is (B,), in data units, > 0;
norms and inner products sum over *D; losses return (B,) and the caller
reduces.  dtype and device follow the inputs.  A denoiser is any callable
denoiser(xt, sigma, **cond) -> like xt.  Wrong shapes or values raise
ValueError.  Sources (B.3), (A.1), Table 4 ... are the paper's appendix;
README.md lists where it needs correcting.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch


def _dot(a, b):
    """Inner product over every axis but the first: (B, *D), (B, *D) -> (B,)."""
    return (a * b).unsqueeze(-1).flatten(1).sum(1)


def _expand(values, like):
    """(B,) -> (B, 1, ..., 1) in the dtype of `like`, ready to broadcast over *D."""
    if values.shape != like.shape[:1]:
        raise ValueError(f"expected one value per sample, shape {tuple(like.shape[:1])}, got {tuple(values.shape)}")
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _expand_sigma(sigma, like):
    """`_expand`, refusing sigma <= 0, inf and NaN where reading it is free: on the CPU, not
    while compiling and not under vmap.  (On an accelerator the check would stall every step.)"""
    if sigma.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((sigma > 0) & (sigma < math.inf))
        try:
            if bad.any():
                raise ValueError(f"sigma must be positive and finite, got {sigma[bad][0].item()}")
        except RuntimeError:  # vmap does not let values be read
            pass
    return _expand(sigma, like)


def _same_shape(**tensors):
    if len({t.shape for t in tensors.values()}) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{k} {tuple(t.shape)}" for k, t in tensors.items()))


# ------------------------------------------------------------------------------------------------
# Distances d(y) and their gradients d'(y): Table 4.  Every d' is odd, so a change of sign of y
# and of the residual together leaves the surrogate as it is.


@dataclass(frozen=True)
class SquaredL2:
    """d = ||y||^2,  d' = 2y."""

    def value(self, y):
        return _dot(y, y)

    def grad(self, y):
        return 2 * y


@dataclass(frozen=True)
class Power:
    """d = ||y||_alpha^alpha = sum_i y_i^alpha,  d' = alpha y^(alpha-1);  alpha even."""

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
    """d = exp(beta ||y||_alpha^alpha) - 1,  d' = alpha beta exp(beta ||y||_alpha^alpha) y^(alpha-1).

    Table 4 omits beta from d'.  Nothing is clipped: where beta ||y||_alpha^alpha exceeds 88
    (709 in float64) d and d' overflow to inf, and d' is NaN in coordinates where y is 0.
    """

    alpha: int = 2
    beta: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta}")

    def value(self, y):
        return torch.expm1(self.beta * super().value(y))

    def grad(self, y):
        return _expand(self.beta * torch.exp(self.beta * super().value(y)), y) * super().grad(y)


@dataclass(frozen=True)
class L1:
    """d = ||y||_1,  d' = sign(y).

    Biased under autograd, in `sim_loss` and wherever Table 4 is differentiated as printed:
    the theorem needs the derivative of d'(y(xt)), and that of a jump is a Dirac which autograd
    takes for 0.  `density_loss` has the right gradient; verify_identity.py measures both.
    """

    def value(self, y):
        return _dot(y, y.sign())

    def grad(self, y):
        return y.sign()


@dataclass(frozen=True)
class Huber:
    """Per coordinate, d = y^2/2 for |y| <= delta, else delta (|y| - delta/2);  d' = clip(y, -delta, delta)."""

    delta: float = 0.5

    def __post_init__(self):
        if not 0 < self.delta < math.inf:
            raise ValueError(f"delta must be positive and finite, got {self.delta}")

    def value(self, y):
        clipped = self.grad(y)
        return _dot(clipped, y - clipped / 2)

    def grad(self, y):
        return y.clamp(-self.delta, self.delta)


@dataclass(frozen=True)
class PseudoHuber:
    """d = sqrt(||y||^2 + c^2) - c,  d' = y / sqrt(||y||^2 + c^2).

    The paper's choice: ||d'|| < 1, so no sample can outweigh the others.  c is the ||y|| at
    which it turns from quadratic to linear; as c -> 0, d' -> y/||y||, and 0 at y = 0.
    (Table 4 prints spurious factors 2; Algorithm 2 agrees with this.)
    """

    c: float = 0.1

    def __post_init__(self):
        if not 0 < self.c < math.inf:
            raise ValueError(f"c must be positive and finite, got {self.c}")

    def _root(self, y):  # the floor keeps c^2 from underflowing to 0, whose root has no derivative
        return torch.sqrt(_dot(y, y) + max(self.c**2, torch.finfo(y.dtype).tiny))

    def value(self, y):
        return _dot(y, y) / (self._root(y) + self.c)  # = root - c, without its cancellation

    def grad(self, y):
        return y / _expand(self._root(y), y)


DISTANCES = {"l2": SquaredL2, "power": Power, "exp": Exp, "l1": L1, "huber": Huber, "pseudo_huber": PseudoHuber}


def make_distance(name, **parameters):
    """`make_distance("power", alpha=6)`.  ValueError for an unknown name or a parameter out of range."""
    if name not in DISTANCES:
        raise ValueError(f"unknown distance {name!r}; choose from {', '.join(DISTANCES)}")
    try:
        return DISTANCES[name](**parameters)
    except TypeError:
        raise ValueError(f"distance {name!r} does not take {', '.join(parameters)}") from None


# ------------------------------------------------------------------------------------------------
# The forward process and its scores.


def add_noise(x0, sigma, noise):
    """xt = x0 + sigma * noise.  Gradient flows through x0."""
    _same_shape(x0=x0, noise=noise)
    return x0 + _expand_sigma(sigma, x0) * noise


def score_from_denoised(denoised, xt, sigma):
    """Tweedie: score = (denoised - xt) / sigma**2, in 1/data units (B.3)."""
    _same_shape(denoised=denoised, xt=xt)
    return (denoised - xt) / _expand_sigma(sigma, xt) ** 2


def denoised_from_score(score, xt, sigma):
    """Tweedie, the other way: denoised = xt + sigma**2 * score (B.3)."""
    _same_shape(score=score, xt=xt)
    return xt + _expand_sigma(sigma, xt) ** 2 * score


def conditional_score(xt, x0, sigma):
    """grad_xt log q(xt | x0) = (x0 - xt) / sigma**2, which is -noise/sigma.  Gradient flows through both."""
    return score_from_denoised(x0, xt, sigma)


def score_projection(u, score, conditional_score):
    """u^T (score - conditional_score): (B, *D) x 3 -> (B,).

    Its mean over x0 ~ p, noise ~ N(0, I) is 0 for every function u(xt) if `score` is that of
    p's diffusion at xt: the score-projection identity (A.1), on which all else rests.
    """
    _same_shape(u=u, score=score, conditional_score=conditional_score)
    return _dot(u, score - conditional_score)


# ------------------------------------------------------------------------------------------------
# Losses on tensors.  (fake, teacher, target) live in one space, any of
#     score (s_psi, s_q, grad log q)    denoised (D_psi, D_q, x0)    noise (eps_psi, eps_q, noise).


def sim_loss(fake, teacher, target, distance):
    """The SIM surrogate -d'(y)^T (fake - target), y = fake - teacher: (B, *D) x 3 -> (B,).

    Descending its gradient descends d(y); its value has no minimum to reach.  Gradient flows
    through all three tensors, d'(y) included: detaching d'(y) gives another, wrong, gradient.
    distance: an instance, or a name from DISTANCES.  Source: A.4 with u = d'(y); Algorithm 2.
    """
    _same_shape(fake=fake, teacher=teacher, target=target)
    distance = make_distance(distance) if isinstance(distance, str) else distance
    return -_dot(distance.grad(fake - teacher), fake - target)


def sid_loss(fake, teacher, target, alpha=1.2):
    """SiD's loss (Zhou et al. 2024), for comparison: -y^T ((teacher - target) + alpha y).

    Equals -y^T (fake - target) + (1 - alpha) ||y||^2: half of SIM's squared L2 at alpha = 1,
    and elsewhere a multiple of ||y||^2 that the theorem does not contain.
    """
    _same_shape(fake=fake, teacher=teacher, target=target)
    y = fake - teacher
    return -_dot(y, teacher - target + alpha * y)


def diff_instruct_loss(fake, teacher, target):
    """Diff-Instruct (and DMD's regression-free part), for comparison: sg(y)^T target.

    Only `target` carries gradient.  In noise space through `generator_loss` its mean gradient is
    that of KL(p_theta || p_q) at level sigma; in denoised space, sigma**2 times that.
    """
    _same_shape(fake=fake, teacher=teacher, target=target)
    return _dot((fake - teacher).detach(), target)  # sg: the KL gradient moves samples, not scores


def denoising_loss(denoised, x0, weight=1.0):
    """weight * ||denoised - x0||^2, denoising score matching (B.2).  weight: number or (B,)."""
    _same_shape(denoised=denoised, x0=x0)
    loss = _dot(denoised - x0, denoised - x0)
    return loss * (_expand(weight, loss) if torch.is_tensor(weight) else weight)


# ------------------------------------------------------------------------------------------------
# Losses on networks: the two updates of Algorithm 2.

SPACES = {"denoised": 0, "noise": 1, "score": 2}  # differences shrink by sigma**-power on the way there


def _space_factor(space, sigma, like):
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}; choose from {', '.join(SPACES)}")
    return _expand_sigma(sigma, like) ** -SPACES[space]


def fake_loss(fake, x0, sigma, noise, weight=1.0, **cond):
    """The psi update: `denoising_loss` of fake(xt, sigma) on the generator's samples x0 -> (B,)."""
    x0 = x0.detach()  # sg: psi learns where the generator is; the generator must not come to meet it
    return denoising_loss(fake(add_noise(x0, sigma, noise), sigma, **cond), x0, weight)


def generator_loss(teacher, fake, x0, sigma, noise, distance, space="denoised", *, weight=1.0, **cond):
    """The theta update: weight * `sim_loss` at xt = x0 + sigma * noise -> (B,).

    Gradient flows into x0, and through xt through both networks.  It reaches their parameters
    too: freeze them (requires_grad_(False)) for theta's turn.

    distance  as in `sim_loss`, or another loss(fake, teacher, target), e.g. `sid_loss`.
    space     where d is applied.  Only differences enter, so score and noise are denoised times
              sigma**-2 and sigma**-1 (and a sign, which an odd d' absorbs).
    weight    number, (B,), or a function like `sid_weight`, called without gradient.
    """
    xt = add_noise(x0, sigma, noise)
    factor = _space_factor(space, sigma, x0)
    d_fake, d_teacher = fake(xt, sigma, **cond), teacher(xt, sigma, **cond)
    loss = distance if callable(distance) else partial(sim_loss, distance=distance)
    if callable(weight):
        with torch.no_grad():
            weight = weight(x0, d_teacher, sigma, space)
    values = loss(factor * d_fake, factor * d_teacher, factor * x0)
    return values * (_expand(weight, values) if torch.is_tensor(weight) else weight)


def density_loss(teacher, fake, x0, sigma, noise, distance, space="denoised", **cond):
    """SIM with theta on the density of xt instead of on its path: right for every d, jumps included.

        sg(l) log q(xt|x0) + l   at xt fixed,   l = -sg(d'(y))^T (fake - target)

    Gradient flows through x0 inside log q and target alone, so neither network is
    differentiated; the price is a far noisier estimate.  Differentiates E u^T (s - grad log q)
    in (A.4) as an integral over xt.
    """
    xt = add_noise(x0, sigma, noise).detach()  # sg: theta acts through the density, below
    factor = _space_factor(space, sigma, x0)
    with torch.no_grad():
        d_fake, d_teacher = factor * fake(xt, sigma, **cond), factor * teacher(xt, sigma, **cond)
    loss = sim_loss(d_fake, d_teacher, factor * x0, distance)
    log_q = -_dot(xt - x0, xt - x0) / (2 * sigma.to(x0.dtype) ** 2)
    return loss.detach() * log_q + loss


# ------------------------------------------------------------------------------------------------
# Noise levels and weightings.


def lognormal_sigma(n, mean, std, sigma_min=0.0, sigma_max=math.inf, *, generator=None, device=None, dtype=None):
    """n draws of exp(N(mean, std^2)), clipped to [sigma_min, sigma_max] (B.5).

    Clipped, not redrawn: what falls outside sits at the ends (PixArt's range, B.3).
    """
    if not (0 <= sigma_min <= sigma_max and sigma_max > 0 and std >= 0):
        raise ValueError(f"need 0 <= sigma_min <= sigma_max and std >= 0, got {sigma_min}, {sigma_max} and {std}")
    device = device or (generator.device if generator else None)
    s = torch.randn(n, generator=generator, device=device, dtype=dtype)
    return (mean + std * s).exp().clamp(sigma_min, sigma_max)


def karras_sigma(n, sigma_min=0.002, sigma_max=80.0, rho=7.0, K=1000, last=800, *, generator=None, device=None,
                 dtype=None):  # fmt: skip
    """n draws, uniform over rungs k = 0..last of Karras' ladder of K (B.8, SiD's choice):

    sigma_k = (sigma_max^(1/rho) + k/(K-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    """
    if not (0 < sigma_min <= sigma_max and 0 <= last < K):
        raise ValueError(f"need 0 < sigma_min <= sigma_max and 0 <= last < K, got {sigma_min}, {sigma_max}, {last}, {K}")
    device = device or (generator.device if generator else None)
    k = torch.randint(last + 1, (n,), generator=generator, device=device).to(dtype or torch.get_default_dtype())
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top + k / (K - 1) * (bottom - top)) ** rho


SIGMA_DISTRIBUTIONS = {
    "edm": partial(lognormal_sigma, mean=-1.2, std=1.2),  # B.6
    "sim": partial(lognormal_sigma, mean=-3.5, std=2.5),  # B.10
    "karras": karras_sigma,  # B.8
    "pixart": partial(lognormal_sigma, mean=-2.0, std=2.0, sigma_min=0.01, sigma_max=156.6155),  # B.3
}


def edm_weight(sigma, sigma_data=0.5):
    """lambda_EDM = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (B.7): (B,) -> (B,)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def sid_weight(x0, teacher, sigma, space="score"):
    """w_SiD = C sigma^4 / ||x0 - D_q(xt)||_1, C the number of dimensions (B.11) -> (B,).

    The printed sigma^4 belongs to score differences; per space it is sigma^(2 power), so that
    squared L2 is weighted alike in all three.  The mean error is floored at 1e-5.
    """
    _same_shape(x0=x0, teacher=teacher)
    error = (x0 - teacher).detach().abs().unsqueeze(-1).flatten(1).mean(1)  # sg: B.11's subscript
    return _space_factor(space, sigma, error) ** -2 / error.clamp_min(1e-5)
