"""Break the program on purpose, one line at a time, and see its tests fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MUTATIONS = {  # what is broken: (line of sim_core.py, its replacement)
    "surrogate: sign flipped": (
        "return -_dot(distance.grad(fake - teacher), fake - target)",
        "return _dot(distance.grad(fake - teacher), fake - target)",
    ),
    "surrogate: u detached": (
        "return -_dot(distance.grad(fake - teacher), fake - target)",
        "return -_dot(distance.grad((fake - teacher).detach()), fake - target)",
    ),
    "surrogate: residual detached": (
        "return -_dot(distance.grad(fake - teacher), fake - target)",
        "return -_dot(distance.grad(fake - teacher), (fake - target).detach())",
    ),
    "surrogate: teacher and fake swapped": ("distance.grad(fake - teacher)", "distance.grad(teacher - fake)"),
    "surrogate: residual against the teacher": (
        "fake - teacher), fake - target)",
        "fake - teacher), teacher - target)",
    ),
    "l2: factor dropped": ("return 2 * y", "return y"),
    "power: factor dropped": ("return self.alpha * y ** (self.alpha - 1)", "return y ** (self.alpha - 1)"),
    "power: exponent off": ("return self.alpha * y ** (self.alpha - 1)", "return self.alpha * y**self.alpha"),
    "exp: beta dropped, as in Table 4": (
        "growth = self.beta * torch.exp(self.beta * super().value(y))",
        "growth = torch.exp(self.beta * super().value(y))",
    ),
    "l1: factor doubled": ("        return y.sign()", "        return 2 * y.sign()"),
    "huber: linear beyond delta": ("return y.clamp(-self.delta, self.delta)", "return y.clamp(-self.delta)"),
    "pseudo-huber: Table 4's factor 2": ("return y / _expand(self", "return 2 * y / _expand(self"),
    "pseudo-huber: root without c": ("_dot(y, y) + max(self.c**2, torch.finfo(y.dtype).tiny)", "_dot(y, y)"),
    "generator: networks swapped": (
        "loss(factor * d_fake, factor * d_teacher, factor * x0)",
        "loss(factor * d_teacher, factor * d_fake, factor * x0)",
    ),
    "generator: xt's gradient stopped": (
        "    xt = add_noise(x0, sigma, noise)\n    factor",
        "    xt = add_noise(x0, sigma, noise).detach()\n    factor",
    ),
    "generator: x0's gradient stopped": (
        "loss(factor * d_fake, factor * d_teacher, factor * x0)",
        "loss(factor * d_fake, factor * d_teacher, factor * x0.detach())",
    ),
    "generator: weight ignored": ("return _weighted(loss(factor", "return (lambda v, w: v)(loss(factor"),
    "spaces: score is one power off": ('"noise": 1, "score": 2', '"noise": 1, "score": 1'),
    "fake: gradient reaches the generator": ("    x0 = x0.detach()  # sg", "    x0 = x0  # sg"),
    "denoising: factor": ("_dot(denoised - x0, denoised - x0)", "_dot(denoised - x0, denoised)"),
    "density: without log q": ("return loss.detach() * log_q + loss", "return loss"),
    "density: log q's sign": ("log_q = -_dot", "log_q = _dot"),
    "tweedie: sigma not squared": ("/ _expand_sigma(sigma, xt) ** 2", "/ _expand_sigma(sigma, xt)"),
    "noise: added with the wrong sign": ("return x0 + _expand_sigma", "return x0 - _expand_sigma"),
    "sid: alpha's sign": ("teacher - target + alpha * y", "teacher - target - alpha * y"),
    "diff-instruct: y live": ("(fake - teacher).detach(), target)", "fake - teacher, target)"),
    "constants: p_SIM": ("mean=-3.5, std=2.5", "mean=-3.5, std=2.0"),
    "constants: Karras' share": ("t_max=0.8", "t_max=1.0"),
    "Karras: counted from the upper end": ("(1 - t) * (bottom", "t * (bottom"),
    "weights: w_SiD": ("** -2 / error", "** -1 / error"),
}


# The loops, what they are made of, and the tests that must notice: name -> (file, line, its replacement).

TRAIN_2D, CONFIG_2D, LOGBOOK = "toy/train_2d.py", "toy/config.py", "toy/logbook.py"
PLANE = {
    "psi learns at theta's levels": (TRAIN_2D, "sigma = draw_fake_sigma(batch)", "sigma = draw_sigma(batch)"),
    "theta judged at psi's levels": (TRAIN_2D, "run.generator(z), draw_sigma(batch)", "run.generator(z), draw_fake_sigma(batch)"),
    "average never updated": (TRAIN_2D, "run.ema.update_parameters(run.generator)", "pass"),
    "average of psi": (TRAIN_2D, "run.ema.update_parameters(run.generator)", "run.ema.update_parameters(run.generator) if run.step else run.ema.update_parameters(run.ema.module)"),
    "--ema ignored": (TRAIN_2D, "moving_average(self.generator, cfg.ema)", "moving_average(self.generator, 0.999)"),
    "average without its ramp": (TRAIN_2D, "1 - min(decay, (1 + n.item()) / (10 + n.item()))", "1 - decay"),
    "average's ramp off by one": (TRAIN_2D, "(1 + n.item()) / (10 + n.item())", "n.item() / (9 + n.item())"),
    "beta1 0.9": (TRAIN_2D, "(0.0, cfg.beta2)", "(0.9, cfg.beta2)"),
    "--beta2 ignored": (TRAIN_2D, "(0.0, cfg.beta2)", "(0.0, 0.99)"),
    "the constant schedule follows the cosine": (TRAIN_2D, 'eta_min=0.0 if schedule == "cosine" else lr', "eta_min=0.0"),
    "the cosine is constant": (TRAIN_2D, 'eta_min=0.0 if schedule == "cosine" else lr', "eta_min=lr"),
    "--schedule ignored": (TRAIN_2D, "(0.0, cfg.beta2), cfg.schedule", '(0.0, cfg.beta2), "cosine"'),
    "schedule of twice the steps": (TRAIN_2D, "how = cfg.steps,", "how = 2 * cfg.steps,"),
    "theta's rate stands still": (TRAIN_2D, "        run.schedule.step()", "        pass"),
    "psi's rate stands still": (TRAIN_2D, "run.fake_schedule.step()", "pass"),
    "psi's rate falls at every update": (TRAIN_2D, "        return loss\n\n    def update_generator", "        run.fake_schedule.step()\n        return loss\n\n    def update_generator"),
    "--lr for psi": (TRAIN_2D, "self.fake, cfg.fake_lr", "self.fake, cfg.lr"),
    "--fake-lr for theta": (TRAIN_2D, "self.generator, cfg.lr", "self.generator, cfg.fake_lr"),
    "--space ignored": (TRAIN_2D, "normal(), distance, cfg.space)", "normal(), distance)"),
    "--weighting ignored": (TRAIN_2D, '"sid": sim.sid_weight}[cfg.weighting]', '"sid": sim.sid_weight}["one"]'),
    "--weighting sid as edm": (TRAIN_2D, '"sid": sim.sid_weight}', '"sid": edm_weight}'),
    "theta's weight at sigma_data 0.5": (TRAIN_2D, "sim.edm_weight(sigma, sigma_data)", "sim.edm_weight(sigma)"),
    "psi's weight at sigma_data 0.5": (TRAIN_2D, "partial(sim.edm_weight, sigma_data=target.data_std())", "sim.edm_weight"),
    "psi's loss without its weight": (TRAIN_2D, "normal(), fake_weight(sigma)).mean()", "normal()).mean()"),
    "psi's loss summed": (TRAIN_2D, "normal(), fake_weight(sigma)).mean()", "normal(), fake_weight(sigma)).sum()"),
    "theta's loss summed": (TRAIN_2D, "distance, cfg.space).mean()", "distance, cfg.space).sum()"),
    "Listing 1 with lambda_EDM": (TRAIN_2D, 'return vp_weight if cfg.network == "vp" else', "return"),
    "gradients add up": (TRAIN_2D, "    optimiser.zero_grad()\n", ""),
    "psi keeps theta's gradients": (TRAIN_2D, "run.fake.requires_grad_(False), normal()", "run.fake, normal()"),
    "--fake-updates ignored": (TRAIN_2D, "range(cfg.fake_updates if learned else 0)", "range(1 if learned else 0)"),
    "--warmup ignored": (TRAIN_2D, "range(cfg.warmup if learned else 0)", "range(0)"),
    "--sigma-init ignored": (TRAIN_2D, "requires_grad_(True), cfg.sigma_init)", "requires_grad_(True))"),
    "--batch ignored": (TRAIN_2D, "rng, batch = run.rng, cfg.batch", "rng, batch = run.rng, 256"),
    "--bank ignored": (TRAIN_2D, "torch.randn(cfg.bank, 2", "torch.randn(1024, 2"),
    "--seed ignored": (TRAIN_2D, "Generator(cfg.device).manual_seed(cfg.seed)", "Generator(cfg.device).manual_seed(0)"),
    "--teacher exact: the learned one": (TRAIN_2D, 'target.denoiser if cfg.teacher == "exact" else run.teacher, "i', 'run.teacher, "i'),
    "--fake exact: psi": (TRAIN_2D, "fake = sample_law(run.generator(run.bank).detach()).denoiser", "fake = run.fake"),
    "--fake exact: a moving law": (TRAIN_2D, "run.generator(run.bank).detach())", "run.generator(run.bank))"),
    "--fake exact: half of the bank": (TRAIN_2D, "run.generator(run.bank).detach())", "run.generator(run.bank[::2]).detach())"),
    "--fake exact: other latents": (TRAIN_2D, "z = run.bank[torch.randint(len(run.bank), (batch,), generator=rng, device=cfg.device)]", "z = normal()"),
    "--method density: as sim": (TRAIN_2D, 'sim.density_loss if cfg.method == "density" else', ""),
    "--method diff_instruct: as sid": (CONFIG_2D, 'sim.sid_loss, **given) if cfg.method == "sid"', "sim.sid_loss, **given) if True"),
    "--alpha of sid dropped": (CONFIG_2D, "partial(sim.sid_loss, **given)", "sim.sid_loss"),
    "--distance ignored": (CONFIG_2D, "make_distance(cfg.distance, **given)", 'make_distance("pseudo_huber")'),
    **{f"--{name} dropped": (CONFIG_2D, '("c", "delta", "alpha", "beta")', str(tuple({"c", "delta", "alpha", "beta"} - {name}))) for name in ("c", "delta", "alpha", "beta")},
    "karras for sim": (TRAIN_2D, "sim.SIGMA_DISTRIBUTIONS[name]", 'sim.SIGMA_DISTRIBUTIONS["karras" if name == "sim" else name]'),
    "vp levels for edm's": (TRAIN_2D, 'vp_sigma if name == "vp" else', "vp_sigma if True else"),
    "a generator that is not the teacher": (TRAIN_2D, "Generator(copy.deepcopy(teacher)", "Generator(make_denoiser(cfg, make_target(cfg.target))"),
    "teacher: beta1 0": (TRAIN_2D, "(0.9, 0.99)", "(0.0, 0.99)"),
    "teacher: beta2": (TRAIN_2D, "(0.9, 0.99)", "(0.9, 0.999)"),
    "teacher: its last weights": (TRAIN_2D, "return ema.module.requires_grad_(False)", "return network.requires_grad_(False)"),
    "teacher: not frozen": (TRAIN_2D, "return ema.module.requires_grad_(False)", "return ema.module"),
    "teacher: constant rate": (TRAIN_2D, "        schedule.step()\n        ema", "        ema"),
    "teacher: average of a tenth": (TRAIN_2D, "1 - 1 / max(1, 0.02 * cfg.teacher_steps)", "0.9"),
    "teacher: without its weight": (TRAIN_2D, "noise, weight(sigma)).mean())", "noise).mean())"),
    "teacher: at theta's levels": (TRAIN_2D, "draw_sigma = sigma_sampler(cfg.fake_sigma_distribution, rng)\n    weight", "draw_sigma = sigma_sampler(cfg.sigma_distribution, rng)\n    weight"),
    "teacher: batch": (TRAIN_2D, "target.sample(batch, rng), draw_sigma(batch)", "target.sample(batch // 2, rng), draw_sigma(batch // 2)"),
    "--width ignored": (TRAIN_2D, "VPDenoiser(width=cfg.width) if vp else Denoiser(width=cfg.width,", "VPDenoiser(width=cfg.width) if vp else Denoiser(width=8,"),
    "network at sigma_data 0.5": (TRAIN_2D, "Denoiser(width=cfg.width, sigma_data=target.data_std())", "Denoiser(width=cfg.width)"),
    "evaluated: theta, not its average": (LOGBOOK, "samples, teacher = run.ema(z), heun(", "samples, teacher = run.generator(z), heun("),
    "evaluated: other latents": (LOGBOOK, "manual_seed(cfg.seed + 2)", "manual_seed(cfg.seed + 3)"),
}  # fmt: skip

METRICS, MIXTURES, NETWORKS_2D, SAMPLER_2D = (
    f"toy/{name}.py" for name in "metrics mixtures networks sampler".split()
)
PLANE_PARTS = {
    "energy: cross term once": (METRICS, "return 2 * mean_distance(x, y)", "return mean_distance(x, y)"),
    "energy: within the samples": (METRICS, "- mean_distance(x, x) - within_y", "- within_y"),
    "energy: within the data": (METRICS, "- mean_distance(x, x) - within_y", "- mean_distance(x, x)"),
    "energy: known data forgotten": (METRICS, "mean_distance(y, y) if within_y is None", "mean_distance(x, y) if within_y is None"),
    "floor: without m / (m - 1)": (METRICS, "within * m / (m - 1)", "within"),
    "floor: of n alone": (METRICS, "(1 / n + 1 / m) * within", "1 / n * within"),
    "pairs: a chunk's mean": (METRICS, "/ (len(x) * len(y))", "/ (len(x) * len(x))"),
    "modes: 2 std": (METRICS, "nearest.values <= 3", "nearest.values <= 2"),
    "modes: any sample covers": (METRICS, "good >= 0.1 * weights", "good > 0"),
    "modes: covered by half": (METRICS, "good >= 0.1 * weights", "good >= 0.97 * weights"),
    "modes: covered by bad samples": (METRICS, "(good >= 0.1 * weights)", "(share >= 0.1 * weights)"),
    "modes: distance not in std": (METRICS, "torch.cdist(x, target.means) / target.stds", "torch.cdist(x, target.means)"),
    "modes: error without its half": (METRICS, "0.5 * (share - weights)", "(share - weights)"),
    "modes: error of the good": (METRICS, "0.5 * (share - weights)", "0.5 * (good - weights)"),
    "law of samples: blurred": (METRICS, "samples.new_zeros(K)", "samples.new_full((K,), 0.3)"),
    "scores: sigma not squared": (METRICS, "/ s**2).item()", "/ s).item()"),
    "scores: divergence of psi": (METRICS, '("divergence", exact, target', '("divergence", psi, target'),
    "scores: gap to the target": (METRICS, '("gap", psi, teacher(xt, sigma))', '("gap", psi, target.denoiser(xt, sigma))'),
    "scores: error to the target": (METRICS, '("fake_error", psi, exact)', '("fake_error", psi, target.denoiser(xt, sigma))'),
    "mixture: variance": (MIXTURES, "variance = self.stds**2 + sigma[:, None] ** 2", "variance = self.stds[None] + sigma[:, None] ** 2"),
    "mixture: weights dropped": (MIXTURES, "logits = self.weights.log() - squares", "logits = -squares"),
    "mixture: log determinant": (MIXTURES, "- xt.shape[1] / 2 * variance.log()", "- variance.log()"),
    "mixture: normalisation": (MIXTURES, "- xt.shape[1] / 2 * math.log(2 * math.pi)", "- math.log(2 * math.pi)"),
    "mixture: score's variance": (MIXTURES, "logits.softmax(1) / variance", "logits.softmax(1)"),
    "mixture: tweedie": (MIXTURES, "xt + sigma[:, None] ** 2 * self.score", "xt + sigma[:, None] * self.score"),
    "mixture: samples without weights": (MIXTURES, "torch.multinomial(self.weights,", "torch.multinomial(torch.ones_like(self.weights),"),
    "mixture: samples of one std": (MIXTURES, "self.stds[k, None] * torch.randn", "self.stds[0] * torch.randn"),
    "mixture: std about 0": (MIXTURES, "(self.means - centre) ** 2", "self.means ** 2"),
    "mixture: std of the means": (MIXTURES, "self.weights @ (self.stds**2 + ", "self.weights @ ("),
    "ring: of another radius": (MIXTURES, "equal_mixture(_circle(8), 0.1)", "equal_mixture(_circle(8, 1.1), 0.1)"),
    "grid: spacing": (MIXTURES, "ticks = 0.6 * (torch", "ticks = 0.5 * (torch"),
    "denoiser: c_skip": (NETWORKS_2D, "(d * c_in) ** 2 * xt", "d * c_in * xt"),
    "generator: sigma_init in z alone": (NETWORKS_2D, "z.new_full((len(z),), self.sigma_init)", "z.new_full((len(z),), 2.0)"),
    "generator: z not scaled": (NETWORKS_2D, "self.denoiser(self.sigma_init * z,", "self.denoiser(z,"),
    "vp: beta's end": (NETWORKS_2D, "torch.linspace(1e-4, 0.02,", "torch.linspace(1e-4, 0.01,"),
    "vp: sigma for its square": (NETWORKS_2D, "((1 - abar) / abar).sqrt()", "((1 - abar) / abar)"),
    "vp: t from 0": (NETWORKS_2D, "torch.randint(1, VP_STEPS", "torch.randint(0, VP_STEPS"),
    "vp: weight's power": (NETWORKS_2D, "(1 + sigma**2) / sigma**4", "(1 + sigma**2) / sigma**2"),
    "vp: network's scale": (NETWORKS_2D, "xt * (1 + s**2).rsqrt()", "xt"),
    "vp: t not in T": (NETWORKS_2D, "t[:, None] / VP_STEPS", "t[:, None] / 1.0"),
    "heun: Euler": (SAMPLER_2D, "(first + slope(euler, lower)) / 2", "first"),
}  # fmt: skip

TRAINER, CONFIG, DISTILL, TEACHER = (
    f"edm/{name}.py" for name in "trainer config distill train_teacher".split()
)
IMAGES = {
    "psi learns at theta's levels": (TRAINER, 'draw["fake_sigma"][i], draw["fake_noise"][i]', 'draw["sigma"][i], draw["fake_noise"][i]'),
    "psi learns with theta's noise": (TRAINER, 'draw["fake_sigma"][i], draw["fake_noise"][i]', 'draw["fake_sigma"][i], draw["noise"][i]'),
    "theta judged at psi's levels": (TRAINER, 'draw["sigma"][i], draw["noise"][i]', 'draw["fake_sigma"][i], draw["noise"][i]'),
    "theta judged with psi's noise": (TRAINER, 'draw["sigma"][i], draw["noise"][i]', 'draw["sigma"][i], draw["fake_noise"][i]'),
    "--sigma-distribution ignored": (TRAINER, "self.cfg.sigma_distribution, rng", "self.cfg.fake_sigma_distribution, rng"),
    "--fake-sigma-distribution ignored": (TRAINER, "self.cfg.fake_sigma_distribution, rng", '"edm", rng'),
    "beta1 0.9": (TRAINER, "(cfg.beta1, cfg.beta2)", "(0.9, cfg.beta2)"),
    "--beta1 ignored": (TRAINER, "(cfg.beta1, cfg.beta2)", "(0.0, cfg.beta2)"),
    "--beta2 ignored": (TRAINER, "(cfg.beta1, cfg.beta2)", "(cfg.beta1, 0.99)"),
    "theta's weight at sigma_data 0.5": (TRAINER, "sim.edm_weight(sigma, self.sigma_data)", "sim.edm_weight(sigma)"),
    "psi's weight at sigma_data 0.5": (TRAINER, "partial(sim.edm_weight, sigma_data=sigma_data)", "sim.edm_weight"),
    "the teacher's sigma_data forgotten": (DISTILL, "condition, teacher.sigma_data)", "condition)"),
    "--weighting sid as 1": (TRAINER, '"sid": sim.sid_weight}', '"sid": 1.0}'),
    "--weighting ignored": (TRAINER, "sim.sid_weight}[cfg.weighting]", 'sim.sid_weight}["one"]'),
    "--fake-weighting ignored": (TRAINER, "edm_weight}[cfg.fake_weighting]", 'edm_weight}["edm"]'),
    "psi's loss without its weight": (TRAINER, "noise, self.fake_weight(sigma), **cond)", "noise, **cond)"),
    "--space ignored": (TRAINER, "self.distance, self.cfg.space,", 'self.distance, "denoised",'),
    "--distance ignored": (CONFIG, "sim.make_distance(cfg.distance, **given)", 'sim.make_distance("pseudo_huber")'),
    **{f"--{name} dropped": (CONFIG, '("c", "delta", "alpha", "beta")', str(tuple({"c", "delta", "alpha", "beta"} - {name}))) for name in ("c", "delta", "alpha", "beta")},
    "--method diff_instruct: as sid": (CONFIG, '"diff_instruct": sim.diff_instruct_loss}', '"diff_instruct": sim.sid_loss}'),
    "--alpha of sid dropped": (CONFIG, "loss(*tensors, **given)", "loss(*tensors)"),
    "--lr for psi": (TRAINER, "fake, cfg, cfg.fake_lr)", "fake, cfg, cfg.lr)"),
    "--fake-lr for theta": (TRAINER, "generator, cfg, cfg.lr)", "generator, cfg, cfg.fake_lr)"),
    "--lr-end ignored": (TRAINER, "(self.cfg.lr_end + (1 - self.cfg.lr_end) *", "(1.0 + 0.0 *"),
    "--lr-end's floor": (TRAINER, "(self.cfg.lr_end + (1 - self.cfg.lr_end) *", "(self.cfg.lr_end + 1.0 *"),
    "--lr-rampup ignored": (TRAINER, "if self.cfg.lr_rampup:", "if False:"),
    "--lr-rampup never ends": (TRAINER, "min(1.0, images / self.cfg.lr_rampup)", "images / self.cfg.lr_rampup"),
    "rate: a step ahead": (TRAINER, "seen, share = n * self.cfg.batch", "seen, share = (n + 1) * self.cfg.batch"),
    "rate: per step, not image": (TRAINER, "images / (self.cfg.steps * self.cfg.batch)", "images / self.cfg.steps"),
    "rate: half a cosine's period": (TRAINER, "math.cos(math.pi * share)", "math.cos(math.pi * share / 2)"),
    "--ema-halflife ignored": (TRAINER, "min(self.cfg.ema_halflife, images", "min(4000, images"),
    "--ema-rampup ignored": (TRAINER, "images * self.cfg.ema_rampup", "images * 1.0"),
    "average: no ramp": (TRAINER, "min(self.cfg.ema_halflife, images * self.cfg.ema_rampup)", "self.cfg.ema_halflife"),
    "average: e for 2": (TRAINER, "1 - 0.5 ** (self", "1 - math.exp(-1) ** (self"),
    "average: a batch of 1": (TRAINER, "(self.cfg.batch / halflife)", "(1 / halflife)"),
    "average: of the warm-up too": (TRAINER, "(n + 1 - self.cfg.warmup) * self", "(n + 1) * self"),
    "average: never": (TRAINER, "torch._foreach_lerp_(averages, weights, share)", "pass"),
    "average: of psi": (TRAINER, "self.ema = MovingAverage(generator, average, cfg)", "self.ema = MovingAverage(fake, average.denoiser, cfg)"),
    "average: before the update": (TRAINER, "list(self.source.parameters())", "[p.clone() + 0 * p for p in self.network.parameters()]"),
    "--share ignored": (TRAINER, "n * self.cfg.batch, self.cfg.share", "n * self.cfg.batch, True"),
    "--no-share always": (TRAINER, "n * self.cfg.batch, self.cfg.share", "n * self.cfg.batch, False"),
    "--share: not of micro-batches": (TRAINER, "(draw if share else self.draw(n, self.cfg.fake_updates))", "self.draw(n, self.cfg.fake_updates)"),
    "unshared: psi's draw again": (TRAINER, "self.draw(n, self.cfg.fake_updates)", "self.draw(n, 0)"),
    "--fake-updates ignored": (TRAINER, "for update in range(self.cfg.fake_updates)", "for update in range(1)"),
    "online updates of one draw": (TRAINER, "draw, last = self.draw(n, update)", "draw, last = self.draw(n, 0)"),
    "--warmup ignored": (TRAINER, "warm = n >= self.cfg.warmup", "warm = True"),
    "--warmup one longer": (TRAINER, "warm = n >= self.cfg.warmup", "warm = n > self.cfg.warmup"),
    "--sigma-init ignored": (DISTILL, "copy.deepcopy(fake), cfg.sigma_init)", "copy.deepcopy(fake))"),
    "--seed ignored": (TRAINER, "self.device, self.cfg.seed, *numbers)", "self.device, 0, *numbers)"),
    "every step draws the same": (TRAINER, "self.device, self.cfg.seed, *numbers)", "self.device, self.cfg.seed)"),
    "micro-batches: the sum": (TRAINER, ".mean() / count", ".mean()"),
    "loss: the sum": (TRAINER, "loss_of(i).mean() / count", "loss_of(i).sum() / count"),
    "micro-batches: the last counts": (TRAINER, "            total = total + loss.detach()", "            total = count * loss.detach()"),
    "gradients add up": (TRAINER, "        self.optimiser.zero_grad()\n", ""),
    "psi keeps theta's gradients": (TRAINER, "self.fake.network.requires_grad_(False)  # sg", "pass  # sg"),
    "the judge is the teacher": (TRAINER, "self.judge(bare), seen_by", "self.judge(self.teacher), seen_by"),
    "labels: not passed to images": (TRAINER, "[generator(z, **cond) for z", "[generator(z) for z"),
    "labels: not passed to psi": (TRAINER, "self.fake_weight(sigma), **cond)", "self.fake_weight(sigma))"),
    "labels: not passed to theta": (TRAINER, 'self.generator.wrapped(draw["z"][i], **cond)', 'self.generator.wrapped(draw["z"][i])'),
    "labels: none": (DISTILL, 'return {"class_labels": one_hot_rows[labels]}', "return {}"),
    "labels: always one": (DISTILL, 'return {"class_labels": one_hot_rows[labels]}', 'return {"class_labels": one_hot_rows[0 * labels]}'),
    "a teacher that drops out": (DISTILL, "fake = copy.deepcopy(teacher)", "fake = copy.deepcopy(teacher.train())"),
    "an online network that drops out": (DISTILL, "fake = copy.deepcopy(teacher)", "fake = copy.deepcopy(teacher).train()"),
    "teacher: unfrozen weights learn": (DISTILL, "fake = copy.deepcopy(teacher).requires_grad_(True)", "fake = teacher.requires_grad_(True)"),
    "teacher: without its weight": (TEACHER, "noise[i], weight[i], **mine)", "noise[i], **mine)"),
    "teacher: weight at sigma_data 0.5": (TEACHER, "sim.edm_weight(sigma, network.sigma_data)", "sim.edm_weight(sigma)"),
    "teacher: labels": (TEACHER, "noise[i], weight[i], **mine)", "noise[i], weight[i])"),
    "teacher: labels of others": (TEACHER, '{"class_labels": labels[index]}', '{"class_labels": labels[:n]}'),
    "teacher: other levels": (TEACHER, 'SIGMA_DISTRIBUTIONS["edm"]', 'SIGMA_DISTRIBUTIONS["sim"]'),
    "teacher: --flip ignored": (TEACHER, "if cfg.flip:", "if False:"),
    "teacher: flips all": (TEACHER, "device=device) < 0.5", "device=device) < 2"),
    "teacher: flips upside down": (TEACHER, "x0.flip(3)", "x0.flip(2)"),
    "teacher: --seed ignored": (TEACHER, "generator_of(self.device, self.cfg.seed, n)", "generator_of(self.device, 0, n)"),
    "teacher: dropout of one mask": (TEACHER, "self.cfg.seed, n, 1 + self", "self.cfg.seed, 0, 1 + self"),
    "teacher: an average that drops out": (TEACHER, "copy.deepcopy(network).eval()", "copy.deepcopy(network)"),
    "teacher: rate a step ahead": (TEACHER, "self.batches.count, n * size)", "self.batches.count, (n + 1) * size)"),
    "teacher: average a step behind": (TEACHER, "self.ema.update((n + 1) * size)", "self.ema.update(max(1, n) * size)"),
}  # fmt: skip

IMAGE_RUNS = {
    "the raw generator is kept": (DISTILL, "checkpoints.save(path, task.ema.network.denoiser", "checkpoints.save(path, task.generator.network.denoiser"),
    "steps from 1": (TRAINER, "recent.add(task.step(step))", "recent.add(task.step(step + 1))"),
    "psi is kept": (DISTILL, "checkpoints.save(path, task.ema.network.denoiser", "checkpoints.save(path, task.fake.network"),
    "sigma_init not written": (DISTILL, 'kind="generator", sigma_init=cfg.sigma_init', 'kind="generator", sigma_init=2.0'),
    "pictures of other latents": ("edm/plots.py", "return self.task.ema.network(self.z", "return self.task.ema.network(-self.z"),
    "pictures of theta, not its average": ("edm/plots.py", "return self.task.ema.network(self.z", "return self.task.generator.network(self.z"),
    "the teacher's last weights are kept": (TEACHER, "partial(checkpoints.save, network=task.ema.network", "partial(checkpoints.save, network=task.teacher.network"),
    "the teacher starts from another seed": (TEACHER, "torch.manual_seed(cfg.seed)\n    network", "torch.manual_seed(1)\n    network"),
    "gaps: sums": (TRAINER, "(s / c).item()", "s.item()"),
    "gaps: never forgotten": (TRAINER, "        self.gaps.zero_()\n", ""),
    "fitting: c of another loss": (CONFIG, 'if keep or name != "c"', "if True"),
    "log: the last step alone": (TRAINER, "table.mean((0, 1)).tolist()", "table[0, -1].tolist()"),
}  # fmt: skip

SAMPLER, NETWORKS = "edm/sampler.py", "edm/networks.py"
IMAGE_PARTS = {
    "latents: one for all": (SAMPLER, "torch.Generator().manual_seed(int(seed))", "torch.Generator().manual_seed(0)"),
    "latents: class first": (SAMPLER, "z.append(torch.randn(shape, generator=rng))", "torch.rand(1, generator=rng), z.append(torch.randn(shape, generator=rng))"),
    "latents: nine classes": (SAMPLER, "torch.randint(max(1, label_dim)", "torch.randint(max(1, label_dim - 1)"),
    "heun: Euler": (SAMPLER, "step / 2 * (first + slope(x + step * first, following))", "step * first"),
    "heun: 17 steps": (SAMPLER, "steps=18,", "steps=17,"),
    "heun: levels not to 0": (SAMPLER, "ramp.new_zeros(1)", "ramp.new_full((1,), 1e-3)"),
    "heun: labels": (SAMPLER, "sigma.float().expand(len(x)), **cond)", "sigma.float().expand(len(x)))"),
    "generator: z not scaled": (NETWORKS, "self.denoiser(self.sigma_init * z,", "self.denoiser(z,"),
    "generator: other level": (NETWORKS, "z.new_full((len(z),), self.sigma_init)", "z.new_full((len(z),), 2.0)"),
    "generator: labels": (NETWORKS, "self.sigma_init * z, sigma, **cond)", "self.sigma_init * z, sigma)"),
    "precond: sigma_data": (NETWORKS, "root = (sigma**2 + self.sigma_data**2).sqrt()", "root = (sigma**2 + 0.25).sqrt()"),
    "precond: c_noise": (NETWORKS, "sigma.log().flatten() / 4", "sigma.log().flatten() / 2"),
    "labels: not scaled": (NETWORKS, "class_labels * math.sqrt(self.map_label.in_features)", "class_labels"),
    "dropout: always": (NETWORKS, "F.dropout(h, self.dropout, self.training)", "F.dropout(h, self.dropout, True)"),
}  # fmt: skip

PIXART, TEXT_LOOP = "edm/pixart.py", "edm/distill_pixart.py"
TEXT = {
    "--guidance ignored": (TEXT_LOOP, "if cfg.guidance != 1:\n        teacher", "if False:\n        teacher"),
    "--fake-guidance ignored": (TEXT_LOOP, "return network if self.cfg.fake_guidance == 1 else Guided", "return network if True else Guided"),
    "--fake-guidance of the teacher": (TEXT_LOOP, "Guided(network, self.null, self.cfg.fake_guidance)", "Guided(network, self.null, self.cfg.guidance)"),
    "no caption hidden": (TEXT_LOOP, "if self.cfg.fake_guidance == 1:", "if True:"),
    "captions hidden from all": (TEXT_LOOP, "if self.cfg.fake_guidance == 1:", "if False:"),
    "all captions hidden": (TEXT_LOOP, "device=rng.device) < DROPOUT", "device=rng.device) < 2"),
    "the shown are hidden": (TEXT_LOOP, 'self.null, draw["hidden"][i])', 'self.null, ~draw["hidden"][i])'),
    "levels not rounded": (TEXT_LOOP, "return self.round_sigma(super().draw_sigma(distribution, rng))", "return super().draw_sigma(distribution, rng)"),
    "a prompt never drawn": (TEXT_LOOP, "torch.randint(self.count, (n,)", "torch.randint(self.count - 1, (n,)"),
    "captions of other prompts": (TEXT_LOOP, 'self.captions(cond["prompt"])', 'self.captions(cond["prompt"].flip(0))'),
    "--sigma-init ignored": (TEXT_LOOP, "Generator(copy.deepcopy(fake), cfg.sigma_init)", "Generator(copy.deepcopy(fake))"),
    "guidance: null and caption swapped": (PIXART, "return null + self.scale * (plain - null)", "return plain + self.scale * (null - plain)"),
    "guidance: scale off by one": (PIXART, "return null + self.scale * (plain - null)", "return plain + self.scale * (plain - null)"),
    "null caption: zeros": (PIXART, '    padded[:, :length] = null["caption"]\n', ""),
    "null caption: its mask": (PIXART, '    kept[:, :length] = null["mask"]\n', "    kept[:] = 1\n"),
    "the raw generator is kept": (TEXT_LOOP, "weights = task.ema.state_dict()", 'weights = task.generator.state_dict()["network"]'),
    "trained weights in bf16": (TEXT_LOOP, "        teacher.to(torch.bfloat16)", "        teacher.to(torch.bfloat16), fake.to(torch.bfloat16)"),
}  # fmt: skip

SUITES = {  # the tests that must notice: what breaks
    "test_core.py": {name: ("sim_core.py", *lines) for name, lines in MUTATIONS.items()},
    "test_steps_2d.py": PLANE,
    "test_toy.py": PLANE_PARTS,
    "test_steps_images.py": IMAGES,
    "test_distill.py": IMAGE_RUNS,
    "test_networks.py test_sample.py": IMAGE_PARTS,
    "test_distill_pixart.py test_pixart.py": TEXT,
}
BROKEN = [(tests, name) for tests, mutations in SUITES.items() for name in mutations]


# Imports cost more than most of these tests: one process does them, and a fork of it runs each test.
FORKS = """
import importlib, os, signal, sys
for name in sys.argv[1].split():
    try:
        importlib.import_module(name)
    except ImportError:  # edm/requirements.txt is not installed
        pass
