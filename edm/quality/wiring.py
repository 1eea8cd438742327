"""Which way a denoiser may be wired wrong: what its network predicts, is given and is told.

A network F becomes D(x; sigma) = p x + q F(scale x; time), where p, q, scale and time depend on sigma alone
(`OUTPUTS`, `INPUTS`, `TIMES`).  Whoever wires it by the row b, while it was trained by the row a, has

    D_b(x; sigma) = p_b x + q_b F,    though it should be    D = p_a x + (q_a / q_b) (D_b - p_b x),

which needs no network: D_b, asked at another x and told another sigma, says what any other wiring would have
said.  The right one is E[x0 | xt], of all functions the one with the least error.  So errors decide, on data.

All of it is float64.  An error is a quadratic form in x0, x, D and 1, so that their inner products, a matrix
for each noise level, answer for all rows at once.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

INPUTS = ["x", "x / (1 + sigma)", "x / sqrt(1 + sigma^2)"]  # what the network is given
OUTPUTS = {  # D of what it says, F
    "the noise": "x - sigma * F",
    "a velocity (noise - x0)": "(x - sigma * F) / (1 + sigma)",
    "the image x0": "F",
    "the score": "x + sigma^2 * F",
    "v of the variance-preserving process": "x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) * F",
    "a velocity of the opposite sign (x0 - noise)": "(x + sigma * F) / (1 + sigma)",
    "the noise with the opposite sign": "x + sigma * F",
    "the score of x / sqrt(1 + sigma^2)": "x + sigma^2 / sqrt(1 + sigma^2) * F",
}
SLIPS = {  # likewise, but nobody trains by these
    "a velocity, with x in the place of x / (1 + sigma)": "x - sigma / (1 + sigma) * F",
    "a velocity, with sigma in the place of t": "x / (1 + sigma) - sigma * F",
    "a velocity, not multiplied by t": "x / (1 + sigma) - F",
    "the noise, with x / sqrt(1 + sigma^2) in the place of x": "x / sqrt(1 + sigma^2) - sigma * F",
    "the noise, not multiplied by sigma": "x - F",
}


def tables(s: float | None) -> tuple[dict[str, str], list[str]]:
    """Outputs and inputs, with EDM's where sigma_data s is known."""
    if not s:
        return OUTPUTS, INPUTS
    edm = f"{s}^2 / (sigma^2 + {s}^2) * x + {s} * sigma / sqrt(sigma^2 + {s}^2) * F"
    return OUTPUTS | {f"EDM's F with sigma_data {s:g}": edm}, [*INPUTS, f"x / sqrt(sigma^2 + {s}^2)"]


