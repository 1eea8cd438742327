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
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

root = lambda sigma, s=1.0: (sigma**2 + s**2).sqrt()
INPUTS = {  # what the network is given, over x
    "x": lambda sigma: torch.ones_like(sigma),
    "x / (1 + sigma)": lambda sigma: 1 / (1 + sigma),
    "x / sqrt(1 + sigma^2)": lambda sigma: 1 / root(sigma),
}
OUTPUTS = {  # D = p x + q F
    "the noise": lambda sigma: (torch.ones_like(sigma), -sigma),
    "a velocity (noise - x0)": lambda sigma: (1 / (1 + sigma), -sigma / (1 + sigma)),
    "the image x0": lambda sigma: (torch.zeros_like(sigma), torch.ones_like(sigma)),
    "the score": lambda sigma: (torch.ones_like(sigma), sigma**2),
    "v of the variance-preserving process": lambda sigma: (1 / root(sigma) ** 2, -sigma / root(sigma)),
    "a velocity of the opposite sign (x0 - noise)": lambda sigma: (1 / (1 + sigma), sigma / (1 + sigma)),
    "the noise with the opposite sign": lambda sigma: (torch.ones_like(sigma), sigma),
    "the score of x / sqrt(1 + sigma^2)": lambda sigma: (torch.ones_like(sigma), sigma**2 / root(sigma)),
}

FORMULAS = {  # the same in words, with x and sigma broadcast
    "the noise": "x - sigma F",
    "a velocity (noise - x0)": "(x - sigma F) / (1 + sigma)",
    "the image x0": "F",
    "the score": "x + sigma^2 F",
    "v of the variance-preserving process": "x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) F",
    "a velocity of the opposite sign (x0 - noise)": "(x + sigma F) / (1 + sigma)",
    "the noise with the opposite sign": "x + sigma F",
    "the score of x / sqrt(1 + sigma^2)": "x + sigma^2 / sqrt(1 + sigma^2) F",
}

SLIPS = {  # likewise, but nobody trains by these
    "a velocity, with x in the place of x / (1 + sigma)": lambda sigma: (1 + 0 * sigma, -sigma / (1 + sigma)),
    "a velocity, with sigma in the place of t": lambda sigma: (1 / (1 + sigma), -sigma),
    "a velocity, not multiplied by t": lambda sigma: (1 / (1 + sigma), -1 + 0 * sigma),
    "the noise, with x / sqrt(1 + sigma^2) in the place of x": lambda sigma: (1 / root(sigma), -sigma),
    "the noise, D left in the scale of x / sqrt(1 + sigma^2)": lambda sigma: (
        1 / root(sigma),
        -sigma / root(sigma),
    ),
    "the noise, not multiplied by sigma": lambda sigma: (1 + 0 * sigma, -1 + 0 * sigma),
}


def edm(s):
    """EDM's input and output with sigma_data s."""
    scale = {f"x / sqrt(sigma^2 + {s:g}^2)": lambda sigma: 1 / root(sigma, s)}
    skip, out = lambda sigma: (s / root(sigma, s)) ** 2, lambda sigma: sigma * s / root(sigma, s)
    return scale, {f"EDM's F with sigma_data {s:g}": lambda sigma: (skip(sigma), out(sigma))}


def vp_step(sigma):
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
def gram(x0, x, said):
    """(..., n d) each -> (..., 4, 4): means over samples and coordinates of the products of x0, x, D, 1."""
    rows = torch.stack([x0, x, said, torch.ones_like(x)], -2)
    return rows @ rows.mT / rows.shape[-1]


def error(grams, p=0.0, q=1.0):
    """mean (p x + q D - x0)^2; p, q broadcast against grams (..., 4, 4).  inf where D is not finite,
    or p x and q D nearly cancel."""
    p, q = (torch.as_tensor(v, dtype=grams.dtype) for v in (p, q))
    g = lambda i, j: grams[..., i, j]
    value = g(0, 0) + p**2 * g(1, 1) + q**2 * g(2, 2) + 2 * (p * q * g(1, 2) - p * g(0, 1) - q * g(0, 2))
    exact = p**2 * g(1, 1) + q**2 * g(2, 2) < 1e6 * (g(0, 0) + g(1, 1))  # else rounding is all that is left
    return torch.where(value.isfinite() & exact, value.clamp_min(0), math.inf)


