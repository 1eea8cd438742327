"""Weights of PixArt in diffusers' form: what goes in comes out, what is wrong is one line; export."""

import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

from edm.images.checkpoints import save
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.text.export import one_step_scheduler, write_pipeline
from edm.text.pixart import PixArtDenoiser
from edm.text.pixart_files import find_pipeline, load_transformer, load_vae, sigma_init_of
from edm.text.prompts import TextEncoder
from tests import pixart
from tests.common import ROOT, spawn
from tests.pixart import CONFIG, assert_same, original_by_hand, refused, tiny
from toy.files import UserError

pipeline = pixart.pipeline  # a fixture
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

# ----------------------------------------------------------------------------------------------
# Students and folders.


@pytest.mark.parametrize("changes", [{}, dict(sample_size=128, num_layers=1)], ids=["512", "1024"])
def test_a_student_comes_back_exactly_with_its_notes(tmp_path, changes):
    network, path = tiny(**changes).requires_grad_(True), tmp_path / "student.safetensors"
    save(path, network, sigma_init=2.5, teacher="a/b", step=3)
    found, about = load_transformer(path)
    assert about == {"sigma_init": 2.5, "teacher": "a/b", "step": 3}
    assert_same(found, network)
    assert not found.training and not any(p.requires_grad or p.is_meta for p in found.parameters())
    assert torch.equal(found.pos_embed.pos_embed, network.pos_embed.pos_embed)
    assert found.use_additional_conditions == network.use_additional_conditions == ("sample_size" in changes)
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_student_of_bfloat16_is_written_as_float32(tmp_path):
    network = tiny()
    save(tmp_path / "s.safetensors", network.to(torch.bfloat16), sigma_init=2.5)
    written = safetensors.torch.load_file(tmp_path / "s.safetensors").values()
    assert {t.dtype for t in written} == {torch.float32}
    assert_same(load_transformer(tmp_path / "s.safetensors")[0], network.float())


@pytest.mark.parametrize("kind", ["student", "folder", "pth"])
def test_the_loaded_network_is_not_a_view_of_the_file(tmp_path, kind):
    source = path = tmp_path / "file"
    if kind == "student":
        save(path, tiny(), sigma_init=2.5)
    elif kind == "folder":
        tiny().save_pretrained(tmp_path / "transformer")
        source, path = tmp_path, tmp_path / WEIGHTS
    else:
        torch.save(original_by_hand(tiny()), path)
    found, _ = load_transformer(source, heads=2)
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(found, tiny())


def test_folders_of_a_pipeline_and_of_a_transformer(pipeline):
    for source in (pipeline, str(pipeline), pipeline / "transformer"):
        found, about = load_transformer(source)
        assert_same(found, tiny())
        assert about == {} and not found.training


def test_a_folder_in_several_files_half_precision_and_old_versions_words(tmp_path):
    network = tiny()
    network.half().save_pretrained(tmp_path, max_shard_size="30KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"_class_name": "Transformer2DModel", "use_linear_projection": False, "num_vector_embeds": None}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    assert_same(load_transformer(tmp_path)[0], network.float())


def test_the_null_caption_of_old_versions_is_left_out(tmp_path):
    tiny().save_pretrained(tmp_path / "transformer")
    weights = safetensors.torch.load_file(tmp_path / WEIGHTS)
    safetensors.torch.save_file(
        weights | {"caption_projection.y_embedding": torch.ones(120, 32)}, tmp_path / WEIGHTS
    )
    assert_same(load_transformer(tmp_path)[0], tiny())


# ----------------------------------------------------------------------------------------------
# What is wrong.


def test_damaged_files(tmp_path):
    save(tmp_path / "s.safetensors", tiny(), sigma_init=2.5)
    torch.save(original_by_hand(tiny()), tmp_path / "o.pth")
    for name in ("s.safetensors", "o.pth"):
        whole = (tmp_path / name).read_bytes()
        for size in (0, 5, 9, 100, len(whole) // 2, len(whole) - 3):
            (tmp_path / f"cut-{name}").write_bytes(whole[:size])
            refused(tmp_path / f"cut-{name}", heads=2)


def test_damaged_folders(tmp_path):
    tiny().save_pretrained(tmp_path / "transformer")
    weights = safetensors.torch.load_file(tmp_path / WEIGHTS)
    config = tmp_path / "transformer" / "config.json"
    refused_folder = partial(refused, tmp_path, named=f"{tmp_path}/transformer: ")
    for changed, word in (
        ({k: v for k, v in weights.items() if k != "proj_out.bias"}, "missing tensor proj_out.bias"),
        (weights | {"extra": torch.ones(1)}, "unknown tensor extra"),
        (weights | {"proj_out.bias": torch.ones(3)}, "tensor proj_out.bias is (3,)"),
    ):
        safetensors.torch.save_file(changed, tmp_path / WEIGHTS)
        refused_folder(word)
    safetensors.torch.save_file(weights, tmp_path / WEIGHTS)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-5])
    refused_folder("diffusion_pytorch_model.safetensors: damaged")
    (tmp_path / WEIGHTS).unlink()
    refused_folder("diffusion_pytorch_model.safetensors")
    (tmp_path / WEIGHTS).write_bytes(whole)
    numbers = '{"num_layers": 1e9, "sample_size": 8}', '{"num_layers": 2, "sample_size": 1048576}'
    for text in ("{", "[]", "{}", *numbers):
        config.write_text(text)
        refused_folder()
    config.unlink()
    refused_folder("No such file")


