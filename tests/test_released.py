"""Files of the released sizes from the first command to the last: teacher, distillation, images, table.

The real ones are not at hand.  These have their names, shapes, constructor arguments and pickled form, of
networks whose weights are random.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edm.device import slow_in_bf16
from edm.images import checkpoints
from edm.images.data import one_hot, to_uint8
from edm.images.networks import ARCHITECTURES, EDMPrecond
from edm.images.sampler import latents
from tests.snapshots import write_snapshot

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference" / "edm"
SIZES = {  # name -> classes, architecture, entries, parameters of edm-cifar10-32x32-NAME.pkl
    "uncond-vp": (0, "ddpmpp", 425, 55_733_891),
    "cond-vp": (10, "ddpmpp", 427, 55_735_299),
    "uncond-ve": (0, "ncsnpp", 432, 56_397_827),
    "cond-ve": (10, "ncsnpp", 434, 56_400_643),
}


def released(name, folder, **others):
    """A file of its form -> its path.  Nothing else is recorded of the network: the rest is its default."""
    label_dim, architecture, *_ = SIZES[name]
    given = ARCHITECTURES[architecture] | dict(decoder_type="standard", model_channels=128, augment_dim=9,
                                               channel_mult=[2, 2, 2], dropout=0.13, img_resolution=32,
                                               img_channels=3, label_dim=label_dim) | others  # fmt: skip
    torch.manual_seed(0)
    network = EDMPrecond(**given).requires_grad_(False)
    for p in network.parameters():  # of some size everywhere: the first ones of a training say nothing
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    path = folder / f"edm-cifar10-32x32-{name}.pkl"
    write_snapshot(path, network, dict(model_type="SongUNet", use_fp16=False) | given)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty labelled pictures, in EDM's form."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for i in range(40):
        pixels = np.clip(rng.normal(20 * (i % 10) + 30, 20, (32, 32, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"img{i:08d}.png")
    labels = [[f"img{i:08d}.png", i % 10] for i in range(40)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


DISTILL = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from functools import partial
from edm import distill
from edm.training import plots
distill.fixed_latents = partial(distill.fixed_latents, rows=1)  # pictures of 80 images take minutes
plots.PANEL_SIGMAS = plots.PANEL_SIGMAS[:1]
given = distill.main, distill.Distillation, "", None, distill.DISTILLATIONS
sys.exit(distill.command_line(*given))
"""


def command(script, *words, cwd):
    words = [
        sys.executable,
        *([script] if script == "-c" else [str(ROOT / "edm" / script)]),
        *map(str, words),
    ]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_released_teacher_becomes_a_generator_images_and_a_table(name, data, tmp_path, thorough):
    if not thorough and name != "cond-ve":  # with labels, and the longer list of entries
        pytest.skip("with --thorough: minutes")
    label_dim, _, entries, parameters = SIZES[name]
    path, run = released(name, tmp_path), tmp_path / "run"
    try:
        precision = "no" if slow_in_bf16("cpu") else "bf16"  # half an hour, without its instructions
        words = (
            f"--preset cifar10-{name[:-3]} --precision {precision} --device cpu --steps 1 --batch 2".split()
        )
        out = command("-c", DISTILL, *words, "--teacher", path, "--out", run, cwd=tmp_path)
        assert "finished after 1 steps" in out and "own network counts" not in out

        (teacher, _), (student, _) = map(checkpoints.load, (path, run / "generator.safetensors"))
        weights, moved = teacher.state_dict(), student.state_dict()
        assert (len(weights), sum(p.numel() for p in teacher.parameters())) == (entries, parameters)
        layer = weights.pop("model.map_augment.weight")
        assert [*weights] == [*moved] and layer.shape == (teacher.model.noise_channels, 9)
        gaps = torch.cat([(moved[k] - weights[k]).abs().flatten() for k, _ in student.named_parameters()])
        assert 0.99e-5 < gaps.max() < 1.05e-5  # the first step of Adam is its rate, 1e-5
        assert (gaps > 1e-8).float().mean() > 0.9  # less where the gradient is near 1e-8, its epsilon

        words = "--seeds 0-3 --device cpu --out images.npz".split()
        out = command("sample.py", "--network", run / "generator.safetensors", *words, cwd=tmp_path)
        assert "1 evaluation per image" in out
        z, labels = latents(range(4), (3, 32, 32), label_dim)
        cond = one_hot(labels, 10) if label_dim else None
        with np.load(tmp_path / "images.npz") as found, torch.no_grad():
            by_hand = to_uint8(student(2.5 * z, torch.full((4,), 2.5), cond)).permute(0, 2, 3, 1)
            assert np.abs(found["images"].astype(int) - by_hand.numpy()).max() <= 1

        words = ["--student", run / "generator.safetensors", "--data", data, "--samples", 8, "--steps", 2]
        words += ["--classifier", data.parent / "classifier.safetensors", "--device", "cpu"]
        table = command("evaluate.py", *words, cwd=tmp_path)
        rows = json.loads((tmp_path / "metrics.json").read_text())
        assert [rows[who]["evaluations"] for who in ("student", "teacher")] == [1, 3]
        assert all(rows[who]["images"] == 8 and rows[who]["fd"] > 0 for who in ("student", "teacher"))
        names = ("student", "teacher", "data")
        assert tuple(line.split()[0] for line in table.splitlines() if line.startswith(names)) == names
    finally:  # gigabytes, which pytest would keep
        for file in [path, *run.rglob("*.pt"), *run.glob("*.safetensors")]:
            file.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_step_at_64x64(tmp_path):
    """ffhq-64's whole network, as NVlabs' file has it: the same command, without data to compare with."""
    how = dict(img_resolution=64, channel_mult=[1, 2, 2, 2], dropout=0.05)
    path, run = released("uncond-vp", tmp_path, **how), tmp_path / "run"
    words = "--preset ffhq-64 --device cpu --steps 1 --batch 1".split()
    out = command("-c", DISTILL, *words, "--teacher", path, "--out", run, cwd=tmp_path)
    assert "finished after 1 steps" in out and "own network counts" not in out
    (teacher, _), (student, _) = map(checkpoints.load, (path, run / "generator.safetensors"))
    assert sum(p.numel() for p in student.parameters()) > 61e6
    moved = dict(student.named_parameters())
    gaps = torch.cat([(moved[k] - p).abs().flatten() for k, p in teacher.named_parameters() if k in moved])
    assert 0.99e-5 < gaps.max() < 1.05e-5 and (gaps > 1e-8).float().mean() > 0.9
