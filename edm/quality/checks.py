"""The checks of a denoiser(xt, sigma, **cond) that somebody has wired up, and their verdicts.

Each check is a function that returns one Verdict.  `check` calls all that are possible, in their order.
Nothing is random from one call to the next.
"""

import math
from dataclasses import dataclass
from textwrap import TextWrapper
from typing import Any

import torch
from matplotlib.figure import Figure

from edm.images.networks import per_sample
from edm.images.sampler import heun
from edm.quality import wiring

SHORT = 1 / 10, 6  # the noise levels that decide, in spreads of the data: there the readings differ


@dataclass
class Teacher:
    """denoiser(xt, sigma, **cond), and what is known of it.

    x0: (N, *shape), data in a random order, or None.  cond: {name: (N or fewer, ...)}, row i with sample i,
    then again from the first.  other: a cond for the check of captions.  guided: scale -> denoiser.
    """

    denoiser: Any
    shape: tuple
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float | None = None
    x0: torch.Tensor | None = None
    cond: dict | None = None
    other: dict | None = None
    guided: Any = None

    def check(self):
        """Sort out what a user's file says.  Raises ValueError."""
        numbers = (self.sigma_min, self.sigma_max, 1.0 if self.sigma_data is None else self.sigma_data)
        if not all(0 < float(v) < math.inf for v in numbers) or self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min < sigma_max and sigma_data must be positive numbers")
        if self.x0 is not None:
            if not torch.is_tensor(self.x0) or tuple(self.x0.shape[1:]) != self.shape or len(self.x0) < 8:
                found = tuple(getattr(self.x0, "shape", ()))
                raise ValueError(f"data(n) must be 8 samples at least of shape {self.shape}, got {found}")
            if not (self.x0.float().isfinite().all() and self.x0.float().std() > 0):
                raise ValueError("data(n) is not finite, or all one number")
            order = torch.randperm(len(self.x0), generator=torch.Generator().manual_seed(0))
            self.x0 = self.x0.detach().float()[order]
        if self.cond is not None and not all(map(torch.is_tensor, dict(self.cond).values())):
            raise ValueError("cond(n) must be a dictionary of tensors")
        if self.cond and self.x0 is not None:
            if any(len(rows) != len(order) for rows in self.cond.values()):
                raise ValueError("cond(n) must have as many rows as data(n)")
            self.cond = {name: rows[order] for name, rows in self.cond.items()}

    def raw(self, x, sigma, n=None, cond=None, denoiser=None):
        """What it says of float32 x (B, *shape), sigma (B,); row i goes with sample i modulo n."""
        cond, index = self.cond if cond is None else cond, torch.arange(len(x))
        rows = {k: v[index % min(n or len(x), len(v))] for k, v in (cond or {}).items()}
        sigma = per_sample(sigma, x.float()).contiguous()
        try:
            return (denoiser or self.denoiser)(x.float(), sigma, **rows)
        except Exception as error:  # anything: it is somebody's program
            words = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            raise Broken(f"it raises at sigma {sigma[0]:.3g}: {words}") from error

    @torch.no_grad()
    def said(self, x, sigma, n=None, **more):
        """The same, float64, without gradient and without the channels of a learned variance."""
        return self.raw(x, sigma, n, **more)[:, : self.shape[0]].double()


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


def unsaid(name, words):
    return Verdict(name, "not checked", words)


def judged(name, good, words, advice=""):
    return Verdict(name, "ok" if good else "WRONG", words, advice)


def rms(x):
    return x.double().square().mean().sqrt().item()


# --- The function itself.
def shape(teacher, x, sigma):
    """x: a few noisy samples.  -> the verdict, and whether to go on."""
    try:
        with torch.no_grad():
            found = [(len(some), teacher.raw(some, sigma[: len(some)])) for some in (x, x[:1])]
    except Broken as error:
        advice = "it must take xt (B, *shape) and sigma (B,), reshaped to (B, 1, ...), for any B"
        return judged("shape", False, str(error), advice), False
    for count, said in found:
        if not torch.is_tensor(said) or not said.is_floating_point():
            return judged(
                "shape", False, f"it returns {type(said).__name__}", "return D, a float tensor"
            ), False
        if tuple(said.shape) != (count, *teacher.shape):
            twice = tuple(said.shape) == (count, 2 * teacher.shape[0], *teacher.shape[1:])
            advice = "half of the channels are a learned variance: keep F[:, :C]"
            advice = advice if twice else "D has the shape of xt"
            words = f"it returns {tuple(said.shape)} for {(count, *teacher.shape)}"
            return judged("shape", False, words, advice), twice
    narrow = said.dtype in (torch.float16, torch.bfloat16)
    words = f"{teacher.shape}, {str(said.dtype)[6:]}, for batches of 1 and {len(x)}"
    advice = "return xt's float32: sums of x and F in half precision lose what is left at small sigma"
    return judged("shape", not narrow, words, advice), True


