"""Under another default dtype every run is the same, bit for bit: networks and draws are float32."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from edm import distill, distill_pixart, prompts, sample, sample_pixart
from edm.config import PRESETS, TEACHERS, Distillation, TextDistillation
from edm.images.data import Images, load_images
from edm.images.networks import EDMPrecond
from edm.images.sampler import fixed_latents, latents
from edm.quality import features as networks
from edm.quality import metrics
from tests.small import UNET, quick
from toy import train_2d
from toy.config import Config, resolve
from toy.mixtures import TARGETS, make_target

NCSNPP = UNET | dict(embedding_type="fourier", encoder_type="residual", channel_mult=(1, 2), dropout=0.1,
                     resample_filter=(1, 3, 3, 1), label_dropout=0.5)  # fmt: skip
TINY = dict(device="cpu", threads=1, batch=8, every=16, warmup=0, samples=20, out="run")
READ = {".npz": lambda path: dict(np.load(path)), ".safetensors": load_file, ".png": Path.read_bytes,
        ".csv": lambda path: [*csv.DictReader(path.open())],
        ".json": lambda path: json.loads(path.read_text())}  # fmt: skip


def targets():
    for name in TARGETS:
        target = make_target(name)
        draws = target.sample(9, torch.Generator().manual_seed(0))
        yield target.data_std(), target.means, target.stds, target.weights, draws


def plane(**changes):
    tiny = dict(steps=9, teacher_steps=5, warmup=2, batch=16, width=8, samples=200, no_pictures=True)
    train_2d.main(resolve(Config(**tiny | dict(out=f"run{len(changes)}") | changes)))


def plane_otherwise():
    plane(fake="exact", teacher="exact", sigma_distribution="sim", weighting="sid")
    plane(network="vp", fake_sigma_distribution="vp", sigma_distribution="karras")


def parts():
    yield from (*latents([0, 3], (1, 8, 8), 10), fixed_latents(EDMPrecond(**UNET), "cpu"))
    net = EDMPrecond(**NCSNPP)
    yield net(net.model.map_layer0.bias.new_ones(9, *net.shape), 0.5, torch.eye(10)[:9])
    data = load_images("digits")
    images = data.images[:90, :, :5, :5]
    net, _ = networks.train_classifier(Images(images, data.labels[:90], "corners"))
    features, _ = metrics.features_of(net, [images])
    yield from (features, metrics.data_floor(features), metrics.inception_score(features.softmax(1)))


def digits():
    given = dict(preset="digits", data="digits", evaluate_every=16, steps=4)
    assert distill.main(Distillation(**TINY | given)) == 0
    sample.main(sample.Settings("run/generator.safetensors", "run.npz", "0-4", device="cpu"))


def text():
    given = dict(preset="pixart-digits", guidance=2.0, fake_guidance=1.5, steps=2)
    assert distill_pixart.main(TextDistillation(**TINY | given)) == 0
    pipeline, student = "run/teacher/pipeline", "run/generator.safetensors"
    prompts.main(f"encode {pipeline}/prompts.txt run/captions.safetensors --text-encoder {pipeline}".split())
    how = dict(teacher="", steps=2, device="cpu", export="run/exported")
    sample_pixart.main(sample_pixart.Settings(student, "a seven", "0-2", "run/sheet.png", **how))


def words(x):
    """In full, with types, but for times."""
    if isinstance(x, torch.Tensor | np.ndarray):
        return f"{x.dtype} {x.tolist()}"
    if isinstance(x, dict):
        times = "seconds", "peak_memory_gb", "per_second"
        return {name: words(value) for name, value in x.items() if not name.endswith(times)}
    return [*map(words, x)] if isinstance(x, list | tuple) else repr(x)


def untrained(images):
    torch.manual_seed(0)
    with networks.Single():
        return networks.SmallClassifier(images).eval().requires_grad_(False), 0.1


@pytest.mark.parametrize(
    "work", [targets, plane, plane_otherwise, parts, digits, pytest.param(text, marks=pytest.mark.slow)]
)
def test_float64_by_default_changes_nothing(work, tmp_path, monkeypatch):
    quick(monkeypatch.setattr)
    monkeypatch.setitem(PRESETS["digits"], "network", UNET)
    monkeypatch.setitem(TEACHERS, "digits", dict(data="digits", steps=3, batch=8, flip=True))
    monkeypatch.setitem(TEACHERS, "pixart-digits", dict(steps=2, batch=8, vae_steps=2))
    if work in (digits, text):  # its training is in `parts`
        monkeypatch.setattr(networks, "train_classifier", untrained)
    results = []
    for dtype in (torch.float32, torch.float64):
        (tmp_path / str(dtype)).mkdir()
        monkeypatch.chdir(tmp_path / str(dtype))
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)
            made = {"yielded": words([*(work() or ())])}
        finally:
            torch.set_default_dtype(torch.float32)
        files = [path for path in Path().rglob("*") if path.suffix in READ]
        results.append(made | {str(path): words(READ[path.suffix](path)) for path in files})
    one, other = results
    assert [name for name in one | other if one.get(name) != other.get(name)] == []
