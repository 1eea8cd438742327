"""Do samples of the text digits follow their captions?"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Module

from edm.images.data import to_uint8
from edm.images.sampler import heun, latents
from edm.quality.features import classifier_features
from edm.quality.metrics import Reference, data_floor, evaluate_samples, features_of
from edm.text.digits import PROMPTS, SAMPLER, TEMPLATES, pictures
from edm.text.pixart import decode


class Reader:
    """reader(sample) -> numbers of n samples(z, **caption), seeds 0, 1, ..., under the prompts in turn.

    follows is the share in which a classifier of the data, kept in the file `cache`, reads the digit of the
    prompt; the others are those of `evaluate_samples`.  floor: Frechet distance of the data's halves.
    """

    def __init__(self, shape: tuple[int, ...], vae: Module, encoder: Callable, n: int, cache: str | Path):
        data = pictures()
        self.shape, self.vae, self.encoder, self.n = shape, vae, encoder, n
        self.net = classifier_features(data, cache)
        features, _ = features_of(self.net, data.images.split(500))
        self.reference, self.floor = Reference(features), data_floor(features)["fd"]

    @torch.no_grad()
    def __call__(self, sample: Callable) -> dict[str, float | list[int]]:
        start, images = time.perf_counter(), []
        for seeds in torch.arange(self.n).split(100):
            z, _ = latents(seeds.tolist(), self.shape)
            caption = self.encoder([PROMPTS[seed % len(PROMPTS)] for seed in seeds.tolist()])
            images.append(decode(self.vae, sample(z.to(self.vae.device), **caption)).cpu())
        seconds = time.perf_counter() - start
        images = [to_uint8(some) for some in images]
        read = torch.cat([self.net.probabilities(some).argmax(1) for some in images])
        named = torch.arange(self.n) % len(PROMPTS) // len(TEMPLATES)
        follows = (read == named).float().mean().item()
        numbers = evaluate_samples(self.net, self.reference, images)
        return numbers | {"follows": follows, "images_per_second": self.n / seconds}


def by_teacher(teacher: Callable) -> Callable:
    """A denoiser of the text digits -> sample(z, **caption) in many steps."""
    return lambda z, **caption: heun(teacher, z, **SAMPLER, **caption)


def compare(reader: Reader, generator: Callable, teacher: Callable) -> dict[str, float | list[int]]:
    """-> {"student_fd": ..., "teacher_fd": ..., ...} of the one-step network and the denoiser."""
    numbers = {"floor_fd": reader.floor, "samples": reader.n}
    for who, sample in {"student": generator, "teacher": by_teacher(teacher)}.items():
        numbers |= {f"{who}_{name}": value for name, value in reader(sample).items()}
    return numbers