@pytest.mark.parametrize(
    "name", ["missing/folder/deep", "missing.pth", "out/missing.safetensors", "name", "-a/b!"]
)
def test_missing(name):
    refused(name, "no such file or folder")


def test_hostile_configs(tmp_path):
    weights = {k: v.contiguous() for k, v in tiny().state_dict().items()}
    for changes in (dict(num_layers=10**9), dict(sample_size=10**6), dict(num_layers="2"),
                    dict(norm_type="x"), dict(attention_head_dim=-1), dict(patch_size=0),
                    dict(num_attention_heads=3)):  # fmt: skip
        metadata = {"config": json.dumps(CONFIG | changes), "about": "{}"}
        safetensors.torch.save_file(weights, tmp_path / "s.safetensors", metadata)
        refused(tmp_path / "s.safetensors")


@pytest.mark.parametrize("part, changes, words", [
    ("vae", {"scaling_factor": math.nan}, "NaN in it is no number"),
    ("vae", {"scaling_factor": 0}, "its scaling_factor is 0"),
    ("vae", {"scaling_factor": "x"}, "damaged, or of another kind"),
    ("vae", {"layers_per_block": -1}, "layers_per_block is -1"),
    ("transformer", {"dropout": math.nan}, "NaN in it is no number"),
    ("text_encoder", {"num_layers": 1}, ""),
])  # fmt: skip
def test_settings_of_the_parts_that_cannot_be(part, changes, words, pipeline, tmp_path, capsys):
    shutil.copytree(pipeline, tmp_path / "new")
    config = tmp_path / "new" / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")
    load = {"vae": load_vae, "transformer": load_transformer, "text_encoder": TextEncoder}[part]
    if words:
        with pytest.raises(UserError, match=words) as caught:
            load(str(tmp_path / "new"))
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    else:
        load(str(tmp_path / "new"))
        assert re.search(
            r"has no use for tensors encoder.block.1\S+, .* more of its files", capsys.readouterr().err
        )


def test_a_network_of_another_kind(tmp_path):
    safetensors.torch.save_file(
        {"a": torch.ones(1)}, tmp_path / "s", {"config": '{"img_channels": 1}', "about": "{}"}
    )
    refused(tmp_path / "s", "no config of a PixArt transformer")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "s")
    refused(tmp_path / "s", "not in PixArt's naming: unknown tensor a")


def test_a_name_on_the_hub_when_offline():
    code = "import os; os.environ['HF_HOME'] = '/nonexistent'\n"
    code += "from edm.text.pixart_files import load_transformer as f, UserError\n"
    code += "try: f('PixArt-alpha/x')\nexcept UserError as e: print(e)"
    done = spawn("-c", code, cwd=ROOT)
    words = r"PixArt-alpha/x: no such folder here, and not to be had from the hub \(\w+\)\n"
    assert re.fullmatch(words, done.stdout)


# ----------------------------------------------------------------------------------------------
# Export.


def export_pipeline(student, teacher, out):
    """As sample_pixart does."""
    transformer, about = load_transformer(student, like=teacher)
    folder = find_pipeline(teacher, transformer)
    write_pipeline(transformer, sigma_init_of(student, about), folder, out)


@pytest.mark.parametrize("sigma_init", [0.3, 1.0, 2.5, 5, 40.0, 156.6])
def test_the_schedulers_one_step(sigma_init):
    network = tiny()
    scheduler, t = one_step_scheduler(network, sigma_init)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [t] and (sigma_init != 2.5 or t == 440)
    assert scheduler.sigmas.tolist() == [pytest.approx(sigma_init, rel=3e-7), 0]
    assert float(scheduler.init_noise_sigma) == pytest.approx(sigma_init, rel=3e-7)
    assert (scheduler.betas > 0).all() and (scheduler.betas < 0.05).all()


