"""The checks of a denoiser(xt, sigma, **cond) that somebody has wired up, and their verdicts.

What is checked is a `Teacher` of edm/check_teacher.py, which raises Broken where the denoiser raises.
Each check is a function that returns whether it is right, or None where that cannot be said, words and
advice.  `check` calls all that are possible, in their order.  Nothing is random from one call to the next.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import TextWrapper
from typing import Any

import torch
from torch import Tensor

from edm.images.sampler import heun
from edm.quality import wiring

SHORT = 0.1, 6  # the noise levels that decide, in spreads of the data: there the readings differ
HALF = "half of the channels are a learned variance: keep F[:, :C]"
NARROW = "return xt's float32: sums of x and F in half precision lose what is left at small sigma"


class Broken(Exception):
    """The denoiser itself has raised."""


@dataclass(frozen=True)
class Verdict:
    name: str
    state: str  # ok, WRONG, not checked
    words: str
    advice: str = ""

    def __str__(self):
        wrap = TextWrapper(110, subsequent_indent=" " * 24)
        lines = wrap.wrap(f"{self.state:12}{self.name:12}{self.words}")
        wrap.initial_indent = " " * 24
        return "\n".join(lines + (wrap.wrap(f"-> {self.advice}") if self.state == "WRONG" else []))


def judge(name: str, function: Callable, *args) -> Verdict:  # of a check, in which the denoiser may raise
    try:
        good, *words = function(*args)
    except Broken as error:
        good, words = False, (str(error), "it must take xt (B, *shape), sigma (B,) and cond for any B")
    return Verdict(name, "not checked" if good is None else "ok" if good else "WRONG", *words)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# --- The function itself.  x (3, *shape): a few noisy samples.
def shape(teacher: Any, x: Tensor, sigma: Tensor) -> tuple:
    for some in (x, x[:1]):
        with torch.no_grad():
            said = teacher.raw(some, sigma[: len(some)])
        if not torch.is_tensor(said) or not said.is_floating_point():
            return False, f"it returns {type(said).__name__}", "return D, a float tensor"
        if said.shape != some.shape:
            twice = said.shape == torch.cat([some, some], 1).shape
            words = f"it returns {tuple(said.shape)} for {tuple(some.shape)}"
            return False, words, HALF if twice else "D has the shape of xt"
    words = f"{teacher.shape}, {str(said.dtype)[6:]}, for batches of 1 and {len(x)}"
    return said.dtype not in (torch.float16, torch.bfloat16), words, NARROW


def repeat(teacher: Any, x: Tensor, sigma: Tensor) -> tuple:
    first, again = (teacher.said(x, sigma) for _ in range(2))
    gap = rms(first - again) / rms(first - x.double())
    return gap < 1e-4, f"two calls differ by {gap:.1g} of what is denoised", "network.eval(), for dropout?"


def batch(teacher: Any, x: Tensor, sigma: Tensor) -> tuple:
    row = lambda i: {k: v[i % len(v)][None] for k, v in (teacher.cond or {}).items()}
    alone = [teacher.said(x[i : i + 1], sigma[i : i + 1], cond=row(i)) for i in range(len(x))]
    together = teacher.said(x, sigma)
    gap = rms(together - torch.cat(alone)) / rms(together - x.double())
    words = f"a sample alone differs from itself among others by {gap:.1g} of what is denoised"
    return gap < 0.02, words, "network.eval()? one sigma for the whole batch?"


def finite(teacher: Any, x0: Tensor, noise: Tensor) -> tuple:
    levels = ladder(teacher)
    bad = [s for s in levels.tolist() if not teacher.said(x0[:2] + s * noise[:2], s).isfinite().all()]
    words = f"from sigma {levels[0]:.3g} to {levels[-1]:.4g}"
    words += f", but not at {bad[0]:.3g}{' and others' if bad[1:] else ''}" if bad else ""
    return not bad, words, "half precision overflows? float32 around the network; scale xt"


def ladder(teacher: Any, count=16, low=0.0, high=math.inf) -> Tensor:  # noise levels of its range, float64
    low, high = (min(max(v, teacher.sigma_min), teacher.sigma_max) for v in (low, high))
    levels = torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)
    return levels.clamp(low, high)


def small(teacher: Any, x0: Tensor, noise: Tensor, spread: float, advice: str) -> tuple:
    sigma = teacher.sigma_min
    if sigma > spread / 10:
        return None, f"sigma_min {sigma:g} is not small"
    gap = rms(teacher.said(x := x0 + sigma * noise, sigma, len(x0)) - x)
    words = f"D - x is {gap / spread:.2g} of the data's spread at sigma {sigma:.3g}"
    return gap < 0.3 * spread + 2 * sigma, words, advice or "D must tend to x there"


def large(teacher: Any, x0: Tensor, noise: Tensor, mean: Tensor | None, spread: float, advice: str) -> tuple:
    """D tends to the data's mean, as well as a network that predicts noise can say: to a share of sigma."""
    sigma = teacher.sigma_max
    if sigma < 15 * spread:
        return None, f"sigma_max {sigma:g} is not large"
    said = teacher.said(x0 + sigma * noise, sigma, len(x0))
    if not said.isfinite().all():
        return None, "D is not finite there"
    gaps = [rms(said - said.mean(0))] + ([] if mean is None else [rms(said.mean(0) - mean)])
    words = f"in spreads of the data, at sigma {sigma:.4g}, D varies with x by {gaps[0] / spread:.2g}"
    words += f", its mean is {gaps[1] / spread:.2g} off" if gaps[1:] else ""
    return max(gaps) < 0.5 * spread + 0.15 * sigma, words, advice or "D is the data's mean there, whatever x"


