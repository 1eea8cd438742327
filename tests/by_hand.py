"""Algorithm 2 and its options from their formulas, in plain torch: what both loops are compared with."""

import numpy as np
import torch


def over(values, like):
    """(B,) ready to broadcast over (B, *D)."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def draw_sigma(name, n, rng):
    if name == "karras":
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return (high + (1 - 0.8 * torch.rand(n, generator=rng)) * (low - high)) ** 7
    named = {"edm": (-1.2, 1.2), "sim": (-3.5, 2.5), "pixart": (-2.0, 2.0)}
    mean, std = named[name] if isinstance(name, str) else name
    sigma = (mean + std * torch.randn(n, generator=rng)).exp()
    return sigma.clamp(0.01, 156.6155) if name == "pixart" else sigma


def levels(cfg, which=""):
    """A name, or mean and std where both are given."""
    mean, std = getattr(cfg, f"{which}sigma_mean"), getattr(cfg, f"{which}sigma_std")
    return getattr(cfg, f"{which}sigma_distribution") if None in (mean, std) else (mean, std)


def slope(cfg, y):
    """d'(y), Table 4."""
    a = cfg.alpha or (2 if cfg.distance == "exp" else 4)
    beta, c, delta = cfg.beta or 0.3, cfg.c or 0.1, cfg.delta or 0.5
    total = lambda v: v.sum([*range(1, v.ndim)], keepdim=True)
    return {"l2": lambda: 2 * y, "power": lambda: a * y ** (a - 1), "l1": lambda: y.sign(),
            "exp": lambda: a * beta * (beta * total(y**a)).exp() * y ** (a - 1),
            "huber": lambda: y.clamp(-delta, delta),
            "pseudo_huber": lambda: y / (total(y**2) + c**2).sqrt()}[cfg.distance]()  # fmt: skip


def height(cfg, y):
    """d(y), Table 4, as the work of d'(y) along a line from 0."""
    t, w = (torch.from_numpy(v).to(y.dtype) for v in np.polynomial.legendre.leggauss(60))
    return sum(w_i / 2 * (slope(cfg, (t_i + 1) / 2 * y) * y).flatten(1).sum(1) for t_i, w_i in zip(t, w))


def generator_loss(cfg, teacher, fake, x0, sigma, noise, data_std):
    """--method of D_psi, D_q and x0, in --space -> (B,)."""
    s = over(sigma, x0)
    unit, xt = s ** {"denoised": 0, "noise": 1, "score": 2}[cfg.space], x0 + s * noise
    if cfg.method == "density":  # theta in log q(xt | x0) and in the target, nowhere else
        xt = xt.detach()
        d_fake, d_teacher = fake(xt, sigma).detach(), teacher(xt, sigma).detach()
        inner = -(slope(cfg, (d_fake - d_teacher) / unit) * (d_fake - x0) / unit).flatten(1).sum(1)
        return inner.detach() * -((xt - x0) ** 2).flatten(1).sum(1) / (2 * sigma**2) + inner
    d_fake, d_teacher = fake(xt, sigma), teacher(xt, sigma)
    y, residual, pull = (d_fake - d_teacher) / unit, (d_fake - x0) / unit, (d_teacher - x0) / unit
    if cfg.method == "sid":
        loss = -y * (pull + (1.2 if cfg.alpha is None else cfg.alpha) * y)
    elif cfg.method == "diff_instruct":
        loss = y.detach() * x0 / unit
    else:
        loss = -slope(cfg, y) * residual
    loss = loss.flatten(1).sum(1)
    loss = loss + height(cfg, y) if cfg.method == "full" else loss
    error = (x0 - d_teacher).detach().abs().flatten(1).mean(1)
    weight = {
        "one": 1.0,
        "noise": unit.flatten() ** 2 / sigma**2,
        "edm": edm_weight(sigma, data_std),
        "sid": unit.flatten() ** 2 / error,
    }
    return weight[cfg.weighting] * loss


def edm_weight(sigma, data_std):
    return 1 / data_std**2 + 1 / sigma**2


def denoising_loss(network, x0, sigma, noise, weight):
    """weight ||D(xt) - x0||^2, xt from where x0 is -> (B,)."""
    x0 = x0.detach()
    return weight * ((network(x0 + over(sigma, x0) * noise, sigma) - x0) ** 2).flatten(1).sum(1)


class Learner:
    """Adam on what a network has.  loss, gradient: of the last step, its mean and its norm."""

    def __init__(self, network, beta1, beta2, eps=1e-8):
        self.parameters, self.betas, self.eps, self.n = [*network.parameters()], (beta1, beta2), eps, 0
        self.means, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in "mv")

    def learn(self, losses, rate):
        self.n, (b1, b2) = self.n + 1, self.betas
        gradients = torch.autograd.grad(losses.mean(), self.parameters)
        self.loss, self.gradient = losses.mean().item(), flat(gradients).norm().item()
        for p, m, v, g in zip(self.parameters, self.means, self.squares, gradients):
            m.lerp_(g, 1 - b1)
            v.lerp_(g**2, 1 - b2)
            p.data -= rate * m / (1 - b1**self.n) / ((v / (1 - b2**self.n)).sqrt() + self.eps)


def follow(average, network, keep):
    """A moving average's step."""
    for a, p in zip(average.parameters(), network.parameters()):
        a.data.lerp_(p.data, 1 - keep)


def flat(tensors):
    """Of a network, or of tensors: one vector."""
    tensors = tensors.parameters() if isinstance(tensors, torch.nn.Module) else tensors
    return torch.cat([t.detach().flatten() for t in tensors])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
