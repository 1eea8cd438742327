"""The mistakes that are made in toy/exercises.ipynb: exercise -> what is said -> an answer that makes it.

To be read after the exercises.  A mistake is known by its numbers, so these are answers that run.
"""

import torch

import sim_core as sim


def dot(a, b):
    return (a * b).sum(1)


def power(sigma, n):
    return sigma[:, None] ** n


FLIPPED = "the sign is flipped: it points away from the data"
MEAN = "half of it: a factor 1/2, or a mean over the coordinates; an inner product sums over them"

SCORE = {  # (denoised or x0, xt, sigma)
    FLIPPED: lambda D, xt, s: (xt - D) / power(s, 2),
    "sigma is not squared": lambda D, xt, s: (D - xt) / power(s, 1),
    "wrong space: this is the noise, not the score": lambda D, xt, s: (xt - D) / power(s, 1),
    "it is not divided by any power of sigma": lambda D, xt, s: D - xt,
    "it is multiplied by the power of sigma, not divided": lambda D, xt, s: (D - xt) * power(s, 2),
    "wrong space: this is the clean point that went in": lambda D, xt, s: D,
    "xt is detached: gradient flows through it, too": lambda D, xt, s: (D - xt.detach()) / power(s, 2),
    "all of it is detached": lambda D, xt, s: ((D - xt) / power(s, 2)).detach(),
}
CONDITIONAL = {  # (xt, x0, sigma)
    words: lambda xt, x0, s, wrong=wrong: wrong(x0, xt, s)
    for words, wrong in SCORE.items()
    if not words.startswith("xt is detached")
}


def averaged(reduce=lambda p: p.sum(1).mean(), sign=1.0, over=1, level=1, at_x0=False, square=False):
    """An answer to (A.1), right unless told otherwise."""

    def answer(u, score, x0, sigma, noise):
        xt = x0 + power(sigma, level) * noise
        residual = score(xt, sigma) + sign * noise / power(sigma, over)
        return reduce((residual if square else u(x0 if at_x0 else xt)) * residual)

    return answer


PROJECTION = {
    "a sum over the batch where its mean is asked for": averaged(lambda p: p.sum()),
    MEAN: averaged(lambda p: p.mean()),
    "the conditional score is added, not subtracted": averaged(sign=-1.0),
    "in the conditional score a power of sigma is missing": averaged(over=0),
    "the noise is scaled by sigma^2 on its way into xt": averaged(level=2),
    "u looks at x0; it may see nothing but xt": averaged(at_x0=True),
    "this is E|s - grad log q|^2, denoising score matching; u is not in it": averaged(square=True),
}


def exp_row(front=lambda a, b: a * b, less_one=1, inside=lambda y, a, b: b * (y**a).sum(1, True), minus=0.0):
    return lambda y, a, b: front(a, b) * (torch.exp(inside(y, a, b)) - minus) * y ** (a - less_one)


EXP = {  # (y, alpha, beta)
    "beta is missing in front (Table 4 forgets it): differentiate d": exp_row(lambda a, b: a),
    "alpha is missing in front": exp_row(lambda a, b: b),
    "y has the power alpha; a derivative has one less": exp_row(less_one=0),
    "each coordinate has its own exponential; the norm is the whole vector's": exp_row(
        inside=lambda y, a, b: b * y**a
    ),
    "the norm runs over the batch, too; each sample has its own": exp_row(
        inside=lambda y, a, b: b * (y**a).sum()
    ),
    "beta is missing in the exponent": exp_row(inside=lambda y, a, b: (y**a).sum(1, True)),
    "the 1 of d is still there; it has no derivative": exp_row(minus=1.0),
    "the exponential is detached": exp_row(inside=lambda y, a, b: b * (y.detach() ** a).sum(1, True)),
    "all of it is detached": lambda y, a, b: exp_row()(y.detach(), a, b),
}


def unit(y, c):
    return y / (dot(y, y) + c**2).sqrt()[:, None]


