"""Answers to the exercises of toy/exercises.ipynb, one of many for each.  Look at them last."""

import torch

from toy.train_2d import update


def score_from_denoiser(denoised, xt, sigma):
    return (denoised - xt) / sigma[:, None] ** 2


def conditional_score(xt, x0, sigma):
    return (x0 - xt) / sigma[:, None] ** 2


def projection_mean(u, score, x0, sigma, noise):
    xt = x0 + sigma[:, None] * noise
    residual = score(xt, sigma) - conditional_score(xt, x0, sigma)
    return (u(xt) * residual).sum(1).mean()


def exp_gradient(y, alpha, beta):
    norm = (y**alpha).sum(1, keepdim=True)
    return alpha * beta * torch.exp(beta * norm) * y ** (alpha - 1)


def pseudo_huber_gradient(y, c):
    return y / torch.sqrt((y**2).sum(1, keepdim=True) + c**2)


def surrogate(d_prime, fake, teacher, target):
    return -(d_prime(fake - teacher) * (fake - target)).sum(1)


def as_printed(d_prime, stopped, live, teacher, conditional):
    return -(d_prime(stopped - teacher) * (live - conditional)).sum(1)


def stopped_score(law, means, xt, sigma):
    return law(means.detach()).score(xt, sigma)


def full_loss(d, d_prime, fake, teacher, target):
    return surrogate(d_prime, fake, teacher, target) + d(fake - teacher)


def sid_alphas():
    return 1.0, 0.5


def draw_sigma(n, mean, std, rng):
    return torch.exp(mean + std * torch.randn(n, generator=rng))


def edm_weight(sigma, sigma_data):
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def fake_loss(fake, x0, sigma, noise, weight):
    x0 = x0.detach()
    xt = x0 + sigma[:, None] * noise
    return weight * ((fake(xt, sigma) - x0) ** 2).sum(1)


def generator_loss(teacher, fake, x0, sigma, noise, c):
    xt = x0 + sigma[:, None] * noise
    said, true = fake(xt, sigma), teacher(xt, sigma)
    return surrogate(lambda y: pseudo_huber_gradient(y, c), said, true, x0)


def distill(teacher, fake, generator, psi, theta, draw, steps):
    for _ in range(steps):
        z, sigma, noise = draw()
        update(psi, fake_loss(fake, generator(z), sigma, noise, edm_weight(sigma, 0.5)).mean())
        z, sigma, noise = draw()
        update(theta, generator_loss(teacher, fake, generator(z), sigma, noise, 0.1).mean())


def my_target():
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])
    return 0.6 * corners, 0.06
