"""The test bed: a generator, a teacher and an online network whose every expectation is a number.

Let the latent z take finitely many values z_k with probabilities pi_k.  Then the diffused law of the
generator is *exactly* a Gaussian mixture with means g_theta(z_k), whatever network g is, and an
expectation over the noise is a Gaussian integral, which a trapezoid grid computes to machine
precision.  With a Gaussian-mixture teacher, both sides of Theorem 3.1 are then numbers, not
estimates, for a real neural generator: no sampling, no training, no tolerance to hide behind.
"""

import math
from functools import partial

import torch
from torch import nn

import sim_core as sim
from toy.mixtures import Mixture

SIGMA = 0.7  # one noise level; nothing depends on which
REACH = 9.0  # the grid spans +- REACH standard deviations of the noise


class Detached:
    """A distance whose gradient is cut off from xt: a tempting mistake."""

    def __init__(self, distance):
        self.grad = lambda y: distance.grad(y).detach()


def plane(half, nodes, dim):
    """Trapezoid nodes (nodes**dim, dim) on +-half, and the volume of a cell."""
    axis = torch.linspace(-half, half, nodes, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dim).reshape(-1, dim), (axis[1] - axis[0]).item() ** dim


def noise_grid(nodes, dim):
    """Trapezoid nodes (n, dim), n < nodes**dim, and weights (n,) for E over N(0, I) of dim dimensions."""
    axis = torch.linspace(-REACH, REACH, nodes, dtype=torch.float64)
    weight = torch.exp(-(axis**2) / 2) / math.sqrt(2 * math.pi) * (axis[1] - axis[0])
    points, weights = (torch.cartesian_prod(*[each] * dim).reshape(-1, dim) for each in (axis, weight))
    weights = weights.prod(1)
    keep = weights > 1e-17 * weights.max()  # corners that weigh nothing
    return points[keep], weights[keep]


class TestBed:
    """K latents, a tanh MLP generator, a Gaussian-mixture teacher, all float64 and seeded."""

    def __init__(self, seed, dim=2, K=6):
        rng = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, generator=rng, dtype=torch.float64)
        self.dim = dim
        self.z, self.pi = randn(K, dim), randn(K).mul(0.3).softmax(0)
        self.net = nn.Sequential(nn.Linear(dim, 32), nn.Tanh(), nn.Linear(32, dim)).double()
        for p in self.net.parameters():
            p.data = randn(*p.shape) * (0.3 if p.ndim == 2 else 0.5)
        stds = 0.2 + 0.3 * torch.rand(4, generator=rng, dtype=torch.float64)
        near = self.net(self.z[:4]).detach()  # y must change sign where there is mass: kinks and jumps count
        self.teacher = Mixture(near + 0.6 * randn(4, dim), stds, randn(4).mul(0.3).softmax(0))

    def law(self, means):
        """The generator's law as a mixture of points; its diffusion at sigma is exact."""
        return Mixture(means, torch.zeros_like(self.pi), self.pi)

    def quadrature(self, means, nodes):
        """E over k and noise: (weights, x0, noise, sigma) for each k."""
        noise, weight = noise_grid(nodes, self.dim)
        sigma = torch.full((len(noise),), SIGMA, dtype=torch.float64)
        for mean, pi in zip(means, self.pi):
            yield pi * weight, mean.expand_as(noise), noise, sigma

    def mean(self, integrand, nodes):
        """E_{k, noise} integrand(x0, noise, sigma, means), a number."""
        means = self.net(self.z).detach()
        draws = self.quadrature(means, nodes)
        return sum((weight @ integrand(*drawn, means)).item() for weight, *drawn in draws)

    def gradient_at_means(self, integrand, nodes):
        """d/dmeans of E_{k, noise} integrand(x0, noise, sigma, means), (K, dim).

        x0 = g_theta(z_k) and means = g_theta(z_1..K) carry gradient; the integrand decides what to stop.
        """
        means = self.net(self.z).detach().requires_grad_()
        for weight, *drawn in self.quadrature(means, nodes):
            (weight * integrand(*drawn, means)).sum().backward()
        return means.grad

    def gradient(self, integrand, nodes):
        """d/dtheta of the same, flat: by the chain rule, once through the network."""
        at_means = self.gradient_at_means(integrand, nodes)
        return flat(torch.autograd.grad(self.net(self.z), list(self.net.parameters()), at_means))

    # The integrands: each is one line of the theorem, or one way of getting it wrong.

    def objective(self, distance, space, law_moves=False):
        """d(y): the left side of Theorem 3.1, under a *stopped* sampling law, or all of it."""

        def integrand(x0, noise, sigma, means):
            xt = sim.add_noise(x0, sigma, noise)
            xt = xt if law_moves else xt.detach()  # sg: the sampling law
            y = self.law(means).denoiser(xt, sigma) - self.teacher.denoiser(xt, sigma)
            return distance.value(y * SIGMA ** -sim.SPACES[space])

        return integrand

    def surrogate(self, distance, space="score", loss=sim.generator_loss):
        """`loss` from sim_core, of networks: the right side of Theorem 3.1."""

        def integrand(x0, noise, sigma, means):
            fake = self.law(means.detach()).denoiser  # s_sg[theta]: another network, that moves later
            return loss(self.teacher.denoiser, fake, x0, sigma, noise, distance, space)

        return integrand

    def on_triple(self, loss, space="score"):
        """`loss` from sim_core, of what the networks say: (fake, teacher, target)."""

        def of_networks(*networks_and_draws):
            *given, _, space = networks_and_draws
            return loss(*sim.predictions(*given, space))

        return self.surrogate(None, space, of_networks)

    def misprint(self, distance):
        """(A.5) as printed: the residual's score keeps its parameters."""

        def integrand(x0, noise, sigma, means):
            xt = sim.add_noise(x0, sigma, noise)
            stopped, live = self.law(means.detach()).score(xt, sigma), self.law(means).score(xt, sigma)
            u = distance.grad(stopped - self.teacher.score(xt, sigma))
            return -sim.score_projection(u, live, sim.conditional_score(xt, x0, sigma))

        return integrand

    def kl(self, x0, noise, sigma, means):
        """KL(p_theta || p_q) at sigma, xt moving with theta: an integrand itself."""
        xt = sim.add_noise(x0, sigma, noise)
        return self.law(means).log_density(xt, sigma) - self.teacher.log_density(xt, sigma)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
