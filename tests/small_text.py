"""A small pipeline from text to images, its distillation, and a step of that by hand."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from edm import distill_pixart
from edm.config import TEXT_DISTILLATIONS, TEXT_PRESETS, TextDistillation
from edm.quality import captions
from edm.text import digits, pixart_files
from edm.training.trainee import make_accelerator
from tests import small
from tests.by_hand import flat, relative
from tests.common import start

SMALL = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, in_channels=4, out_channels=8,
             cross_attention_dim=24, caption_channels=64, sample_size=8, patch_size=2)  # fmt: skip
TINY = dict(preset="pixart-digits", device="cpu", threads=1, steps=4, batch=8, every=16, samples=20, lr=1e-3,
            fake_lr=2e-3, warmup=0, lr_end=0.0, guidance=1.0, fake_weighting="one",
            ema_halflife=4000)  # fmt: skip
GUIDED = dict(guidance=2.0, fake_guidance=2.0)


def config(**changes):
    return TextDistillation(**TEXT_PRESETS["pixart-digits"]["distill"] | TINY | changes)


def make_pipeline(folder, predicts="noise"):
    """All of a pipeline, small, of random weights: folder/pipeline."""
    torch.manual_seed(0)
    for name, part in zip(("tokenizer", "text_encoder"), digits.make_text_encoder()):
        part.save_pretrained(folder / "frozen" / name)
    AutoencoderKL(**digits.VAE).save_pretrained(folder / "frozen/vae")
    transformer = PixArtTransformer2DModel(**SMALL)
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    digits.save_pipeline(folder / "pipeline", folder / "frozen", transformer, predicts)
    return folder / "pipeline"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def fast(monkeypatch):
    small.quick(monkeypatch.setattr)
    for name in ("Reader", "compare"):
        monkeypatch.setattr(captions, name, lambda *given: {})


def task_of(pipeline, dtype=torch.float64, **changes):
    cfg = config(teacher=str(pipeline), **changes)
    parts = distill_pixart.Prompts(cfg, make_accelerator(cfg))
    parts.transformer.to(dtype)
    return small.stirred(parts.build())


def gradients(pipeline, **changes):
    task = task_of(pipeline, **changes)
    task.step(3)
    return task.gradients


def run(*more, **changes):
    """edm/distill_pixart.py's exit code."""
    settings = TINY | dict(teacher="pipeline") | changes
    return start(distill_pixart.main, TextDistillation, settings, *more, presets=TEXT_DISTILLATIONS)


record = partial(small.record, load=pixart_files.load_transformer)


def gradient(loss, net):
    return flat(torch.autograd.grad(loss, [*net.parameters()]))


def assert_algorithm_2(pipeline, denoised, **choice):
    """A step's gradients; denoised(network, xt, sigma, cond): what a network makes of xt, by hand."""
    task, fresh = task_of(pipeline, **choice), task_of(pipeline, **choice)
    task.step(3)  # psi moves, then theta; fresh keeps both as they were
    draw = {name: part[0] for name, part in fresh.draw(3, 0).items() if name != "levels"}
    cond, theta = draw["cond"], fresh.generator.network.denoiser
    null = {k: v.expand(8, *v.shape[1:]) for k, v in fresh.null.items()}
    start = torch.full((8, 1, 1, 1), 2.5, dtype=torch.float64)
    x0 = denoised(theta, 2.5 * draw["z"].double(), start, cond)

    s, still, shown = draw["fake_sigma"].double().view(-1, 1, 1, 1), x0.detach(), cond
    if "fake_guidance" in choice:  # the online network does without some captions
        assert 0 < draw["hidden"].sum() < 8
        swap = lambda a, b: torch.where(draw["hidden"].view(-1, *[1] * (a.ndim - 1)), b, a)
        padded = {k: torch.cat([v, torch.zeros_like(cond[k][:, v.shape[1] :])], 1) for k, v in null.items()}
        shown = {k: swap(cond[k], padded[k]) for k in cond}
    error = denoised(fresh.fake.network, still + s * draw["fake_noise"], s, shown) - still
    weights = {"one": 1, "noise": s**-2, "edm": (s**2 + 1) / s**2}  # sigma_data 1
    weight = weights[choice.get("fake_weighting", "one")]
    loss = (weight * error**2).sum() / 8
    assert relative(task.gradients["fake"], gradient(loss, fresh.fake.network)) < 1e-6

    s = draw["sigma"].double().view(-1, 1, 1, 1)
    xt = x0 + s * draw["noise"]

    def judged(net, scale):
        ours, nobody = (denoised(net, xt, s, c) for c in (cond, null))
        return nobody + scale * (ours - nobody)

    teacher = fresh.teacher.denoiser if "guidance" in choice else fresh.teacher
    d_q = judged(teacher, choice.get("guidance", 1))
    d_psi = judged(task.fake.network, choice.get("fake_guidance", 1))
    y = d_psi - d_q
    slope = y / ((y**2).sum((1, 2, 3), keepdim=True) + task.cfg.c**2).sqrt()
    loss = -(slope * (d_psi - x0)).sum() / 8
    assert relative(task.gradients["generator"], gradient(loss, theta)) < 1e-6