def batch(teacher, x, sigma):
    together = teacher.said(x, sigma)
    alone = [teacher.said(x[i : i + 1], sigma[i : i + 1], cond=row(teacher.cond, i)) for i in range(len(x))]
    gap = rms(together - torch.cat(alone)) / rms(together - x.double())
    words = f"a sample alone differs from itself among others by {gap:.1g} of what is denoised"
    return judged("batch", gap < 0.02, words, "network.eval()? one sigma for the whole batch?")


def row(cond, i):
    return {k: v[i % len(v)][None] for k, v in (cond or {}).items()}


def repeat(teacher, x, sigma):
    first, again = (teacher.said(x, sigma) for _ in range(2))
    gap = rms(first - again) / rms(first - x.double())
    words = f"two calls differ by {gap:.1g} of what is denoised"
    return judged("repeat", gap < 1e-4, words, "something in it is random: network.eval(), for dropout")


def finite(teacher, x0, noise):
    levels = ladder(teacher, 16)
    bad = [s for s in levels.tolist() if not teacher.said(x0[:2] + s * noise[:2], s).isfinite().all()]
    words = f"from sigma {levels[0]:.3g} to {levels[-1]:.4g}"
    words += f", but not at {bad[0]:.3g}{' and others' if bad[1:] else ''}" if bad else ""
    return judged("finite", not bad, words, "half precision overflows? float32 around the network; scale xt")


def ladder(teacher, count):
    """Noise levels over its whole range, float64."""
    ends = math.log10(teacher.sigma_min), math.log10(teacher.sigma_max)
    return torch.logspace(*ends, count, dtype=torch.float64).clamp(teacher.sigma_min, teacher.sigma_max)


def small(teacher, x0, noise, spread, advice):
    sigma = teacher.sigma_min
    if sigma > spread / 10:
        return unsaid("sigma -> 0", f"sigma_min {sigma:g} is not small")
    gap = rms(teacher.said(x := x0 + sigma * noise, sigma, len(x0)) - x)
    words = f"D - x is {gap / spread:.2g} of the data's spread at sigma {sigma:.3g}"
    return judged("sigma -> 0", gap < 0.3 * spread + 2 * sigma, words, advice or "D must tend to x there")


def large(teacher, x0, noise, mean, spread, advice):
    """D tends to the data's mean, as well as a network that predicts noise can say: to a share of sigma."""
    sigma = teacher.sigma_max
    if sigma < 15 * spread:
        return unsaid("sigma -> oo", f"sigma_max {sigma:g} is not large")
    said = teacher.said(x0 + sigma * noise, sigma, len(x0))
    centre = said.mean(0)
    around, room = rms(said - centre), 0.5 * spread + 0.15 * sigma
    words = f"in spreads of the data, at sigma {sigma:.4g}, D varies with x by {around / spread:.2g}"
    if not said.isfinite().all():
        return unsaid("sigma -> oo", "D is not finite there")
    good = around < room
    if mean is not None:
        off = rms(centre - mean)
        words += f", its mean is {off / spread:.2g} off"
        good = good and off < room
    return judged("sigma -> oo", good, words, advice or "there D is the mean of the data, whatever x")