def gradient(teacher: Any, x0: Tensor, noise: Tensor, levels: Tensor) -> tuple:
    """v^T J v along random v, by autograd and by differences, at some levels."""
    v = torch.randn(noise[:4].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slopes = torch.zeros(2, len(levels))
    for i, sigma in enumerate(levels.tolist()):
        x, h = x0[:4] + sigma * noise[:4], 0.01 * sigma
        leaf = x.float().requires_grad_()
        along = (teacher.raw(leaf, sigma)[:, : teacher.shape[0]] * v.float()).sum()
        if along.requires_grad:
            found = torch.autograd.grad(along, leaf, allow_unused=True)[0]
            slopes[0, i] = 0 if found is None else (found * v).sum()
        ends = [teacher.said(x + s * h * v, sigma) for s in (1, -1)]
        slopes[1, i] = ((ends[0] - ends[1]) * v).sum() / (2 * h)
    gap = ((slopes[0] - slopes[1]).norm() / slopes[1].norm()).item()
    words = f"autograd and differences are {gap:.1g} apart" if slopes[0].any() else "none reaches x"
    return gap < 0.1, words, "theta learns through x: no detach, no_grad, numpy or round in a part of it"


# --- On data.
def mean_of(x: Tensor) -> float:
    return x.log().mean().exp().item()


def denoising(own: wiring.Wiring) -> tuple:
    ratio = mean_of(own.errors)
    words = f"{ratio:.3g} of the best linear denoiser's, at 0.1 to 6 times the data's spread"
    return ratio < 1.25, words, "see wiring; else: trained at all? are these its data?"


def named(own: wiring.Wiring, found: wiring.Wiring, rows: dict[str, str]) -> tuple[tuple, tuple]:
    """What a better wiring mends -> of the wiring, of sigma."""
    gain, time = mean_of(found.errors / own.errors), found.time
    backwards = "; its time runs backwards, t and 1 - t exchanged" if "1 - " in [v[:4] for v in time] else ""
    formula = rows[found.output[0]] if found.output else ""
    parts = (
        (found.output, "the network predicts {} and is read as {}", f"D = {formula}"),
        (found.scale, "it is given {1} where it expects {0}", "give it {}"),
        (found.data, "{}", "bring the data into its units; for latents, times the VAE's scaling factor"),
    )
    start = "perhaps: " if gain > 0.75 else "" if found.right else "nothing tried makes it right, best is: "

    def say(parts, otherwise):
        if not (parts := [part for part in parts if part[0]]):
            return otherwise
        words, advice = ("; ".join(part[i].format(*part[0]) for part in parts) for i in (1, 2))
        return False, f"{start}{words}; mended, the error is {gain:.2g} of this", advice

    times = [(time, "it is told {1} where it expects {0}", f"tell it {{}}{backwards}")]
    fine = (True, "the output and the scale of x are not what is wrong: see sigma")
    return say(parts, fine), say(times, (None, "mend the wiring first"))


DEAF = (False, "the network says the same whatever sigma it is told",
        "a constant? t in [0, 1] where 0 to 1000 is expected, or the reverse?")  # fmt: skip


def misread(samples: wiring.Samples, own: wiring.Wiring, grams: Tensor) -> tuple:
    """The network is right, and D is a mix of x and F that nobody knows."""
    a, b, c = wiring.best_mix(grams)[1][4].tolist()
    words = f"x0 is {a:.2g} x + {b:.2g} D + {c:.2g}, and not D, at sigma {samples.levels[4]:.2g}; "
    words += f"so at every sigma, the error is {mean_of(own.bound / own.errors):.2g} of this"
    return False, words, "D = p x + q F with another p or q than in training: see edm/quality/wiring.py"


def confirmed(own: wiring.Wiring, factors: list[float], logs: Tensor) -> tuple[tuple, tuple]:
    """Nothing is better -> of the wiring, of sigma."""
    share, least = mean_of(own.bound / own.errors), int(logs.argmin())
    words = f"no other that was tried is better; the best a x + b D + c has {share:.2f} of D's error"
    good = 0.5 <= factors[least] <= 2 or (logs[4] - logs[least]).item() < 0.3
    advice = "the time it hears belongs to another sigma: log, square, 1000 t?"
    return (True, words), (good, f"the error is least when told {factors[least]:g} sigma", advice)


def by_data(teacher: Any, samples: wiring.Samples, seconds: float) -> tuple:
    """-> of the error, of the wiring, of sigma, and what is drawn: samples, and the wiring that is better."""
    grams, (rows, inputs) = samples.grams(), wiring.tables(teacher.sigma_data)
    own = found = wiring.as_wired(samples, grams)
    if not own.errors.isfinite().all():
        return denoising(own), *2 * [(None, "D is not finite")], None
    factors, logs, gain, deaf = wiring.scan(samples, rows, inputs)
    slack = mean_of(own.errors / own.bound)
    if gain > 0.05 or slack > 1.05 or mean_of(own.errors) > 1.02:
        deaf = deaf and slack > 1.1  # else there is nothing to be heard: of Gaussian data a linear D is right
        found = wiring.search(samples, own, rows, inputs, seconds, gain > 0.05, deaf)
    better, less = None, 0.97 if found and (found.scale or found.time) else 0.9
    if found is None:
        of = (None, "mend sigma first"), DEAF
    elif slack > 1.3 and mean_of(own.bound / found.errors) < less:
        of = misread(samples, own, grams), (None, "mend the wiring first")
    elif found is not own and (found.right or mean_of(found.errors / own.errors) < 0.75):
        of, better = named(own, found, rows), found
    else:
        of = confirmed(own, factors, logs)
    return denoising(own), *of, (samples, better)


def labels(teacher: Any, samples: wiring.Samples) -> tuple:
    """Whether conditions are heard, and, on data, whether they are the right ones."""
    heard = teacher.other or teacher.cond
    if not heard or max(map(len, heard.values())) < 2:
        return None, "there are none"
    n, sigma = len(samples.x0), samples.levels[4].item()
    x = samples.x0 + sigma * samples.noise
    swapped = {k: v.roll(1, 0) for k, v in heard.items()}
    said, other = (teacher.said(x, sigma, n, cond=cond) for cond in (heard, swapped))
    effect = rms(said - other) / rms(said - x)
    words = f"other ones change D by {effect:.2g} of what is denoised"
    if effect < 1e-4 or teacher.other or teacher.x0 is None:
        return effect >= 1e-4, words, "they have no effect: passed on? an embedding that is used?"
    ratio = (rms(said - samples.x0) / rms(other - samples.x0)) ** 2
    words += f"; right ones have {ratio:.2g} of their error"
    return ratio < 1.03, words, "labels of other samples, or counted from 1 and not from 0?"


def guidance(teacher: Any, x: Tensor, sigma: Tensor) -> tuple:
    if not (teacher.guided and teacher.other):
        return None, "there is none"
    at = lambda scale: teacher.said(x, sigma, cond=teacher.other, denoiser=teacher.guided(scale))
    one, two, four = at(1), at(2), at(4)
    gap = rms(four - one - 3 * (two - one)) / max(rms(two - one), 1e-12)
    return gap < 0.02, f"D is affine in the scale to {gap:.1g}", "D_null + scale (D - D_null)"


def units(teacher: Any) -> tuple:
    if teacher.sigma_data is None or teacher.x0 is None:
        return None, "needs data and the network's sigma_data"
    ratio = teacher.x0.double().std().item() / teacher.sigma_data
    words = f"the data's std is {ratio:.2g} times the network's {teacher.sigma_data:g}"
    return 0.4 < ratio < 2.5, words, "data in [-1, 1]? latents times the VAE's scaling factor?"


# --- All of them.
def prepare(teacher: Any, images: int | None) -> tuple[wiring.Samples, Tensor | None]:  # the data's mean
    n = images or min(256, max(8, 24_576 // math.prod(teacher.shape)))
    rng = torch.Generator().manual_seed(0)
    noise, mean = torch.randn(n, *teacher.shape, generator=rng, dtype=torch.float64), None
    if teacher.x0 is None:  # samples of its own, which must do
        size, spread = min(n, 8), teacher.sigma_data or 0.5
        denoiser, z = lambda x, sigma: teacher.said(x, sigma, size), noise[:size]
        x0, noise = heun(denoiser, z.float(), 12, teacher.sigma_min, teacher.sigma_max), z.flip(0)
    else:
        data = teacher.x0.double()
        x0, noise, mean = data[:n], noise[: len(data)], data.mean(0)
        spread = rms(data - mean)
    levels = ladder(teacher, 8, *(share * spread for share in SHORT))
    return wiring.Samples(teacher.said, x0, noise, levels, spread), mean


def check(teacher: Any, images: int | None = None, seconds=math.inf) -> tuple[list[Verdict], tuple | None]:
    """-> [Verdict, ...], and what is drawn, or None."""
    x = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    few = teacher, x, torch.tensor([0.5, 1.0, 2.0])
    found = [judge("shape", shape, *few)]
    if found[0].state != "ok" and found[0].advice not in (HALF, NARROW):
        return found, None
    found += [judge("repeat", repeat, *few)]
    if steady := found[1].state == "ok":
        found += [judge("batch", batch, *few)]
    above, drawn, advice = any(v.state == "WRONG" for v in found[1:]), None, ""
    on_data = 3 * [(None, "mend the above first" if above else "needs data: --data, or data(n) in FILE.py")]
    try:
        samples, mean = prepare(teacher, images)
        if mean is not None and not above:
            *on_data, drawn = by_data(teacher, samples, seconds)
            advice = "see wiring and sigma" if any(good is False for good, *_ in on_data) else ""
    except Broken as error:
        return [*found, Verdict("error", "WRONG", str(error), "it must take the data and their labels")], None
    x0, noise, spread = samples.x0, samples.noise, samples.spread
    found += [
        judge("finite", finite, teacher, x0, noise),
        judge("gradient", gradient if steady else lambda *_: on_data[0], teacher, x0, noise, samples.levels),
        judge("sigma -> 0", small, teacher, x0, noise, spread, advice),
        judge("sigma -> oo", large, teacher, x0, noise, mean, spread, advice),
        *(judge(name, lambda of=of: of) for name, of in zip(("error", "wiring", "sigma"), on_data)),
        judge("labels", labels, teacher, samples),
        judge("guidance", guidance, teacher, x[:1], few[2][:1]),
        judge("sigma_data", units, teacher),
    ]
    return found, drawn
