"""Score Implicit Matching (SIM): the mathematics, in one file.

SIM (Luo et al., NeurIPS 2024, arXiv:2410.16794) turns a diffusion model into a one-step generator,
without data.  Three networks, each with the paper's letter:

    teacher    q      frozen; knows the score of the data
    fake       psi    the online network; learns the score of the generator's samples
    generator  theta  x0 = g(z) in one evaluation

One forward process, in EDM's form, and Tweedie's relation (B.3):

    xt = x0 + sigma * noise              D(xt; sigma) = E[x0 | xt]
    score(xt; sigma) = grad log p(xt; sigma) = (D(xt; sigma) - xt) / sigma**2

Training alternates `fake_loss`, which moves psi, and `generator_loss`, which moves theta.  The second
rests on Theorem 3.1: with y = score_fake(xt) - score_teacher(xt),

    grad_theta E d(y)  =  grad_theta E -d'(y)^T (score_fake(xt) - grad log q(xt | x0)).

On the left the law of xt is held still and theta moves the generator's score, which nobody can
differentiate.  On the right theta moves xt and x0, which anybody can.

Conventions.  Tensors are (B, *D) for any D; sigma is (B,), positive, in data units; norms and inner
products sum over *D; losses return (B,) and the caller reduces.  A denoiser is any callable
denoiser(xt, sigma, **cond) that returns D like xt.  dtype and device follow the inputs, half precision is
computed in float32, wrong inputs raise ValueError.  (B.3) is the paper's; README.md lists its slips.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce, wraps

import torch
from torch import Tensor

_flat = lambda y: y.reshape(len(y), math.prod(y.shape[1:]))  # (B, *D) -> (B, dimensions)
_dot = lambda a, b: _flat(a * b).sum(1)  # inner product over *D; an einsum would leave float32 under autocast
_wide = lambda v: v.float() if torch.is_tensor(v) and v.dtype.itemsize < 4 else v


def _expand(values, like):
    """(B,) -> (B, 1, ..., 1), in the dtype of `like` and ready to broadcast over it."""
    if values.shape != like.shape[:1]:
        raise ValueError(f"need shape {tuple(like.shape[:1])}, got {tuple(values.shape)}")
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _positive(**numbers):
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _check(name, value):
    """A floating-point tensor; sigma > 0 and weight >= 0 wherever a look costs nothing: on the CPU,
    outside torch.compile and vmap.  On an accelerator it would stall every step."""
    value = torch.tensor(float(value)) if name == "weight" and isinstance(value, int | float) else value
    if not (torch.is_tensor(value) and value.is_floating_point()):
        raise ValueError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', value)}")
    hidden = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(value)
    if name in ("sigma", "weight") and value.device.type == "cpu" and not hidden and value.numel():
        least, most = (edge.item() for edge in value.detach().aminmax())  # NaN if there is one
        rule, fits = ("not negative", least >= 0) if name == "weight" else ("positive", least > 0)
        if not (fits and most < math.inf):
            raise ValueError(f"{name} must be finite and {rule}, got {most if fits else least}")


def _formula(function, back=True):
    """What all formulas share: arguments hinted as tensors are checked, and of one shape but for (B,)
    sigma and weight; half precision is computed in float32, where squares have room, and cast back."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    hinted = [name for name in names if function.__annotations__.get(name) in (Tensor, float | Tensor)]

    @wraps(function)
    def checked(*args, **kwargs):
        given = {name: value for name, value in (dict(zip(names, args)) | kwargs).items() if name in hinted}
        for name, value in given.items():
            _check(name, value)
        alike = {name: value for name, value in given.items() if name not in ("sigma", "weight")}
        if len({tensor.shape for tensor in alike.values()}) > 1:
            raise ValueError(f"shapes differ: {', '.join(f'{n} {tuple(v.shape)}' for n, v in alike.items())}")
        result = function(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return result.to(reduce(torch.promote_types, [v.dtype for v in alike.values()])) if back else result

    return checked


# --- Distances d(y) and their gradients d'(y): Table 4.
class Distance:
    """row(y) = d(y), d'(y), a row of Table 4.  value: (B, *D) -> (B,); grad: like y."""

    def __post_init__(self):
        _positive(**vars(self))
        if getattr(self, "alpha", 2) % 2:
            raise ValueError(f"alpha must be even, got {self.alpha}")

    @_formula
    def value(self, y: Tensor) -> Tensor:
        return self.row(y)[0]

    @_formula
    def grad(self, y: Tensor) -> Tensor:
        return self.row(y)[1]


@dataclass(frozen=True)
class SquaredL2(Distance):
    """d = ||y||^2,  d' = 2y."""

    def row(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return _dot(y, y), 2 * y


@dataclass(frozen=True)
class Power(Distance):
    """d = ||y||_alpha^alpha = sum_i y_i^alpha,  d' = alpha y^(alpha-1), alpha even."""

    alpha: int = 4

    def row(self, y: Tensor) -> tuple[Tensor, Tensor]:
        power = y ** (self.alpha - 1)
        return _dot(power, y), self.alpha * power


@dataclass(frozen=True)
class Exp(Distance):
    """d = exp(beta |y|^alpha) - 1,  d' = alpha beta exp(beta |y|^alpha) y^(alpha-1), |y|^alpha as in `Power`.
    Table 4 forgets beta in d'.  Nothing is clipped: past exp(88), exp(709) in float64, d' is inf, or NaN."""

    alpha: int = 2
    beta: float = 0.3

    def row(self, y: Tensor) -> tuple[Tensor, Tensor]:
        power, slope = Power.row(self, y)
        growth = self.beta * torch.exp(self.beta * power)
        return torch.expm1(self.beta * power), _expand(growth, y) * slope


@dataclass(frozen=True)
class L1(Distance):
    """d = ||y||_1,  d' = sign(y).  Its jump biases `sim_loss`: see `density_loss`."""

    def row(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return _dot(y, y.sign()), y.sign()


@dataclass(frozen=True)
class Huber(Distance):
    """d = sum_i (y_i^2/2 if |y_i| <= delta else delta (|y_i| - delta/2)),  d' = y clipped."""

    delta: float = 0.5

    def row(self, y: Tensor) -> tuple[Tensor, Tensor]:
        clipped = y.clamp(-self.delta, self.delta)
        return _dot(clipped, y - clipped / 2), clipped


@dataclass(frozen=True)
class PseudoHuber(Distance):
    """d = sqrt(||y||^2 + c^2) - c,  d' = y / sqrt(||y||^2 + c^2).  (Table 4's factors 2 are spurious.)
    The paper's choice: ||d'|| < 1, so that no sample outweighs the others.  At ||y|| = c, d turns linear."""

    c: float = 0.1

    def row(self, y: Tensor) -> tuple[Tensor, Tensor]:
        peak = _flat(y.detach().abs()).amax(1)
        scale = torch.where(peak > 1e15, peak, 1.0)  # so that no square overflows
        floor = max(self.c**2, torch.finfo(y.dtype).tiny)  # c^2; at 0 the root has no derivative
        unit = y / _expand(scale, y)
        root = torch.sqrt(_dot(unit, unit) + floor / scale**2)
        return _dot(unit, y) / (root + self.c / scale), unit / _expand(root, y)  # root - c, uncancelled


DISTANCES = dict(l2=SquaredL2, power=Power, exp=Exp, l1=L1, huber=Huber, pseudo_huber=PseudoHuber)


def make_distance(distance: str | Distance, **parameters) -> Distance:
    """make_distance("power", alpha=6) -> an instance; of an instance, itself."""
    if callable(getattr(distance, "grad", None)) and not isinstance(distance, type):
        return distance
    if not isinstance(distance, str) or distance not in DISTANCES:
        known = ", ".join(DISTANCES)
        raise ValueError(f"unknown distance {distance!r}; choose from {known}, or an instance: PseudoHuber()")
    try:
        return DISTANCES[distance](**parameters)
    except TypeError:
        raise ValueError(f"distance {distance!r} does not take {' and '.join(parameters)}") from None


# --- The forward process, and what a denoiser says.  Gradient flows through every tensor.
SPACES = {"denoised": 0, "noise": 1, "score": 2}  # differences there are sigma**-power as large


@_formula
def add_noise(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """xt = x0 + sigma * noise."""
    return x0 + _expand(sigma, x0) * noise


@_formula
def to_space(denoised: Tensor, xt: Tensor, sigma: Tensor, space: str) -> Tensor:
    """D itself, or the noise (xt - D) / sigma, or the score (D - xt) / sigma**2 (B.3)."""
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}; choose from {', '.join(SPACES)}")
    gap = denoised - xt if space == "score" else xt - denoised
    return denoised if space == "denoised" else gap / _expand(sigma, xt) ** SPACES[space]


def score_from_denoised(denoised: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
    """Tweedie: score = (denoised - xt) / sigma**2, in 1/data units (B.3)."""
    return to_space(denoised, xt, sigma, "score")


@_formula
def denoised_from_score(score: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
    """Tweedie the other way: denoised = xt + sigma**2 * score (B.3)."""
    return xt + _expand(sigma, xt) ** 2 * score


def conditional_score(xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """grad_xt log q(xt | x0) = (x0 - xt) / sigma**2 = -noise / sigma."""
    return to_space(x0, xt, sigma, "score")


# --- Losses on tensors (fake, teacher, target), (B, *D) each -> (B,): `predictions` in any one space.
# Gradient flows through all three.  distance: an instance, or a name from DISTANCES.
@_formula
def score_projection(u: Tensor, score: Tensor, conditional_score: Tensor) -> Tensor:
    """u^T (score - conditional_score), the score-projection identity (A.1): over x0 ~ p and noise ~ N(0, I)
    its mean is 0 for every function u(xt), if `score` is that of the diffused p.  All else follows."""
    return _dot(u, score - conditional_score)


@_formula
def sim_loss(fake: Tensor, teacher: Tensor, target: Tensor, distance: str | Distance) -> Tensor:
    """The SIM surrogate: -d'(y)^T (fake - target), y = fake - teacher (A.4 with u = d'(y)).  Its value has
    no minimum; its gradient descends E d(y), and flows inside d'(y), too."""
    return -_dot(make_distance(distance).grad(fake - teacher), fake - target)


@_formula
def full_loss(fake: Tensor, teacher: Tensor, target: Tensor, distance: str | Distance) -> Tensor:
    """`sim_loss` + d(y): its gradient is that of E d(y) with the law of xt moving, too; d(y) along xt, the
    scores' parameters stopped, is what the theorem leaves out.  Equal to SIM's where the scores agree (if
    d'(0) = 0: both are 0).  For squared L2, `sid_loss` at alpha = 1/2 is half of it."""
    return sim_loss(fake, teacher, target, distance) + make_distance(distance).value(fake - teacher)


@_formula
def sid_loss(fake: Tensor, teacher: Tensor, target: Tensor, alpha=1.2) -> Tensor:
    """For comparison, SiD (Zhou et al. 2024): -y^T ((teacher - target) + alpha y).

    Equals -y^T (fake - target) + (1 - alpha) ||y||^2: for squared L2 half of `sim_loss` at alpha = 1 and of
    `full_loss` at 1/2; SiD's choice, 1.2, lies on the other side of SIM."""
    y = fake - teacher
    return -_dot(y, teacher - target + alpha * y)


@_formula
def diff_instruct_loss(fake: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """For comparison, Diff-Instruct (and DMD without its regression): sg(y)^T x0, y = fake - teacher.

    Gradient flows through target alone: x0, as other spaces' targets stand still.  With y of scores its mean
    is the gradient of KL(p_theta || p_q) at level sigma; of denoisers, sigma**2 times that."""
    return _dot((fake - teacher).detach(), target)  # sg: the KL moves samples, not scores


@_formula
def denoising_loss(denoised: Tensor, x0: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """Weighted denoising score matching: weight * ||denoised - x0||^2 (B.2), weight a number or (B,)."""
    return weigh(_dot(denoised - x0, denoised - x0), weight)


@_formula
def weigh(loss: Tensor, weight: float | Tensor) -> Tensor:
    """weight * loss, where no weight is negative."""
    return loss * (_expand(weight, loss) if torch.is_tensor(weight) else weight)


# --- Losses on networks: the two updates of Algorithm 2.
def predictions(teacher: Callable, fake: Callable, x0: Tensor, sigma: Tensor, noise: Tensor, space="denoised",
                **cond) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What both networks say of xt = x0 + sigma * noise, and what is true -> (fake, teacher, target):

        denoised  (D_psi, D_q, x0),   noise  (eps_psi, eps_q, noise),   score  (s_psi, s_q, -noise / sigma)

    Gradient flows into x0, and through xt through both networks.  The stop in s_sg[theta] (A.4) is that
    fake has parameters of its own; requires_grad_(False) only spares the work."""
    if "weight" in cond:
        raise ValueError(f"no weight is taken here, got {cond['weight']}: `weigh` the loss")
    xt = add_noise(x0, sigma, noise)
    said = fake(xt, sigma, **cond), teacher(xt, sigma, **cond), x0
    return tuple(to_space(denoised, xt, sigma, space) for denoised in said)


def fake_loss(fake: Callable, x0: Tensor, sigma: Tensor, noise: Tensor, weight=1.0, **cond) -> Tensor:
    """psi's update: `denoising_loss` of fake(xt, sigma) on x0; gradient to the fake's parameters alone."""
    x0 = x0.detach()  # sg: psi learns where theta is; theta must not come to meet it
    return denoising_loss(fake(add_noise(x0, sigma, noise), sigma, **cond), x0, weight)


def generator_loss(teacher: Callable, fake: Callable, x0: Tensor, sigma: Tensor, noise: Tensor,
                   distance: str | Distance, space="denoised", *, weight=1.0, **cond) -> Tensor:  # fmt: skip
    """theta's update: weight * `sim_loss` of the `predictions`; weight a number or (B,).  Only differences
    count (not their sign: d' is odd), so spaces differ by powers of sigma alone."""
    return weigh(sim_loss(*predictions(teacher, fake, x0, sigma, noise, space, **cond), distance), weight)


def density_loss(teacher: Callable, fake: Callable, x0: Tensor, sigma: Tensor, noise: Tensor,
                 distance: str | Distance, space="denoised", **cond) -> Tensor:  # fmt: skip
    """SIM with theta in the density of xt instead of on its path: right for jumps of d' too.

        sg(l) log q(xt | x0) + l  at fixed xt,    l = -sg(d'(y))^T (fake - target)
    is (A.4) as an integral over xt.  `sim_loss` needs the derivative of d'(y(xt)), for L1 a Dirac, for which
    autograd has 0.  Here gradient flows through x0 alone, in log q and target, and is much noisier."""
    with torch.no_grad():
        xt = add_noise(x0, sigma, noise)  # sg: theta is in log q and target alone
        fake, teacher, _ = predictions(teacher, fake, x0, sigma, noise, space, **cond)
    loss = sim_loss(fake, teacher, to_space(x0, xt, sigma, space), distance)
    return loss - loss.detach() * denoising_loss(xt, x0, 1 / (2 * _wide(sigma) ** 2))


# --- Noise levels and weightings: (B,), in data units.
def _levels(level, draw, n, generator=None, device=None, dtype=None):
    """level(draw(n)) in dtype, from float32 at least: none lost, none rounded to 0 or inf."""
    device, dtype = device or (generator.device if generator else None), dtype or torch.get_default_dtype()
    exact, info = torch.promote_types(dtype, torch.float32), torch.finfo(dtype)
    sigma = level(draw(n, generator=generator, device=device, dtype=exact))
    return sigma.clamp(info.tiny * info.eps, info.max).to(dtype)


def lognormal_sigma(n: int, mean: float, std: float, sigma_min=0.0, sigma_max=math.inf, **how) -> Tensor:
    """n draws of exp(N(mean, std^2)), clipped to [sigma_min, sigma_max] (B.5; B.3's range): not redrawn, what
    falls outside stays, at the ends.  how: generator, device, dtype."""
    if not (0 <= sigma_min <= sigma_max and sigma_max > 0 and 0 <= std < math.inf and math.isfinite(mean)):
        raise ValueError(f"no levels: mean {mean}, std {std}, sigma_min {sigma_min}, sigma_max {sigma_max}")
    return _levels(lambda x: (mean + std * x).exp().clamp(sigma_min, sigma_max), torch.randn, n, **how)


def karras_sigma(n: int, sigma_min=0.002, sigma_max=80.0, rho=7.0, t_max=0.8, **how) -> Tensor:
    """n draws of SiD's levels: t ~ U[0, t_max] on Karras' ladder, counted from its lower end, 0.002 to 24.4,
        sigma = (sigma_max^(1/rho) + (1 - t) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
    (B.8) prints the largest levels instead, 0.084 to 80.  how: generator, device, dtype."""
    if not (0 < sigma_min <= sigma_max < math.inf and 0 < t_max <= 1 and 0 < rho < math.inf):
        raise ValueError(f"no levels: sigma_min {sigma_min}, sigma_max {sigma_max}, rho {rho}, t_max {t_max}")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _levels(lambda u: (top + (1 - t_max * u) * (bottom - top)) ** rho, torch.rand, n, **how)


SIGMA_DISTRIBUTIONS = {
    "edm": partial(lognormal_sigma, mean=-1.2, std=1.2),  # B.6
    "sim": partial(lognormal_sigma, mean=-3.5, std=2.5),  # B.10
    "karras": karras_sigma,  # SiD's code; (B.8) corrected
    "pixart": partial(lognormal_sigma, mean=-2.0, std=2.0, sigma_min=0.01, sigma_max=156.6155),
}


@partial(_formula, back=False)
def edm_weight(sigma: Tensor, sigma_data=0.5) -> Tensor:
    """lambda_EDM = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (B.7), in float32 at least."""
    _positive(sigma_data=sigma_data)
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@partial(_formula, back=False)
def sid_weight(x0: Tensor, teacher: Tensor, sigma: Tensor, power=4) -> Tensor:
    """w_SiD = C sigma^4 / ||x0 - D_q(xt)||_1 (B.11) of C dimensions, for scores, in float32 at least.
    No gradient; ||.||_1 / C is floored at 1e-5."""
    error = _flat((x0 - teacher).detach().abs()).mean(1).clamp_min(1e-5)  # sg: as in (B.11)
    return _expand(sigma, error) ** power / error


WEIGHTINGS = {  # of a loss on a triple in a space; noise, sid: for squared L2 as 1 on noises, as (B.11)
    "one": lambda triple, sigma, space, sigma_data: 1.0,
    "noise": lambda triple, sigma, space, sigma_data: _wide(sigma) ** (2 * SPACES[space] - 2),
    "edm": lambda triple, sigma, space, sigma_data: edm_weight(sigma, sigma_data),
    "sid": lambda triple, sigma, space, sigma_data: sid_weight(triple[2], triple[1], sigma, SPACES[space]),
}
