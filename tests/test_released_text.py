"""Text to image from files as others release them: SIM-DiT's layout by its own numbers, PixArt's width."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image

from edm import sample_pixart
from edm.config import command_line
from edm.device import slow_in_bf16
from edm.images.checkpoints import save
from edm.images.data import to_uint8
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.text.pixart import PixArtDenoiser, decode
from edm.text.pixart_files import load_transformer, load_vae
from edm.text.prompts import TextEncoder
from tests.pixart import make_pipeline, random_

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared/reference/pixart"
needs_files = pytest.mark.skipif(
    not (REFERENCE / "sim_dit_tiny.npz").exists(), reason=f"SIM-DiT's layout is not at {REFERENCE}"
)


@pytest.fixture(scope="module")
def original():
    """Inputs, and outputs by the original code."""
    with np.load(REFERENCE / "sim_dit_tiny.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline that fits it.  Read only."""
    wide = dict(attention_head_dim=24, cross_attention_dim=48)
    return make_pipeline(tmp_path_factory.mktemp("released") / "teacher", seed=3, **wide)


def run(*words):
    return command_line(sample_pixart.main, sample_pixart.Settings, "", list(map(str, words)))


def close(found, expected):
    return (found - expected).abs().max() < 1e-5 * expected.abs().max()


@needs_files
@pytest.mark.parametrize("name", ["sim_dit_tiny.pth", "sim_dit_tiny_args.pth"])
def test_a_released_generator_makes_what_its_own_code_does(original, name, capsys):
    transformer, about = load_transformer(REFERENCE / name, int(original["heads"]))
    generator = Generator(PixArtDenoiser(transformer), original["init_sigma"].item())
    with torch.no_grad():
        found = generator(original["z"], caption=original["caption"], mask=original["mask"])
    assert close(found, original["latents"]) and about == {}
    ignored = f"{REFERENCE / name}: 47 tensors taken, 1 other entry ignored (args)\n"
    assert capsys.readouterr().err == (ignored if "args" in name else "")