@pytest.mark.parametrize("sigma_init", [2.5, 1.3])
def test_exported_pipeline_draws_the_generators_image(tmp_path, pipeline, sigma_init):
    student, prompts = tiny(seed=5), ["a red fox", "the blue boat in snow"]
    save(tmp_path / "s.safetensors", student, sigma_init=sigma_init)
    export_pipeline(tmp_path / "s.safetensors", pipeline, tmp_path / "deeper" / "out")
    pipe = PixArtAlphaPipeline.from_pretrained(tmp_path / "deeper" / "out")
    pipe.set_progress_bar_config(disable=True)
    z, _ = latents([3, 4], (4, 8, 8))
    how = dict(num_inference_steps=1, guidance_scale=1.0, use_resolution_binning=False, latents=z)
    found = {kind: pipe(prompts, output_type=kind, **how).images for kind in ("latent", "pt")}
    tokens = pipe.tokenizer(prompts, padding=True, return_tensors="pt")  # shorter than the pipeline's 120
    with torch.no_grad():
        caption = pipe.text_encoder(**tokens).last_hidden_state
        x = Generator(PixArtDenoiser(student), sigma_init)(z, caption=caption, mask=tokens.attention_mask)
        images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert x.std() > 0.1 and (x[0] - x[1]).abs().max() > 0.1
    assert (found["latent"] - x).abs().max() < 1e-5 * x.abs().max()
    assert (found["pt"] - (images / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5 * images.abs().max()
    teacher = Generator(PixArtDenoiser(load_transformer(pipeline)[0]), sigma_init)
    with torch.no_grad():  # so that the test could fail
        other = teacher(z, caption=caption, mask=tokens.attention_mask)
    assert (other - x).abs().max() > 0.1


def test_exported_folder_is_whole_and_its_own(tmp_path, pipeline):
    save(tmp_path / "s.safetensors", tiny(seed=5), sigma_init=2.5)
    before = {p: p.read_bytes() for p in pipeline.rglob("*") if p.is_file()}
    export_pipeline(tmp_path / "s.safetensors", pipeline, tmp_path / "out")
    assert {p: p.read_bytes() for p in pipeline.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s.safetensors"]
    for part in ("tokenizer", "text_encoder", "vae"):
        for path in (pipeline / part).iterdir():
            assert (tmp_path / "out" / part / path.name).read_bytes() == path.read_bytes()
    assert_same(load_transformer(tmp_path / "out")[0], tiny(seed=5))
    assert '"out"' in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="out: exists already"):
        export_pipeline(tmp_path / "s.safetensors", pipeline, tmp_path / "out")


def test_export_of_links_and_across_disks(tmp_path, pipeline, monkeypatch):
    """The hub's cache is of links; and where there can be no hard links there are copies."""
    save(tmp_path / "s.safetensors", tiny(), sigma_init=2.5)
    for path in pipeline.rglob("*"):
        if path.is_file():
            link = tmp_path / "cache" / path.relative_to(pipeline)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)

    def no_links(*_):
        raise OSError("across disks")

    for name, change in (("linked", None), ("copied", no_links)):
        if change:
            monkeypatch.setattr(os, "link", change)
        export_pipeline(tmp_path / "s.safetensors", tmp_path / "cache", tmp_path / name)
        files = [p for p in (tmp_path / name).rglob("*") if p.is_file()]
        assert files and not any(p.is_symlink() for p in files)
        same = [
            os.path.samefile(p, pipeline / p.relative_to(tmp_path / name)) for p in files if "vae" in str(p)
        ]
        assert same and all(s == (change is None) for s in same)


def test_export_refuses(tmp_path, pipeline, monkeypatch):
    student, out = tmp_path / "s.safetensors", tmp_path / "out"

    def export(words, teacher=pipeline, error=UserError):
        with pytest.raises(error, match=words) as caught:
            export_pipeline(student, teacher, out)
        assert "\n" not in str(caught.value) and not out.exists()
        assert not [*tmp_path.glob("tmp-*")]

    for sigma_init in (None, -1, "2.5", float("nan"), True):
        save(student, tiny(), sigma_init=sigma_init)
        export("s.safetensors: its notes have sigma_init=")
    save(student, tiny(caption_channels=16), sigma_init=2.5)
    export("its captions are 32 wide, the student's 16")
    save(student, tiny(), sigma_init=2.5)
    export("has no tokenizer, so is not a whole pipeline", teacher=pipeline / "transformer")
    export("s.safetensors: not a folder", teacher=student)
    export("no such file or folder", teacher=tmp_path / "nothing")
    full = lambda *_: Path("/dev/full").write_text("x" * 10**6, encoding="utf-8")
    monkeypatch.setattr(PixArtTransformer2DModel, "save_pretrained", full)
    export("out: cannot be written .No space left", error=OSError)
    broken = safetensors.SafetensorError("I/O error: File too large")
    monkeypatch.setattr(PixArtTransformer2DModel, "save_pretrained", Mock(side_effect=broken))
    export("out: cannot be written .I/O error: File too large", error=OSError)