PSEUDO_HUBER = {  # (y, c)
    "twice too much (Table 4's factor 2 is spurious): differentiate d": lambda y, c: 2 * unit(y, c),
    "c is not squared": lambda y, c: unit(y, c**0.5),
    "c is missing": lambda y, c: unit(y, 0),
    "the root is missing": lambda y, c: y / (dot(y, y) + c**2)[:, None],
    "c is outside the root": lambda y, c: y / (y.norm(dim=1, keepdim=True) + c),
    "each coordinate has its own root; the norm is the whole vector's": lambda y, c: y / (y**2 + c**2).sqrt(),
    "the norm runs over the batch, too; each sample has its own": lambda y, c: (
        y / ((y**2).sum() + c**2).sqrt()
    ),
    "the root is detached": lambda y, c: y / (dot(y, y) + c**2).sqrt().detach()[:, None],
    "all of it is detached": lambda y, c: unit(y, c).detach(),
}

D_DETACHED = "d' is detached: gradient flows inside d'(y), too"
AT_TARGET = "d' looks at fake - target, not at y"
SURROGATE = {  # (d', fake, teacher, target)
    "the sign is flipped: this climbs": lambda g, f, q, x: dot(g(f - q), f - x),
    D_DETACHED: lambda g, f, q, x: -dot(g(f - q).detach(), f - x),
    "the residual is against the teacher, not against the target": lambda g, f, q, x: -dot(g(f - q), f - q),
    "the residual is the teacher's, not the fake's": lambda g, f, q, x: -dot(g(f - q), q - x),
    MEAN: lambda g, f, q, x: -(g(f - q) * (f - x)).mean(1),
    "the fake is detached: its parameters are stopped, its argument xt is not": lambda g, f, q, x: (
        -dot(g(f.detach() - q), f.detach() - x)
    ),
    "the teacher is detached: its parameters are frozen, its argument xt is not": lambda g, f, q, x: (
        -dot(g(f - q.detach()), f - x)
    ),
    "the target is detached: theta moves x0": lambda g, f, q, x: -dot(g(f - q), f - x.detach()),
    "the residual is detached": lambda g, f, q, x: -dot(g(f - q), (f - x).detach()),
    AT_TARGET: lambda g, f, q, x: -dot(g(f - x), f - x),
    "y itself stands where d'(y) should": lambda g, f, q, x: -dot(f - q, f - x),
    "all of it is detached": lambda g, f, q, x: -dot(g(f - q), f - x).detach(),
}
PRINTED = {  # (d', stopped, live, teacher, conditional)
    "this is (A.4), which trains; here write (A.5) as it is printed": lambda g, s, p, q, c: (
        -dot(g(s - q), s - c)
    ),
    "the conditional score is added": lambda g, s, p, q, c: -dot(g(s - q), p + c),
    "the residual is against the teacher": lambda g, s, p, q, c: -dot(g(s - q), p - q),
    D_DETACHED: lambda g, s, p, q, c: -dot(g(s - q).detach(), p - c),
}
STOPPED = {  # (law, means, xt, sigma)
    "nothing is stopped: as in (A.5), the surrogate's gradient vanishes": lambda law, m, xt, s: law(m).score(
        xt, s
    ),
    "all of it is stopped; xt must stay live": lambda law, m, xt, s: law(m).score(xt, s).detach(),
    "xt is stopped and the parameters are live: the other way round": lambda law, m, xt, s: law(m).score(
        xt.detach(), s
    ),
    "wrong space: this is the denoiser, not the score": lambda law, m, xt, s: law(m.detach()).denoiser(xt, s),
}
FULL = {  # (d, d', fake, teacher, target)
    "d(y) is missing: this is SIM's, with the law held still": lambda d, g, f, q, x: -dot(g(f - q), f - x),
    "d(y) is subtracted": lambda d, g, f, q, x: -dot(g(f - q), f - x) - d(f - q),
    "d(y) is detached: its gradient along xt is what is asked for": lambda d, g, f, q, x: (
        -dot(g(f - q), f - x) + d(f - q).detach()
    ),
    "this is d(y) alone, the half that the theorem leaves out": lambda d, g, f, q, x: d(f - q),
    "the surrogate's sign is flipped": lambda d, g, f, q, x: dot(g(f - q), f - x) + d(f - q),
    D_DETACHED: lambda d, g, f, q, x: -dot(g(f - q).detach(), f - x) + d(f - q),
    "d looks at fake - target, not at y": lambda d, g, f, q, x: -dot(g(f - q), f - x) + d(f - x),
    "d(y) is halved": lambda d, g, f, q, x: -dot(g(f - q), f - x) + d(f - q) / 2,
    "in the surrogate a mean over the coordinates: an inner product sums": lambda d, g, f, q, x: (
        -(g(f - q) * (f - x)).mean(1) + d(f - q)
    ),
}
ALPHAS = {
    "the two are exchanged": lambda: (0.5, 1.0),
    "the first: 1.2 is SiD's own choice, on the other side of SIM": lambda: (1.2, 0.5),
    "1.2 is SiD's own choice, on the other side of SIM": lambda: (1.0, 1.2),
    "the first: at 0 nothing of y is left to make the fake of the teacher": lambda: (0.0, 0.5),
    "at 0, (1 - alpha) |y|^2 is twice what half of the full loss has": lambda: (1.0, 0.0),
}

