"""Small networks of images, their distillation, and what the tests of every distillation do with theirs."""

import csv
import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.distributed.tensor import distribute_tensor

from edm import distill, train_teacher
from edm.algorithm2 import Distiller
from edm.config import DISTILLATIONS, Distillation, TeacherTraining
from edm.images import checkpoints
from edm.images.data import to_uint8
from edm.images.networks import EDMPrecond
from edm.quality import judge
from edm.training import plots
from edm.training.trainee import make_accelerator
from tests.by_hand import flat
from tests.common import start
from tests.snapshots import write_snapshot
from toy.folder import Folder

UNET = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=8, channel_mult=(1,), num_blocks=1,
            attn_resolutions=(), dropout=0.0, channel_mult_emb=2)  # fmt: skip
OTHER = dict(img_resolution=16, img_channels=3, label_dim=4, augment_dim=9)  # than a preset's
TINY = dict(preset="digits", device="cpu", threads=1, data=None, steps=4, batch=8, every=16, samples=20,
            lr=1e-3, fake_lr=2e-3, warmup=0, lr_end=0.0, ema_halflife=4000)  # fmt: skip
SCORED = dict(data="digits", samples=64, evaluate_every=16, steps=6, seed=3)
ACCUMULATIONS = [(0, True), (2, True), (1, False)]  # --micro-batch, --share


def config(**changes):
    return Distillation(**TINY | changes)


def network(seed=0, **changes):
    """A small EDMPrecond in which every branch counts."""
    torch.manual_seed(seed)
    made = EDMPrecond(**UNET | changes).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return made.requires_grad_(False)


def task_of(dtype=torch.float64, **changes):
    cfg = config(**changes)
    return stirred(distill.build(cfg, make_accelerator(cfg), network().to(dtype)))


def gradients(**changes):
    task = task_of(**changes)
    task.step(3)
    return task.gradients