def best_mix(grams):
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

    def __init__(self, denoiser, x0, noise, levels, spread, batch=512):
        self.denoiser, self.x0, self.noise, self.levels, self.batch = denoiser, x0, noise, levels, batch
        self.spread = spread
        self.trivial = (levels**-2 + spread**-2) ** -1

    def grams(self, scale=None, told=None, shift=(1.0, 0.0)):
        """(M, L, 4, 4) of D asked at scale x, told another sigma, (M, L) each; shift (c, m): at c x + m."""
        c, m = shift
        levels = self.levels.expand(1, -1)
        scale = torch.ones_like(levels) if scale is None else scale
        x0 = self.x0.flatten(1)
        x = x0 + self.levels[:, None, None] * self.noise.flatten(1)  # (L, n, d)
        asked = c * scale[..., None, None] * x + m  # (M, L, n, d)
        heard = (c * (levels if told is None else told))[..., None].expand(asked.shape[:-1])
        rows = asked.reshape(-1, *self.x0.shape[1:]).split(self.batch), heard.flatten().split(self.batch)
        said = torch.cat([self.denoiser(a, h, len(self.x0)) for a, h in zip(*rows)]).reshape(
            len(asked), *x.shape
        )
        x0, x = (v.expand_as(said).flatten(2) for v in (x0, x))
        return gram(x0, x, ((said - m) / c).flatten(2))

    def some(self, n):
        rest = self.levels, self.spread, self.batch // len(self.x0) * min(n, len(self.x0))
        return Samples(self.denoiser, self.x0[:n], self.noise[:n], *rest)

    def relative(self, errors):
        return errors / self.trivial + 0.01


# --- The search for the wiring with the least error.
@dataclass(frozen=True)
class Wiring:
    """Another way to use the network: its relative errors (L,), and what is mended, in words."""

    errors: torch.Tensor
    output: tuple = ()  # (predicted, read as)
    scale: tuple = ()  # (wanted, given)
    time: tuple = ()  # (wanted, told)
    data: str = ""
    given: str = ""  # the scale in which it is given, where that is not what is mended
    bound: torch.Tensor = None  # that of the best mix of x and D

    @property
    def score(self):
        """Mean log error; each thing mended must lower the error by 5 %, or there is no need to mend it."""
        mended = sum(map(bool, (self.output, self.scale, self.time, self.data)))
        return round(self.errors.log().mean().item() + 0.05 * mended, 3)  # of equals the first will do

    @property
    def right(self):
        """Whether nothing is left to mend: no mix of x and D is better, and it knows more than the spread."""
        logs = self.errors.log().mean().item()
        return self.bound is not None and logs - self.bound.log().mean().item() < 0.03 and logs < -0.03


def best(wirings):
    return min(wirings, key=lambda wiring: wiring.score)


def read(grams, rows, sigma, told, scale):
    """Errors (a, b, ...) of what was wired by b, of rows or SLIPS, read by a; the x asked was scale x."""
    wide = lambda values, at: torch.stack(torch.broadcast_tensors(*values)).unsqueeze(at)
    pa, qa = (wide(v, 1) for v in zip(*(row(sigma) for row in rows.values())))
    pb, qb = (wide(v, 0) for v in zip(*(row(told) for row in (rows | SLIPS).values())))
    return error(grams, pa - qa / qb * pb * scale, qa / qb)


def choose(samples, errors, rows, **more):
    """The best pair of rows of errors (a, b, L) -> Wiring.  The first of equals."""
    found, names = samples.relative(errors), [*rows, *SLIPS]
    scores = found.log().mean(-1) + 0.05 * (1 - torch.eye(len(rows), len(names)))
    a, b = divmod(int(scores.round(decimals=4).argmin()), len(names))
    return Wiring(found[a, b], output=() if a == b else (names[a], names[b]), **more)


def as_wired(samples, grams):
    return Wiring(samples.relative(error(grams)), bound=samples.relative(best_mix(grams)[0]))


def outputs(samples, grams, rows):
    """What costs no evaluation: the network gives another thing than it is read as."""
    errors = read(grams, rows, samples.levels, samples.levels, 1.0)
    return choose(samples, errors, rows, bound=samples.relative(best_mix(grams)[0]))


def scales(samples, rows, inputs):
    """What it is given is scaled in another way."""
    levels = samples.levels
    for (a, wanted), (b, given) in product(inputs.items(), inputs.items()):
        if a != b:
            scale = wanted(levels) / given(levels)
            grams = samples.grams(scale[None])[0]
            errors = read(grams, rows, levels, levels, scale)
            yield choose(samples, errors, rows, scale=(a, b), bound=samples.relative(best_mix(grams)[0]))


SHIFTS = {
    "the data are in [0, 1], the network's in [-1, 1]": (2.0, -1.0),
    "the data are in [-1, 1], the network's in [0, 1]": (0.5, 0.5),
    "the data are in [0, 255], the network's in [-1, 1]": (1 / 127.5, -1.0),
    "the data are in [0, 255], the network's in [0, 1]": (1 / 255, 0.0),
} | {
    f"the data are {1 / c:.3g} times as large as the network's": (c, 0.0)
    for c in (0.13025, 0.18215, 1 / 4, 1 / 2.8, 1 / 2, 2.0, 2.8, 4.0, 1 / 0.18215, 1 / 0.13025)
}


def shifts(samples, rows, inputs):
    """It was trained on other data than it is given."""
    for words, shift in SHIFTS.items():
        grams = samples.grams(shift=shift)[0]
        yield Wiring(samples.relative(error(grams)), data=words, bound=samples.relative(best_mix(grams)[0]))