SIGMA = {  # (n, mean, std, rng)
    "these are s; the level is exp(s)": lambda n, m, s, rng: m + s * torch.randn(n, generator=rng),
    "std is squared: N(mean, std^2) has the deviation std": lambda n, m, s, rng: (
        m + s**2 * torch.randn(n, generator=rng)
    ).exp(),
    "the root of std is taken: it is a deviation already": lambda n, m, s, rng: (
        m + s**0.5 * torch.randn(n, generator=rng)
    ).exp(),
    "s is uniform, not normal": lambda n, m, s, rng: (m + s * torch.rand(n, generator=rng)).exp(),
    "mean is added outside of the exponential": lambda n, m, s, rng: (
        m + (s * torch.randn(n, generator=rng)).exp()
    ),
    "one level for the whole batch; each sample has its own": lambda n, m, s, rng: (
        (m + s * torch.randn(1, generator=rng)).exp().expand(n)
    ),
}
WEIGHT = {  # (sigma, sigma_data)
    "upside down": lambda s, d: (s * d) ** 2 / (s**2 + d**2),
    "the denominator is not squared": lambda s, d: (s**2 + d**2) / (s * d),
    "in the numerator nothing is squared": lambda s, d: (s + d) / (s * d) ** 2,
    "the numerator is the square of a sum, not a sum of squares": lambda s, d: (s + d) ** 2 / (s * d) ** 2,
    "in the denominator sigma_data is not squared": lambda s, d: (s**2 + d**2) / (s**2 * d),
    "in the denominator sigma_data is missing": lambda s, d: (s**2 + d**2) / s**2,
}


def denoising(rule, level=1, stop=True):
    """(fake, x0, sigma, noise, weight) -> rule(fake, x0, xt, sigma, noise, weight)"""

    def answer(fake, x0, sigma, noise, weight):
        x0 = x0.detach() if stop else x0
        return rule(fake, x0, x0 + power(sigma, level) * noise, sigma, noise, weight)

    return answer


def square(a):
    return dot(a, a)