def teacher_task(net, data, **settings):
    cfg = TeacherTraining(**dict(device="cpu", threads=1) | settings)
    accelerator = make_accelerator(cfg)
    examples = train_teacher.image_examples(cfg, accelerator.device, net, data)
    return train_teacher.TeacherTask(cfg, accelerator, net, examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks on disk, right and wrong."""
    path = tmp_path_factory.mktemp("networks")
    checkpoints.save(path / "teacher.safetensors", network())
    checkpoints.save(path / "generator.safetensors", network(), sigma_init=2.5)
    checkpoints.save(path / "large.safetensors", network(img_resolution=16))
    write_snapshot(path / "augmented.pkl", augmented := network(**OTHER), augmented.config)
    checkpoints.save(path / "bare.safetensors", network(**OTHER).without_augmentation())
    for name, count, labels in (("few", 4, 4), ("mute", 20, 0)):  # data sets: too small, without labels
        (path / name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8), 12 * i).save(path / name / f"{i}.png")
        labelled = [[f"{i}.png", i % 10] for i in range(labels)] or None
        (path / name / "dataset.json").write_text(json.dumps({"labels": labelled}))
    (path / "cut.safetensors").write_bytes((path / "teacher.safetensors").read_bytes()[:-100])
    (path / "evil.pkl").write_bytes(b"\x80\x02cos\nsystem\nX\x0a\0\0\0touch evil\x85R.")
    return path


@pytest.fixture
def here(folder, monkeypatch):
    quick(monkeypatch.setattr)
    monkeypatch.chdir(folder)
    return folder


def run(*more, **changes):
    """edm/distill.py's exit code."""
    presets = {name: preset | {"data": None} for name, preset in DISTILLATIONS.items()}
    settings = TINY | dict(teacher="teacher.safetensors") | changes
    return start(distill.main, Distillation, settings, *more, presets=presets)


class Pixels(torch.nn.Module):
    """The features of an evaluation without a classifier to train: 64 pixels."""

    num_features = 64

    def forward(self, images):
        return images.flatten(1).float() / 255

    def probabilities(self, images):
        return self(images)[:, :10].softmax(1)


@pytest.fixture
def pixels(here, monkeypatch):
    monkeypatch.setattr(judge, "classifier_features", lambda data, cache: Pixels())


# ----------------------------------------------------------------------------------------------
# For every distillation.


def stirred(task):
    """Its three networks made different.  task.gradients: those of its last updates, flat."""
    torch.manual_seed(1)
    task.gradients = {}
    for name in ("fake", "generator"):
        trainee = getattr(task, name)
        for p in trainee.network.parameters():
            nudge = (0.05 * torch.randn(p.shape, dtype=p.dtype)).to(p.device)
            if trainee.sharded:
                nudge = distribute_tensor(nudge, p.device_mesh, p.placements)
            p.data += nudge
        trainee.norm = watched(task, name, trainee.norm)
    return task


def watched(task, name, norm):
    def noting():
        parts = [p.grad for p in getattr(task, name).network.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in parts]
        task.gradients[name] = flat(whole)
        return norm()

    return noting


class Watch:
    """moved(): the names of the networks that changed since the last call."""

    def __init__(self, task):
        self.networks = dict(fake=task.fake.network, generator=task.generator.network, teacher=task.teacher,
                             ema=task.ema.network)  # fmt: skip
        self.moved()

    def moved(self):
        now = {name: flat(net) for name, net in self.networks.items()}
        before, self.now = getattr(self, "now", now), now
        return {name for name in now if not torch.equal(now[name], before[name])}


def assert_each_update_moves_its_own(task, images, draw):
    watch = Watch(task)
    task.update_fake(draw, images, 0)
    assert watch.moved() == {"fake"}
    task.update_generator(draw, None, 0)
    assert watch.moved() == {"generator"}
    assert all(p.grad is None for net in watch.networks.values() for p in net.parameters())
    assert all(p.requires_grad for p in task.fake.network.parameters())
    assert not any(p.requires_grad for net in (task.teacher, task.ema.network) for p in net.parameters())


def quick(patch=setattr):
    """No figures: they take most of a tiny run's time.  What goes into them is looked at all the same."""
    patch(plots, "panel", lambda rows: [to_uint8(x) for _, x in rows] and Figure((1, 1)))
    patch(plots, "curves", lambda history: Figure((1, 1)))


@contextmanager
def signal_at(step, number=signal.SIGTERM):
    """What runs in it gets that signal at that step."""
    whole = Distiller.step

    def stopped(self, n):
        if n == step:
            os.kill(os.getpid(), number)
        return whole(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "step", stopped)
        yield


def assert_refused(run, words, here, capsys):
    """words, with "--teacher=" for none: one line and code 2, and here nothing is other than before -> what
    stdout and stderr have."""
    files = lambda: {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in here.rglob("*")}
    before, none = files(), {"teacher": None} if "--teacher=" in words else {}
    assert run(*words.replace("--teacher=", "").split(), out="new", **none) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "error: " in err and files() == before
    return out, err


def record(out, load=checkpoints.load):
    """What must not depend on interruptions: the log but for time and memory, and all weights."""
    rows = list(csv.DictReader((Path(out) / "log.csv").read_text().splitlines()))
    for row in rows:
        del row["seconds"], row["peak_memory_gb"]
    state = Folder(out, {}).load()
    weights = [flat(load(Path(out) / "generator.safetensors")[0])]
    for name in ("fake", "generator"):
        weights.append(flat(state[name]["network"].values()))
    return rows, weights


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def assert_rows_close(rows, expected, rel):
    assert [[*row] for row in rows] == [[*row] for row in expected]
    for row, other in zip(rows, expected):
        numbers, others = ([float(v) for v in one.values()] for one in (row, other))
        assert numbers == pytest.approx(others, rel=rel, nan_ok=True)