import pytest
for line in sys.stdin:
    if not (child := os.fork()):
        folder, *tests = line.split()
        os.chdir(folder)
        sys.path.insert(0, folder)
        signal.alarm(120)
        out = os.open("out", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        code = pytest.main(["-n", "0", "-x", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush(), os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
HEAVY = (
    "numpy torch torch._dynamo torch.distributed.fsdp torch.distributed.checkpoint.state_dict hypothesis tqdm"
)
HEAVY += " matplotlib.pyplot PIL.Image scipy.linalg sklearn.datasets accelerate safetensors.torch"
HEAVY += (
    " diffusers.AutoencoderKL diffusers.PixArtTransformer2DModel transformers.T5EncoderModel torchmetrics"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(tests, file, old, new) -> exit code and output of the tests where old is new in that file."""
    command = [sys.executable, "-c", FORKS, HEAVY]
    forks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(tests, file="sim_core.py", old="", new=""):
        source = (ROOT / file).read_text()
        assert old in source, "the line has changed: update the mutation"
        folder = tmp_path_factory.mktemp("copy")
        copied = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), ROOT / "pyproject.toml"]
        for path in copied:
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
        (folder / file).write_text(source.replace(old, new) if old else source)
        print(folder, *(f"tests/{name}" for name in tests.split()), file=forks.stdin, flush=True)
        return int(forks.stdout.readline()), (folder / "out").read_text()

    yield run
    forks.stdin.close()
    forks.wait()


@pytest.mark.slow
@pytest.mark.parametrize("tests", SUITES)
def test_the_program_as_it_is_passes(run, tests):
    code, out = run(tests)
    assert code == 0, out[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("tests, name", BROKEN)
def test_a_broken_program_is_caught(run, tests, name):
    code, out = run(tests, *SUITES[tests][name])
    assert code == 1 and "1 failed" in out, f"{name} went unnoticed:\n{out[-2000:]}"