FAKE = {
    "x0 is not detached: psi's gradient reaches theta": denoising(
        lambda f, x, xt, s, e, w: w * square(f(xt, s) - x), stop=False
    ),
    "x0 is detached as the target only: psi's gradient reaches theta through xt": denoising(
        lambda f, x, xt, s, e, w: w * square(f(xt, s) - x.detach()), stop=False
    ),
    "the weight is missing": denoising(lambda f, x, xt, s, e, w: square(f(xt, s) - x)),
    "the fake is shown x0, not xt": denoising(lambda f, x, xt, s, e, w: w * square(f(x, s) - x)),
    "the residual is against xt, not against x0": denoising(
        lambda f, x, xt, s, e, w: w * square(f(xt, s) - xt)
    ),
    "wrong space: a denoiser answers x0, not the noise": denoising(
        lambda f, x, xt, s, e, w: w * square(f(xt, s) - e)
    ),
    "the norm is not squared": denoising(lambda f, x, xt, s, e, w: w * (f(xt, s) - x).norm(dim=1)),
    "half of it: a factor 1/2, or a mean over the coordinates; a squared norm sums over them": denoising(
        lambda f, x, xt, s, e, w: w * (f(xt, s) - x).square().mean(1)
    ),
    "the noise is scaled by sigma^2": denoising(lambda f, x, xt, s, e, w: w * square(f(xt, s) - x), level=2),
    "the fake's output is detached: psi learns nothing": denoising(
        lambda f, x, xt, s, e, w: w * square(f(xt, s).detach() - x)
    ),
}


def right_surrogate(g, f, q, x):
    return -dot(g(f - q), f - x)


def judging(rule=right_surrogate, stop=False, space=0, root=1, noisy=False, cut=False):
    """(teacher, fake, x0, sigma, noise, c) -> rule(d', D_psi, D_q, x0), right unless told otherwise."""

    def answer(teacher, fake, x0, sigma, noise, c):
        x0 = x0.detach() if stop else x0
        xt = x0 + power(sigma, 1) * noise
        triple = [v / power(sigma, space) for v in (fake(xt, sigma), teacher(xt, sigma), xt if noisy else x0)]
        triple[:2] = [v.detach() if cut else v for v in triple[:2]]
        return rule(lambda y: unit(y, c**root), *triple)

    return answer


GENERATOR = {words: judging(rule) for words, rule in SURROGATE.items()} | {
    "twice too much: Algorithm 2 has no factor": judging(lambda *triple: 2 * right_surrogate(*triple)),
    "x0 is detached: nothing reaches theta": judging(stop=True),
    "both networks are cut off (no_grad?): their parameters are frozen, not their argument": judging(
        cut=True
    ),
    "the residual is against xt, not against x0": judging(noisy=True),
    "c is not squared": judging(root=0.5),
    "wrong space: these are scores, Algorithm 2 has denoised points": judging(space=2),
    "wrong space: this is noise, Algorithm 2 has denoised points": judging(space=1),
}
del GENERATOR["all of it is detached"]  # as if x0 were


def psi_loss(fake, x0, sigma, noise):
    return sim.fake_loss(fake, x0, sigma, noise, sim.edm_weight(sigma)).mean()


def theta_loss(*given):
    return sim.generator_loss(*given, "pseudo_huber").mean()


def alternating(learn=psi_loss, judge=theta_loss, once=False, only=None, exchanged=False, raw=False):
    """An answer to Algorithm 2's loop, right unless told otherwise."""

    def step(optimiser, loss):
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def answer(teacher, fake, generator, psi, theta, draw, steps):
        psi, theta = (theta, psi) if exchanged else (psi, theta)
        same = draw() if once else None
        for _ in range(only or steps):
            z, sigma, noise = same or draw()
            if learn:
                step(psi, learn(fake, z if raw else generator(z), sigma, noise))
            z, sigma, noise = same or draw()
            if judge:
                step(theta, judge(teacher, fake, generator(z), sigma, noise))

    return answer


DISTILL = {
    "psi stands still": alternating(learn=None),
    "theta stands still": alternating(judge=None),
    "one batch serves all steps; each update draws its own": alternating(once=True),
    "one step, not `steps`": alternating(only=1),
    "the optimisers are exchanged": alternating(exchanged=True),
    "psi is shown z; it learns from g(z)": alternating(raw=True),
    "theta climbs: the sign of its loss is flipped": alternating(judge=lambda *given: -theta_loss(*given)),
    "in theta's loss teacher and fake are exchanged": alternating(
        judge=lambda teacher, fake, *rest: theta_loss(fake, teacher, *rest)
    ),
    "psi's loss has no weight": alternating(learn=lambda *given: sim.fake_loss(*given).mean()),
}