def terms(formula: str, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p, q of a formula p x + q F of the above, like sigma."""
    no, yes, code = torch.zeros_like(sigma), torch.ones_like(sigma), formula.replace("^", "**")
    names = {"sigma": sigma, "sqrt": torch.sqrt}
    return tuple(eval(code, names | {"x": x, "F": F}) for x, F in ((yes, no), (no, yes)))


def rescaled(wanted: str, given: str, levels: Tensor, told: Tensor) -> Tensor:
    """At which multiple of x to ask, told these sigmas, so that it is given what it wants at levels."""
    return terms(wanted, levels)[0] / terms(given, told)[0]


def vp_step(sigma: Tensor) -> Tensor:
    """t in [0, 1] of the usual variance-preserving process, beta from 0.1 to 20."""
    return ((0.01 + 2 * 19.9 * torch.log1p(sigma**2)).sqrt() - 0.1) / 19.9


TIMES = {  # what the network is told
    "sigma": lambda sigma: sigma,
    "t = sigma / (1 + sigma)": lambda sigma: sigma / (1 + sigma),
    "1000 t": lambda sigma: 1000 * sigma / (1 + sigma),
    "sigma^2": lambda sigma: sigma**2,
    "sqrt(sigma)": lambda sigma: sigma.sqrt(),
    "log(sigma)": lambda sigma: sigma.log(),
    "log(sigma) / 4": lambda sigma: sigma.log() / 4,
    "the step in [0, 1]": vp_step,
    "the step in [0, 1000]": lambda sigma: 1000 * vp_step(sigma),
    "1 - t": lambda sigma: 1 / (1 + sigma),
    "1 - the step in [0, 1]": lambda sigma: 1 - vp_step(sigma),
}
TOLD = torch.logspace(-4, 4, 25, dtype=torch.float64)  # every sigma that a denoiser is told


# --- Inner products.
def gram(x0: Tensor, x: Tensor, said: Tensor) -> Tensor:
    """(..., n d) each -> (..., 4, 4): means over samples and coordinates of the products of x0, x, D, 1."""
    rows = torch.stack([x0, x, said, torch.ones_like(x)], -2)
    return rows @ rows.mT / rows.shape[-1]


def error(grams: Tensor, p=0.0, q=1.0) -> Tensor:
    """mean (p x + q D - x0)^2; p, q broadcast against grams (..., 4, 4).  inf where D is not finite,
    or p x and q D nearly cancel."""
    p, q = (torch.as_tensor(v, dtype=grams.dtype) for v in (p, q))
    g = lambda i, j: grams[..., i, j]
    value = g(0, 0) + p**2 * g(1, 1) + q**2 * g(2, 2) + 2 * (p * q * g(1, 2) - p * g(0, 1) - q * g(0, 2))
    exact = p**2 * g(1, 1) + q**2 * g(2, 2) < 1e6 * (g(0, 0) + g(1, 1))  # else rounding is all that is left
    return torch.where(value.isfinite() & exact, value.clamp_min(0), math.inf)


def best_mix(grams: Tensor) -> tuple[Tensor, Tensor]:
    """The least error of a x + b D + c, and a, b, c (..., 3): of a right D it is D's own."""
    basis, aim = grams[..., 1:, 1:], grams[..., 1:, 0]
    ridge = 1e-9 * torch.diag_embed(basis.diagonal(dim1=-2, dim2=-1))
    mix = torch.linalg.solve_ex(basis + ridge, aim)[0]  # where something is not finite: nan
    return (grams[..., 0, 0] - (aim * mix).sum(-1)).clamp_min(0), mix


class Samples:
    """A denoiser(x, sigma, n) on known samples: x = x0 + sigma noise at `levels` (L,); x0, noise (n, *D), all
    float64.  Row i of x belongs to sample i modulo n.

    spread: root mean square of x0 about the data's mean.  Errors are counted in those of the best linear
    denoiser of such data, `trivial`, plus a hundredth: nobody needs to know whether it is less.
    """

    def __init__(self, denoiser: Callable, x0: Tensor, noise: Tensor, levels: Tensor, spread: float):
        self.denoiser, self.x0, self.noise, self.levels = denoiser, x0, noise, levels
        self.spread, self.trivial = spread, (levels**-2 + spread**-2) ** -1

    def grams(self, scale=1.0, told: Tensor | None = None, shift=(1.0, 0.0)) -> Tensor:
        """(..., L, 4, 4) of D asked at scale x, told a sigma, (..., L) each; shift (c, m): at c x + m."""
        (c, m), x0, told = shift, self.x0.flatten(1), self.levels if told is None else told
        x = x0 + self.levels[:, None, None] * self.noise.flatten(1)  # (L, n, d)
        asked = c * (scale * torch.ones_like(told))[..., None, None] * x + m  # (..., L, n, d)
        rows = asked.reshape(-1, *self.x0.shape[1:]), (c * told)[..., None].expand(asked.shape[:-1]).flatten()
        parts = zip(*(part.split(8 * len(x0)) for part in rows))
        said = torch.cat([self.denoiser(*part, len(x0)) for part in parts]).reshape(asked.shape)
        return gram(*(v.expand_as(said).flatten(-2) for v in (x0, x, (said - m) / c)))

    def relative(self, errors: Tensor) -> Tensor:
        return errors / self.trivial + 0.01


# --- The search for the wiring with the least error.
@dataclass(frozen=True)
class Wiring:
    """Another way to use the network: its relative errors (L,), and what is mended, in words."""

    errors: torch.Tensor
    output: tuple = ()  # (predicted, read as)
    scale: tuple = ()  # (wanted, given)
    time: tuple = ()  # (wanted, told)
    data: tuple = ()  # (words,)
    bound: torch.Tensor = None  # errors of the best mix of x and D

    @property
    def score(self) -> float:
        """Mean log error; each thing mended must lower the error by 5 %, or there is no need to mend it."""
        mended = sum(map(bool, (self.output, self.scale, self.time, self.data)))
        return round(self.errors.log().mean().item() + 0.05 * mended, 3)  # of equals the first will do

    @property
    def right(self) -> bool:
        """Whether nothing is left to mend: no mix of x and D is better, and it knows more than the spread."""
        logs = self.errors.log().mean().item()
        return logs - self.bound.log().mean().item() < 0.03 and logs < -0.03


def read(grams: Tensor, rows: dict[str, str], sigma: Tensor, told: Tensor, scale: float | Tensor) -> Tensor:
    """Errors (a, b, ...) of what was wired by b, of rows or SLIPS, read by a; the x asked was scale x."""
    stack = lambda formulas, at: torch.stack([torch.stack(terms(f, at)) for f in formulas], 1)
    pa, qa = stack(rows.values(), sigma.expand_as(told)).unsqueeze(2)
    pb, qb = stack((rows | SLIPS).values(), told).unsqueeze(1)
    return error(grams, pa - qa / qb * pb * scale, qa / qb)


def choose(samples: Samples, errors: Tensor, rows: dict[str, str], **more) -> Wiring:
    """The best pair of rows of errors (a, b, L) -> Wiring.  The first of equals."""
    found, names = samples.relative(errors), [*rows, *SLIPS]
    scores = found.log().mean(-1) + 0.05 * (1 - torch.eye(len(rows), len(names)))
    a, b = divmod(int(scores.round(decimals=4).argmin()), len(names))
    return Wiring(found[a, b], () if a == b else (names[a], names[b]), **more)


def as_wired(samples: Samples, grams: Tensor, **more) -> Wiring:
    return Wiring(samples.relative(error(grams)), bound=samples.relative(best_mix(grams)[0]), **more)


def asked(samples: Samples, rows: dict[str, str], factor=1.0, told: Tensor | None = None, **more) -> Wiring:
    """The best of what D says at factor x, told another sigma."""
    grams, told = samples.grams(factor, told), samples.levels if told is None else told
    errors = read(grams, rows, samples.levels, told, factor)
    return choose(samples, errors, rows, bound=samples.relative(best_mix(grams)[0]), **more)


SHIFTS = {
    "the data are in [0, 1], the network's in [-1, 1]": (2.0, -1.0),
    "the data are in [-1, 1], the network's in [0, 1]": (0.5, 0.5),
    "the data are in [0, 255], the network's in [-1, 1]": (1 / 127.5, -1.0),
    "the data are in [0, 255], the network's in [0, 1]": (1 / 255, 0.0),
} | {
    f"the data are {1 / c:.3g} times as large as the network's": (c, 0.0)
    for c in (0.13025, 0.18215, 1 / 4, 1 / 2.8, 1 / 2, 2.0, 2.8, 4.0, 1 / 0.18215, 1 / 0.13025)
}


def units(samples: Samples, rows: dict[str, str], inputs: list[str]) -> Iterator[Wiring]:
    """It was trained on other data than it is given, or expects another scale of x."""
    for words, shift in SHIFTS.items():
        yield as_wired(samples, samples.grams(shift=shift), data=(words,))
    for pair in product(inputs, inputs):
        if pair[0] != pair[1]:
            yield asked(samples, rows, rescaled(*pair, samples.levels, samples.levels), scale=pair)


def retold(levels: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """[(wanted, told)], sigmas to tell (K, L), so that a network told by the second hears the first."""
    fine = torch.logspace(-4, 4, 2001, dtype=torch.float64)
    factors = (1 / 1000, 1 / 10, 1 / 3, 1 / 2, 2, 3, 10, 1000)
    names, sigmas = [(f"{c:.3g} sigma", "sigma") for c in factors], [c * levels for c in factors]
    for (a, wanted), (b, told) in product(TIMES.items(), TIMES.items()):
        steps, order = told(fine).sort()
        aims = wanted(levels)
        outside = (aims < steps[0]) | (aims > steps[-1])
        at = torch.searchsorted(steps, aims).clamp(0, len(fine) - 1)
        known = any((fine[order][at] / sigma).log().abs().max() < 0.02 for sigma in sigmas)
        if a != b and not known and outside.sum() < 4:
            names.append((a, b)), sigmas.append(fine[order][at])
    return names, torch.stack(sigmas)


def times(samples: Samples, rows: dict[str, str], inputs: list[str], crossed=False) -> list[Wiring]:
    """It is told another time, whatever is read besides; crossed: and given in another scale.

    What it says in between is interpolated; the best are then asked for themselves.
    """
    levels, (names, sigmas) = samples.levels, retold(samples.levels)
    at = ((sigmas.log10() + 4) * (len(TOLD) - 1) / 8).clamp(0, len(TOLD) - 1)  # (K, L), in TOLD
    low, column, found = at.floor().long().clamp(max=len(TOLD) - 2), torch.arange(len(levels)), []
    told = TOLD[:, None].expand(-1, len(levels))  # (J, L)
    for pair in product(inputs, inputs):
        if (pair[0] == pair[1]) == crossed:
            continue
        scale = rescaled(*pair, levels, told)
        logs = samples.relative(read(samples.grams(scale, told), rows, levels, told, scale)).log()
        logs = logs.clamp(max=700)  # (rows, rows, J, L)
        errors = torch.lerp(logs[:, :, low, column], logs[:, :, low + 1, column], at - low).exp() - 0.01
        how = {"scale": pair} if crossed else {}
        for i, name in enumerate(names):
            wiring = choose(samples, errors[:, :, i] * samples.trivial, rows, time=name, **how)
            found.append((wiring.score, rescaled(*pair, levels, sigmas[i]), sigmas[i], name, how))
    best = sorted(found, key=lambda one: one[0])[:8]
    return [asked(samples, rows, factor, told, time=name, **how) for _, factor, told, name, how in best]


def scan(samples: Samples, rows: dict, inputs: list[str]) -> tuple[list[float], Tensor, float, bool]:
    """What a right D does best in the middle -> factors (9,), mean log errors (9,) of D told these times
    sigma, the most that is gained, at the best factor of each level, if the network alone hears it, and
    whether, read in some way, it says the same whatever it hears."""
    samples = Samples(samples.denoiser, samples.x0[:48], samples.noise[:48], samples.levels, samples.spread)
    factors, levels = 2.0 ** torch.arange(-4, 5, dtype=torch.float64), samples.levels
    told, every, found = levels * factors[:, None], torch.arange(len(rows)), []
    for given in inputs:
        scale = rescaled(given, given, levels, told)
        errors = read(samples.grams(scale, told), rows, levels, told, scale)[every, every]
        found.append(samples.relative(errors).log())
    logs = torch.cat(found)  # (rows of every input, 9, L)
    direct = samples.relative(error(samples.grams(told=told))).log().mean(1)
    gain = (logs[:, 4] - logs.amin(1)).mean(1).max().item()
    return factors.tolist(), direct, gain, bool(((logs.amax(1) - logs.amin(1)).amax(1) < 0.02).any())


def search(
    samples: Samples, own: Wiring, rows: dict, inputs: list[str], seconds=math.inf, restless=False, deaf=False
) -> Wiring | None:
    """The best wiring that is found, the cheap ones first, until one is right; None if it is deaf to sigma.

    own: the wiring as it is; restless: do not believe that it is right.  seconds: after which no further
    kind is begun.
    """
    start, found = time.monotonic(), [own, asked(samples, rows)]
    for stage in (units, times, lambda *given: times(*given, crossed=True)):
        best = min(found, key=lambda wiring: wiring.score)
        if (best.right and not (restless and best is own)) or time.monotonic() - start > seconds:
            return best
        if deaf and stage is times:
            return None
        found += stage(samples, rows, inputs)
    return min(found, key=lambda wiring: wiring.score)
