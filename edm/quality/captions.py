"""Do samples of the text digits follow their captions?"""

import time

import torch

from edm.images.data import to_uint8
from edm.images.sampler import heun, latents
from edm.quality.metrics import Reference, classifier_features, data_floor, evaluate_samples, features_of
from edm.text.digits import PROMPTS, SAMPLER, TEMPLATES, pictures
from edm.text.pixart import decode


def compare(generator, teacher, shape, vae, encoder, n, cache):
    """n samples of each, seeds 0, 1, ..., under the prompts in turn, read by a classifier of the data.

    generator, teacher: the one-step network and the denoiser.  cache: file of the classifier.
    -> {"student_follows": the share in which the classifier reads the digit of the prompt, "student_fd": the
    Frechet distance to the data, ...}
    """
    data = pictures()
    net = classifier_features(data, cache)
    features, _ = features_of(net, data.images.split(500))
    reference, numbers = Reference(features), {"floor_fd": data_floor(features)["fd"], "samples": n}
    how = {"student": generator, "teacher": lambda z, **caption: heun(teacher, z, **SAMPLER, **caption)}
    for who, sample in how.items():
        start, images = time.perf_counter(), []
        for seeds in torch.arange(n).split(100):
            z, _ = latents(seeds.tolist(), shape)
            caption = encoder([PROMPTS[seed % len(PROMPTS)] for seed in seeds.tolist()])
            with torch.no_grad():
                images.append(decode(vae, sample(z.to(vae.device), **caption)).cpu())
        seconds = time.perf_counter() - start
        images = [to_uint8(some) for some in images]
        found = evaluate_samples(net, reference, images)
        read = torch.cat([net.probabilities(some).argmax(1) for some in images])
        named = torch.arange(n) % len(PROMPTS) // len(TEMPLATES)
        numbers |= {f"{who}_{name}": found[name] for name in ("fd", "precision", "recall", "class_histogram")}
        numbers[f"{who}_follows"] = (read == named).float().mean().item()
        numbers[f"{who}_images_per_second"] = n / seconds
    return numbers