def retold(levels):
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


def times(samples, rows, inputs, crossed=False):
    """It is told another time, whatever is read besides; crossed: and given in another scale."""
    levels, (names, sigmas) = samples.levels, retold(samples.levels)
    at = ((sigmas.log10() + 4) * (len(TOLD) - 1) / 8).clamp(0, len(TOLD) - 1)  # (K, L), in TOLD
    low = at.floor().long().clamp(max=len(TOLD) - 2)
    column = torch.arange(len(levels))
    for (a, wanted), (b, given) in product(inputs.items(), inputs.items()):
        if (a == b) == crossed:
            continue
        scale = wanted(levels) / given(TOLD)[:, None]  # (J, L)
        told = TOLD[:, None].expand_as(scale)
        errors = read(samples.grams(scale, told), rows, levels.expand_as(scale), told, scale)
        logs = samples.relative(errors).log().clamp(max=700)  # (rows, rows, J, L)
        value = torch.lerp(logs[:, :, low, column], logs[:, :, low + 1, column], at - low)
        for i, pair in enumerate(names):
            errors = (value[:, :, i].exp() - 0.01) * samples.trivial
            yield choose(samples, errors, rows, scale=() if a == b else (a, b), time=pair, given=b)


def tables(sigma_data):
    """Outputs and inputs, with EDM's where sigma_data is known."""
    scale, output = edm(sigma_data) if sigma_data else ({}, {})
    return OUTPUTS | output, INPUTS | scale


def deaf(samples, rows, inputs):
    """Whether, read in some way, the network says the same whatever sigma it is told."""
    levels = samples.levels
    told = levels[0] * (levels[-1] / levels[0]) ** torch.linspace(0, 1, 9, dtype=levels.dtype)
    for given in inputs.values():
        scale = given(levels) / given(told)[:, None]
        heard = told[:, None].expand_as(scale)
        errors = read(samples.grams(scale, heard), rows, levels.expand_as(scale), heard, scale)
        logs = samples.relative(torch.stack([errors[i, i] for i in range(len(rows))])).log()  # (rows, J, L)
        if (logs.amax(1) - logs.amin(1)).amax(1).min() < 0.02:
            return True
    return False


def confirm(samples, wiring, rows, inputs):
    """A wiring of another time, which was interpolated, asked for itself."""
    levels, (names, sigmas) = samples.levels, retold(samples.levels)
    told = sigmas[names.index(wiring.time)]
    wanted, given = wiring.scale or 2 * (wiring.given,)
    scale = inputs[wanted](levels) / inputs[given](told)
    grams = samples.grams(scale[None], told[None])[0]
    errors = samples.relative(read(grams, rows, levels, told, scale))
    names = [*rows, *SLIPS]
    pairs = [wiring.output] if wiring.output else zip(rows, rows)
    of = lambda pair: errors[names.index(pair[0]), names.index(pair[1])]
    bound = samples.relative(best_mix(grams)[0])
    return best([replace(wiring, errors=of(pair), bound=bound) for pair in pairs])


def scan(samples, sigma_data=None):
    """What a right D does best in the middle -> factors (9,), mean log errors (9,) of D told these times
    sigma, and the most that is gained, at the best factor of each level, if the network alone hears it."""
    samples = samples.some(48)
    factors, levels = 2.0 ** torch.arange(-4, 5, dtype=torch.float64), samples.levels
    told = levels * factors[:, None]
    direct = samples.relative(error(samples.grams(torch.ones_like(told), told))).log().mean(1)
    rows, inputs = tables(sigma_data)
    gains = []
    for given in inputs.values():
        scale = given(levels) / given(told)
        errors = read(samples.grams(scale, told), rows, levels.expand_as(told), told, scale)
        logs = samples.relative(torch.stack([errors[i, i] for i in range(len(rows))])).log()  # (rows, 9, L)
        gains.append((logs[:, 4] - logs.amin(1)).mean(1))
    return factors, direct, torch.stack(gains).max().item()


def search(samples, grams, sigma_data=None, seconds=math.inf, restless=False):
    """-> the wiring as it is, and the best that is found: of the cheap ones first, until one is right.

    None in its place if the network does not hear sigma.  seconds: after which no further kind is begun.
    restless: do not believe that D is right as it is.
    """
    (rows, inputs), start = tables(sigma_data), time.monotonic()
    found = [as_wired(samples, grams), outputs(samples, grams, rows)]
    for stage in (shifts, scales, times, partial(times, crossed=True)):
        done = best(found).right and not (restless and best(found) is found[0])
        if stage is not scales and (done or time.monotonic() - start > seconds):
            break
        if stage is times and deaf(samples, rows, inputs):
            return found[0], None
        new = sorted(stage(samples, rows, inputs), key=lambda wiring: wiring.score)
        found += [confirm(samples, w, rows, inputs) for w in new[:8]] if new[0].time else new
    return found[0], best(found)