def gradient(teacher, x0, noise, levels):
    """v^T J v along random v, by autograd and by differences, at some levels."""
    v = torch.randn(noise[:4].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slopes, steps = [], []
    for sigma in levels.tolist():
        x = x0[:4] + sigma * noise[:4]
        wide, leaf = v.float(), x.float().requires_grad_()
        said = teacher.raw(leaf, sigma)[:, : teacher.shape[0]]
        if said.requires_grad:
            found = torch.autograd.grad((said * wide).sum(), leaf, allow_unused=True)[0]
        slopes.append(0.0 if not said.requires_grad or found is None else (found * wide).sum().item())
        h = 0.01 * sigma
        ends = (teacher.said(x + s * h * v, sigma) for s in (1, -1))
        steps.append(((next(ends) - next(ends)) * v).sum().item() / (2 * h))
    slopes, steps = torch.tensor(slopes), torch.tensor(steps)
    gap = ((slopes - steps).norm() / steps.norm()).item()
    words = f"autograd and differences are {gap:.1g} apart"
    advice = "x is cut off in it, or a part of it: no detach, no_grad, numpy or round"
    if not slopes.any():
        words, advice = "none reaches x", "theta learns through x: no detach, no_grad, numpy or round in it"
    return judged("gradient", gap < 0.1, words, advice)


# --- On data.
def centre(teacher, spread):
    """The levels that decide."""
    low, high = (math.log10(share * spread) for share in SHORT)
    levels = torch.logspace(low, high, 8, dtype=torch.float64)
    return levels.clamp(teacher.sigma_min, teacher.sigma_max)


def mean_of(x):
    return x.log().mean().exp().item()


def denoising(own):
    ratio = mean_of(own.errors)
    words = (
        f"{ratio:.3g} of the best linear denoiser's, at {SHORT[0]:g} to {SHORT[1]:g} times the data's spread"
    )
    advice = "see wiring; else: trained at all? are these its data?"
    return judged("error", ratio < 1.25, words, advice)


def better(own, found):
    """Whether another wiring is so much better that this one must be wrong."""
    return found is not own and (found.right or mean_of(found.errors / own.errors) < 0.75)


def wired(own, found, wrong):
    """What is read, given and fed."""
    slack = mean_of(own.errors / own.bound)
    gain = f"mended, the error is {mean_of(found.errors / own.errors):.2g} of this"
    parts, advice = [], []
    if not found.right:
        parts.append("nothing that was tried makes it right, but best is that")
    if found.output:
        a, b = found.output
        parts.append(f"the network predicts {a} and is read as {b}")
        advice.append(f"D = {wiring.FORMULAS.get(a, 'c_skip x + c_out F')}")
    if found.scale:
        parts.append(f"it is given {found.scale[1]} where it expects {found.scale[0]}")
        advice.append(f"give it {found.scale[0]}")
    if found.data:
        parts.append(found.data)
        advice.append("bring the data into its units; for latents, times the VAE's scaling factor")
    if wrong and advice:
        return Verdict("wiring", "WRONG", "; ".join([*parts, gain]), "; ".join(advice))
    if wrong:
        return Verdict("wiring", "ok", "the output and the scale of x are not what is wrong: see sigma")
    words = f"no other that was tried is better; the best a x + b D + c has {1 / slack:.2f} of D's error"
    return Verdict("wiring", "ok", words)


def misread(samples, own, grams):
    """The network is right, and D is a mix of x and F that nobody knows."""
    a, b, c = wiring.best_mix(grams)[1][4].tolist()
    words = (
        f"x0 is {a:.2g} x + {b:.2g} D + {c:.2g}, and not D, at sigma {samples.levels[4]:.2g}; so at every "
    )
    words += f"sigma, the error is {mean_of(own.bound / own.errors):.2g} of this"
    advice = "D = p x + q F with another p or q than in training: see FORMULAS in edm/quality/wiring.py"
    return Verdict("wiring", "WRONG", words, advice)


def told(scanned, own, found, wrong):
    """The sigma that it is told, against the one that is true."""
    if wrong and found.time:
        a, b = found.time
        words = f"it is told {b} where it expects {a}; mended, the error is "
        words += f"{mean_of(found.errors / own.errors):.2g} of this"
        backwards = a.startswith("1 - ") or b.startswith("1 - ")
        advice = f"tell it {a}" + ("; its time runs backwards, t and 1 - t exchanged" if backwards else "")
        if not found.right:
            advice += (
                ", or the like: of sigma, its log, t and 1000 t nothing that was tried makes it all right"
            )
        return Verdict("sigma", "WRONG", words, advice)
    if wrong:
        return unsaid("sigma", "mend the wiring first")
    factors, logs, _ = scanned
    least = int(logs.argmin())
    words = f"the error is least when told {factors[least]:g} sigma"
    good = 0.5 <= factors[least] <= 2 or (logs[4] - logs[least]).item() < 0.3
    return judged("sigma", good, words, "the time it hears belongs to another sigma: log, square, 1000 t?")


DEAF = Verdict(
    "sigma", "WRONG", "the network says the same whatever sigma it is told",
    "a constant? t in [0, 1] where 0 to 1000 is expected, or the reverse?",
)  # fmt: skip


def labels(teacher, samples):
    """Whether conditions are heard, and, on data, whether they are the right ones."""
    heard = teacher.other or teacher.cond
    if not heard or max(map(len, heard.values())) < 2:
        return unsaid("labels", "there are none")
    n, sigma = len(samples.x0), samples.levels[4].item()
    x = samples.x0 + sigma * samples.noise
    swapped = {k: v.roll(1, 0) for k, v in heard.items()}
    said, other = (teacher.said(x, sigma, n, cond=c) for c in (heard, swapped))
    effect = rms(said - other) / rms(said - x)
    words = f"other ones change D by {effect:.2g} of what is denoised"
    if effect < 1e-4:
        return judged("labels", False, words, "they have no effect: passed on? an embedding that is used?")
    if teacher.other is None and teacher.x0 is not None:
        ratio = rms(said - samples.x0) ** 2 / rms(other - samples.x0) ** 2
        words += f"; right ones have {ratio:.2g} of their error"
        advice = "labels of other samples, or counted from 1 and not from 0?"
        return judged("labels", ratio < 1.03, words, advice)
    return Verdict("labels", "ok", words)


def guidance(teacher, x, sigma):
    if not (teacher.guided and teacher.other):
        return unsaid("guidance", "there is none")
    n = len(next(iter(teacher.other.values())))
    scales = (1.0, 2.0, 4.0)
    one, two, four = (
        teacher.said(x, sigma, n, cond=teacher.other, denoiser=teacher.guided(scale)) for scale in scales
    )
    gap = rms(four - one - 3 * (two - one)) / max(rms(two - one), 1e-12)
    return judged(
        "guidance", gap < 0.02, f"D is affine in the scale to {gap:.1g}", "D_null + scale (D - D_null)"
    )


def units(teacher, data):
    if teacher.sigma_data is None or data is None:
        return unsaid("sigma_data", "needs data and the network's sigma_data")
    ratio = data.double().std().item() / teacher.sigma_data
    words = f"the data's std is {ratio:.2g} times the network's {teacher.sigma_data:g}"
    advice = "data in [-1, 1]? latents times the VAE's scaling factor? the sigma_data of its training?"
    return judged("sigma_data", 0.4 < ratio < 2.5, words, advice)


# --- All of them.
def prepare(teacher, images):
    """-> x0, noise (n, *shape) float64, the data's mean or None, their spread."""
    n = images or min(256, max(8, 24_576 // math.prod(teacher.shape)))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(n, *teacher.shape, generator=rng, dtype=torch.float64)
    if teacher.x0 is None:  # samples of its own, which must do
        size, ends = min(n, 8), (teacher.sigma_min, teacher.sigma_max)
        denoiser = lambda x, sigma: teacher.said(x, sigma, size)
        x0 = heun(denoiser, noise[:size].float(), 12, *ends)
        return x0, noise[:size].flip(0), None, teacher.sigma_data or 0.5
    data = teacher.x0.double()
    mean = data.mean(0)
    return data[:n], noise[: len(data)], mean, rms(data - mean)


def attempt(name, function, *args):
    """The verdict of a check in which the denoiser may raise."""
    try:
        return function(*args)
    except Broken as error:
        return judged(name, False, str(error), "it must take any x, sigma and cond that the data have")


def check(teacher, images=None, seconds=math.inf):
    """-> [Verdict, ...], and a Figure, or None where there is nothing to draw."""
    x = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    sigma = torch.tensor([0.5, 1.0, 2.0])
    verdict, go_on = shape(teacher, x, sigma)
    if not go_on:
        return [verdict], None
    found = [verdict, attempt("repeat", repeat, teacher, x, sigma)]
    if steady := found[1].state == "ok":
        found.append(attempt("batch", batch, teacher, x, sigma))
    try:
        x0, noise, mean, spread = prepare(teacher, images)
        levels = centre(teacher, spread)
        samples = wiring.Samples(teacher.said, x0, noise, levels, spread, batch=len(x0) * 8)
        words, figure, advice = "needs data: --data, or data(n) in FILE.py", None, ""
        if above := any(v.state == "WRONG" for v in found[1:]):
            words = "mend the above first"
        on_data = [unsaid(name, words) for name in ("error", "wiring", "sigma")]
        if mean is not None and not above:
            on_data, advice, figure = by_data(teacher, samples, seconds)
    except Broken as error:
        return [*found, judged("error", False, str(error), "it must take the data and their labels")], None
    found += [
        attempt("finite", finite, teacher, x0, noise),
        attempt("gradient", gradient, teacher, x0, noise, levels) if steady else unsaid("gradient", words),
        attempt("sigma -> 0", small, teacher, x0, noise, spread, advice),
        attempt("sigma -> oo", large, teacher, x0, noise, mean, spread, advice),
        *on_data,
        attempt("labels", labels, teacher, samples),
        attempt("guidance", guidance, teacher, x[:1], sigma[:1]),
        units(teacher, teacher.x0),
    ]
    return found, figure


def by_data(teacher, samples, seconds):
    """-> three verdicts, where to look if the wiring is wrong, the figure."""
    grams = samples.grams()[0]
    own = found = wiring.as_wired(samples, grams)
    if not own.errors.isfinite().all():
        return [denoising(own), *(unsaid(name, "D is not finite") for name in ("wiring", "sigma"))], "", None
    scanned = wiring.scan(samples, teacher.sigma_data)
    restless = scanned[2] > 0.05
    if restless or mean_of(own.errors / own.bound) > 1.05 or mean_of(own.errors) > 1.02:
        own, found = wiring.search(samples, grams, teacher.sigma_data, seconds, restless)
    if found is None:
        return (
            [denoising(own), unsaid("wiring", "mend sigma first"), DEAF],
            "see sigma",
            draw(teacher, samples),
        )
    wrong = better(own, found)
    simple = found.output and not (found.scale or found.time)
    enough = 0.9 if simple or not wrong else 0.97
    if mean_of(own.bound / found.errors) < enough and mean_of(own.errors / own.bound) > 1.3:
        verdicts = [denoising(own), misread(samples, own, grams), unsaid("sigma", "mend the wiring first")]
        return verdicts, "see wiring", draw(teacher, samples)
    verdicts = [denoising(own), wired(own, found, wrong), told(scanned, own, found, wrong)]
    advice = "see wiring and sigma" if any(v.state == "WRONG" for v in verdicts) else ""
    return verdicts, advice, draw(teacher, samples, found if wrong else None)


# --- The picture.
def draw(teacher, samples, found=None):
    """Error over sigma: of D, of D read in every other way, of what needs no network; found: if mended."""
    levels = ladder(teacher, 16)
    wide = wiring.Samples(samples.denoiser, samples.x0, samples.noise, levels, samples.spread, samples.batch)
    grams, rows = wide.grams()[0], wiring.tables(teacher.sigma_data)[0]
    figure = Figure(figsize=(7, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    others = wiring.read(grams, rows, levels, levels, 1.0).flatten(0, 1)
    for i, line in enumerate(others):
        axes.plot(levels, line, color="0.8", lw=0.5, label="D read in other ways" if i == 0 else None)
    spread = samples.spread
    for label, style, line in (
        ("x itself", ":", levels**2),
        ("the data's mean", "--", torch.full_like(levels, spread**2)),
        ("best linear denoiser", "-.", wide.trivial),
    ):
        axes.plot(levels, line, style, color="black", lw=1, label=label)
    own = wiring.error(grams)
    axes.plot(levels, own, color="tab:red" if found else "tab:blue", lw=2.5, label="D as it is wired")
    if found:
        errors = (found.errors - 0.01) * samples.trivial
        axes.plot(
            samples.levels, errors, "o-", color="tab:green", lw=2, ms=4, label="mended: see the verdict"
        )
    axes.axvspan(*samples.levels[[0, -1]].tolist(), color="tab:blue", alpha=0.06, lw=0, label="what decides")
    axes.set(xscale="log", yscale="log", xlim=(levels[0], levels[-1]), xlabel="sigma")
    axes.set_ylim(0.2 * min(levels[0] ** 2, spread**2), 30 * spread**2)
    axes.set_ylabel("denoising error, squared, per coordinate")
    axes.legend(fontsize=8, loc="lower right")
    return figure