@needs_files
def test_it_is_sampled_and_exported_by_the_command(original, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = REFERENCE / "sim_dit_tiny.pth"
    words = "--sigma-init 2.5 --prompts a --seeds 3,4 --device cpu --out images --export one-step".split()
    assert run("--student", student, "--pipeline", teacher, *words) == 0

    generator = Generator(PixArtDenoiser(load_transformer(student, 2)[0]), 2.5)
    z, _ = latents([3, 4], (4, 8, 8))
    cond = {name: t.expand(2, *t.shape[1:]) for name, t in TextEncoder(teacher)(["a"]).items()}
    with torch.no_grad():
        expected = to_uint8(decode(load_vae(teacher), generator(z, **cond)))
    for seed, image in zip((3, 4), expected):
        found = np.asarray(Image.open(f"images/0000-{seed:06d}.png")).astype(int)
        assert np.abs(found - image.permute(1, 2, 0).numpy()).max() <= 1 and found.std() > 5

    pipe = PixArtAlphaPipeline.from_pretrained("one-step")
    pipe.set_progress_bar_config(disable=True)
    caption, mask = original["caption"], original["mask"]
    how = dict(prompt_embeds=caption, prompt_attention_mask=mask, negative_prompt=None)
    how |= dict(num_inference_steps=1, guidance_scale=1.0, use_resolution_binning=False, output_type="latent")
    found = pipe(latents=original["z"], **how).images
    assert close(found, original["latents"])


WRONG = {  # options -> what is said
    "": "sigma_init=None; it may be a one-step generator of others: then give its --sigma-init (SIM-",
    "--sigma-init -1": "--sigma-init must be positive, got -1.0",
    "--sigma-init nan": "--sigma-init must be positive, got nan",
    "--sigma-init 2.5 --heads 5": "the number of heads must be given, or a pipeline with a",
    "--sigma-init 2.5": "differs from the one that the network computes by up to 0.5",
}  # fmt: skip


@needs_files
@pytest.mark.parametrize("what", ["--out", "--export"])
@pytest.mark.parametrize("words", WRONG)
def test_what_is_missing_or_wrong_is_told_in_one_line(teacher, tmp_path, monkeypatch, capsys, words, what):
    monkeypatch.chdir(tmp_path)
    name = f"sim_dit_tiny{'_shifted_pos' if 'differs' in WRONG[words] else ''}.pth"
    assert run("--student", REFERENCE / name, "--pipeline", teacher, what, "new", *words.split()) == 2
    err = capsys.readouterr().err
    assert WRONG[words] in err and err.count("\n") == 1, err
    assert not [*tmp_path.iterdir()]


def test_a_noted_sigma_init_is_not_contradicted(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("s.safetensors", load_transformer(teacher)[0], sigma_init=2.5, teacher=str(teacher))
    assert run("--student", "s.safetensors", "--sigma-init", "2.0", "--out", "new") == 2
    assert "--sigma-init 2.0: but s.safetensors was distilled at 2.5\n" in capsys.readouterr().err
    assert run("--student", "s.safetensors", "--sigma-init", "2.5", "--out", "new.png", "--prompts", "a") == 0


# ----------------------------------------------------------------------------------------------
# PixArt-XL/2 at 512 pixels: its width, its latents and its captions, but 2 of its 28 layers.


def make_wide_pipeline(folder):
    config = json.loads((REFERENCE / "pixart_xl2_512_config.json").read_text())["transformer"]
    make_pipeline(folder, width=4096)
    transformer = random_(PixArtTransformer2DModel(**config | dict(num_layers=2)), std=0.02)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, sample_size=512,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        scaling_factor=0.18215)  # fmt: skip
    random_(vae, std=0.1).save_pretrained(folder / "vae")
    return transformer


def command(script, *words):
    """Its output, and the largest memory of all commands so far, in GB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, ROOT / "edm" / script, *" ".join(words).split()]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


@pytest.mark.slow
@needs_files
def test_the_whole_path_at_full_width(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = make_wide_pipeline(tmp_path / "pipeline")
    Path("captions.jsonl").write_text(
        '{"text": "a red fox"}\n{"text": "%s"}\n' % ("a boat " * 200), encoding="utf-8"
    )
    command("prompts.py", "encode captions.jsonl captions.safetensors --text-encoder pipeline")
    out, memory = command(
        "distill_pixart.py",
        "--preset pixart-512 --teacher pipeline --prompts captions.jsonl --captions captions.safetensors",
        "--steps 1 --batch 1 --micro-batch 1 --device cpu --threads 1 --out run",
        "--precision no" if slow_in_bf16("cpu") else "",  # a quarter of an hour, without its instructions
    )
    assert "finished after 1 steps" in out and memory < 8
    student, about = load_transformer("run/generator.safetensors")
    assert about["sigma_init"] == 2.5 and student.config.sample_size == 64
    moves = torch.cat([(a - b).flatten() for a, b in zip(student.parameters(), teacher.parameters())]).abs()
    assert moves.max() < 5.1e-6 and (moves > 4e-6).float().mean() > 0.9  # the first step of Adam is lr

    words = "--student run/generator.safetensors --prompts captions.jsonl --seeds 5 --batch 1 --device cpu"
    out, memory = command("sample_pixart.py", words, "--out images --export one-step")
    assert "wrote one-step" in out and "wrote 2 images" in out and memory < 8
    found = np.asarray(Image.open("images/0000-000005.png"))
    assert found.shape == (512, 512, 3) and found.std() > 5
    pipe = PixArtAlphaPipeline.from_pretrained("one-step")
    pipe.set_progress_bar_config(disable=True)
    z, _ = latents([5], (4, 64, 64))
    how = dict(num_inference_steps=1, guidance_scale=1.0, output_type="np")
    image = pipe("a red fox", latents=z, **how).images[0]
    gap = np.abs((image * 255).round() - found)
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01
