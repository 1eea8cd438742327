"""Score Implicit Matching (arXiv:2410.16794) on one page: a diffusion model of a ring of eight Gaussians is
distilled into a generator of one evaluation.  Lines end with the paper's equation, or EDM's (2206.00364).
Needs torch, matplotlib and 1 to 2 silent minutes of a core: run it, paste it into a notebook, change it."""

import copy
from pathlib import Path

import torch
from matplotlib import pyplot

SEED = 0
TEACHER_STEPS, STEPS, BATCH = 1500, 3000, 256
STD, SIGMA_DATA, SIGMA_INIT, C = 0.1, 0.71, 2.5, 0.1  # of a mode; of all data; sigma* of (B.4); c of d(y)
ANGLES = torch.arange(8) * torch.pi / 4
MODES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)

draw_data = lambda n: MODES[torch.randint(8, (n,))] + STD * torch.randn(n, 2)  # x0 ~ q
draw_sigma = lambda n: (-1.2 + 1.2 * torch.randn(n, 1)).exp()  # (B.5), (B.6)
diffuse = lambda x0, sigma: x0 + sigma * torch.randn_like(x0)  # (B.12)
generate = lambda g, n: g(SIGMA_INIT * torch.randn(n, 2), torch.full((n, 1), SIGMA_INIT))  # (B.4)


class Denoiser(torch.nn.Module):  # D(xt, sigma) learns E[x0 | xt]; its score is (D - xt) / sigma^2 (B.3)
    def __init__(self, width=64):
        super().__init__()
        self.modulate = torch.nn.Linear(17, 6 * width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(n, width) for n in (2, width, width))
        self.last = torch.nn.Linear(width, 2)

    def forward(self, xt, sigma):
        level, c_in = sigma.log() / 4, (sigma**2 + SIGMA_DATA**2).rsqrt()  # EDM, Table 1: c_noise, c_in
        waves = level * torch.pi * torch.linspace(0.25, 4, 8)
        of_sigma = self.modulate(torch.cat([level, waves.sin(), waves.cos()], 1)).chunk(6, 1)
        h = c_in * xt  # EDM (7), as the last line
        for layer, scale, shift in zip(self.layers, of_sigma[:3], of_sigma[3:]):
            h = torch.nn.functional.silu(layer(h) * (1 + scale) + shift)
        return (SIGMA_DATA * c_in) ** 2 * xt + sigma * SIGMA_DATA * c_in * self.last(h)


def denoising_loss(denoiser, x0):
    sigma = draw_sigma(len(x0))  # (B.5)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2  # (B.7)
    return (weight * (denoiser(diffuse(x0, sigma), sigma) - x0) ** 2).sum(1).mean()  # (B.2)


def surrogate(fake, teacher, x0):
    y = fake - teacher  # y_t of Algorithm 2
    slope = y / (y.square().sum(1, keepdim=True) + C**2).sqrt()  # d'(y): Table 4, pseudo-Huber
    return -(slope * (fake - x0)).sum(1)  # (A.4)


def mover(network, rate, steps):  # Adam of Table 5, with rates for small networks that fall to 0
    adam = torch.optim.Adam(network.parameters(), rate, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    return lambda loss: (adam.zero_grad(), loss.backward(), adam.step(), schedule.step())


if __name__ == "__main__":
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    teacher = Denoiser()
    move_teacher = mover(teacher, 5e-3, TEACHER_STEPS)
    for _ in range(TEACHER_STEPS):
        move_teacher(denoising_loss(teacher, draw_data(1024)))  # (B.2)
    psi, theta = copy.deepcopy(teacher), copy.deepcopy(teacher)  # the online network, and the generator
    move_psi, move_theta = mover(psi, 4e-3, STEPS), mover(theta, 2e-3, STEPS)  # psi must be the faster
    for _ in range(STEPS):
        move_psi(denoising_loss(psi, generate(theta, BATCH).detach()))  # Algorithm 2, L(psi)
        x0, sigma = generate(theta, BATCH), draw_sigma(BATCH)  # (B.4), (B.9)
        xt = diffuse(x0, sigma)  # (B.12)
        move_theta(surrogate(psi(xt, sigma), teacher(xt, sigma), x0).mean())  # Algorithm 2, L(theta)
    distance, mode = torch.cdist(samples := generate(theta, 10_000).detach(), MODES).min(1)
    counts = torch.bincount(mode[distance < 3 * STD], minlength=8)  # a mode is covered by a tenth of its due
    print(f"{counts.sum() / 100:.1f}% within 3 std of a mode, {(counts > 125).sum()} of 8 modes; ", end="")
    pyplot.figure(figsize=(8, 4), layout="constrained")
    for place, title, x in (121, "data", draw_data(2000)), (122, "one evaluation", samples[:2000]):
        pyplot.subplot(place, title=title, aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))
        pyplot.scatter(*x.T, s=3, alpha=0.5, linewidths=0)
    pyplot.savefig("sim_in_one_page.png")
    print("picture:", Path("sim_in_one_page.png").resolve())
