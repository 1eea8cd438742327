"""Weights of PixArt: what goes in comes out, whatever the naming; one line for all that is wrong; export."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from edm.images.checkpoints import save
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.text.export import one_step_scheduler, write_pipeline
from edm.text.pixart import PixArtDenoiser
from edm.text.pixart_files import find_pipeline, load_transformer, sigma_init_of
from edm.text.pixart_names import from_original
from toy.files import UserError

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference" / "pixart"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = dict(num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=2,
              in_channels=4, out_channels=8, caption_channels=32, sample_size=8)  # fmt: skip


def random_(network, seed=0, std=0.2):
    torch.manual_seed(seed)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=std)
    return network.eval().requires_grad_(False)


def tiny(seed=0, **changes):
    return random_(PixArtTransformer2DModel(**CONFIG | changes), seed)


def make_pipeline(folder, seed=0, width=32, **changes):
    """A whole pipeline of random weights, in diffusers' layout."""
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz.,"]
    words = [("▁" + word, -3.0) for word in ("red", "fox", "blue", "boat", "in", "the", "snow", "a")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -4.0), *letters, *words]
    encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=2,
                                      num_heads=2, feed_forward_proj="gated-gelu"))  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
                        down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    PixArtAlphaPipeline(
        T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=120), random_(encoder, 1),
        random_(vae, 2), tiny(seed, **changes), DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Read only."""
    return make_pipeline(tmp_path_factory.mktemp("pixart") / "teacher")


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == torch.float32 and torch.equal(a[name], b[name]), name


def conditions(network, batch=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.tensor([[7], [2], [4]])[:batch]
    return {
        "caption": torch.randn(batch, 7, network.config.caption_channels, generator=rng),
        "mask": mask.long(),
    }


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
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "s.safetensors").values()} == {
        torch.float32
    }
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
# PixArt's own naming.


def original_by_hand(network):
    """The inverse of the conversion for one block's names, written out here."""
    state, found = network.state_dict(), {}
    pairs = {
        "x_embedder.proj": "pos_embed.proj", "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2", "t_block.1": "adaln_single.linear",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "final_layer.linear": "proj_out",
    }  # fmt: skip
    for i in range(network.config.num_layers):
        new, old = f"transformer_blocks.{i}.", f"blocks.{i}."
        found[old + "scale_shift_table"] = state[new + "scale_shift_table"]
        pairs |= {old + "attn.proj": new + "attn1.to_out.0", old + "cross_attn.q_linear": new + "attn2.to_q",
                  old + "cross_attn.proj": new + "attn2.to_out.0", old + "mlp.fc1": new + "ff.net.0.proj",
                  old + "mlp.fc2": new + "ff.net.2"}  # fmt: skip
        for w in (".weight", ".bias"):
            qkv = [state[f"{new}attn1.to_{x}{w}"] for x in "qkv"]
            kv = [state[f"{new}attn2.to_{x}{w}"] for x in "kv"]
            found[f"{old}attn.qkv{w}"], found[f"{old}cross_attn.kv_linear{w}"] = torch.cat(qkv), torch.cat(kv)
    found |= {f"{old}.{w}": state[f"{new}.{w}"] for old, new in pairs.items() for w in ("weight", "bias")}
    found["final_layer.scale_shift_table"] = state["scale_shift_table"]
    found["y_embedder.y_embedding"] = torch.randn(120, network.config.caption_channels)
    found["pos_embed"] = network.pos_embed.pos_embed
    return found


def original_by_reference(network):
    """The inverse of the reference's key_map.json."""
    if not (REFERENCE / "key_map.json").exists():
        pytest.skip(f"needs the table of PixArt's names: no {REFERENCE / 'key_map.json'}")
    table = json.loads((REFERENCE / "key_map.json").read_text())
    state, found = network.state_dict(), {}
    for old, new in [
        *table["rename"].items(),
        *table["only_1024_ms"].items(),
        *table["split_along_dim_0"].items(),
    ]:
        for w in ("weight", "bias"):
            for i in range(network.config.num_layers):
                names = [name.format(w=w, i=i) for name in ([new] if isinstance(new, str) else new)]
                if names[0] in state:
                    found[old.format(w=w, i=i)] = torch.cat([state[name] for name in names])
    dropped = dict(
        zip(table["dropped"], (network.pos_embed.pos_embed, torch.randn(120, 32), torch.randn(1001)))
    )
    assert set(dropped) == {"pos_embed", "y_embedder.y_embedding", "u"}
    return found | dropped


def wrapped(weights):
    """As in the released SIM-DiT."""
    names = {name: "module." + ("" if name == "u" else "model.") + name for name in weights}
    return {"ema": {names[name]: value for name, value in weights.items()}}


LAYOUTS = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "ema first": lambda w: {"state_dict": {k: v + 1 for k, v in w.items()}, "state_dict_ema": w, "step": 1},
    "sim": wrapped,
    "no table": lambda w: {k: v for k, v in w.items() if k != "y_embedder.y_embedding"},
}


@pytest.mark.parametrize("inverse", [original_by_hand, original_by_reference])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_original_pth(tmp_path, inverse, layout):
    network = tiny()
    torch.save(LAYOUTS[layout](inverse(network)), tmp_path / "o.pth")
    found, about = load_transformer(tmp_path / "o.pth", heads=2)
    assert_same(found, network)
    assert about == {}
    want = {**network.config, "interpolation_scale": 1, "use_additional_conditions": False}
    assert {k: v for k, v in found.config.items() if k[0] != "_"} == {
        k: v for k, v in want.items() if k[0] != "_"
    }
    x, sigma, cond = latents(range(3), (4, 8, 8))[0], torch.tensor([0.5, 2.5, 40.0]), conditions(network)
    assert torch.equal(PixArtDenoiser(found)(x, sigma, **cond), PixArtDenoiser(network)(x, sigma, **cond))


@pytest.mark.parametrize("legacy", [False, True], ids=["safetensors", "old pth"])
def test_original_safetensors_and_the_format_before_zip(tmp_path, legacy):
    weights = {k: v.contiguous() for k, v in original_by_hand(tiny()).items()}
    if legacy:
        torch.save(weights, tmp_path / "o", _use_new_zipfile_serialization=False)
    else:
        safetensors.torch.save_file(weights, tmp_path / "o", metadata={"format": "pt"})
    assert_same(load_transformer(tmp_path / "o", heads=2)[0], tiny())


def test_original_of_1024_pixels(tmp_path):
    network = tiny(sample_size=128)
    weights = original_by_reference(network)
    torch.save({"state_dict": {k: v for k, v in weights.items() if k != "u"}}, tmp_path / "o.pth")
    found, _ = load_transformer(tmp_path / "o.pth", heads=2)
    assert_same(found, network)
    assert found.config.sample_size == 128 and found.config.interpolation_scale == 2
    assert found.use_additional_conditions and found.config.use_additional_conditions
    assert torch.equal(found.pos_embed.pos_embed, network.pos_embed.pos_embed)


def test_the_published_architecture_is_inferred():
    if not (REFERENCE / "pixart_xl2_512_config.json").exists():
        pytest.skip("needs the published architecture, a reference file")
    reference = json.loads((REFERENCE / "pixart_xl2_512_config.json").read_text())
    config = reference["transformer"]
    with torch.device("meta"):
        network = PixArtTransformer2DModel(**config)
    assert sum(p.numel() for p in network.parameters()) == reference["params"]["transformer_512"]
    weights = original_by_hand_on_meta(network)
    found, _ = from_original(weights)
    assert {k: config[k] for k in found if k not in ("interpolation_scale", "use_additional_conditions")} == {
        k: v for k, v in found.items() if k not in ("interpolation_scale", "use_additional_conditions")
    }
    assert found["interpolation_scale"] == 1 and found["use_additional_conditions"] is False


def original_by_hand_on_meta(network):
    with torch.device("meta"):
        return original_by_hand(network)


# ----------------------------------------------------------------------------------------------
# What is wrong.


def refused(source, *words, **how):
    with pytest.raises(UserError) as error:
        load_transformer(source, **how)
    text = str(error.value)
    assert text.startswith(str(source)) and "\n" not in text and len(text) < 400, text
    for word in words:
        assert word in text, text


BROKEN = {  # {name: tensor} changed -> words, in PixArt's naming
    "dropped": (lambda w: w.pop("t_block.1.weight"), ["missing tensor adaln_single.linear.weight"]),
    "half of a block": (
        lambda w: [w.pop(k) for k in list(w) if k.startswith("blocks.1.attn")],
        ["missing tensors transformer_blocks.1.attn1", "and 5 more"],
    ),
    "added": (lambda w: w.update({"blocks.0.attn.q_norm.weight": torch.ones(2)}),
              ["not in PixArt's naming: unknown tensor blocks.0.attn.q_norm.weight"]),
    "many": (lambda w: w.update({f"x{i}": torch.ones(2) for i in range(9)}),
             ["unknown tensors x0, x1, x2 and 6 more"]),
    "top as block": (lambda w: w.update({"blocks.0.t_block.1.bias": torch.ones(2)}), ["blocks.0.t_block.1"]),
    "no kind": (lambda w: w.update({"t_block.1": torch.ones(2)}), ["unknown tensor adaln_single.linear"]),
    "another block": (lambda w: w.update({"blocks.7.mlp.fc1.weight": w["blocks.0.mlp.fc1.weight"]}),
                      ["are too few for 3 layers"]),
    "shape": (lambda w: w.update({"blocks.1.mlp.fc1.weight": torch.ones(5, 5)}),
              ["tensor transformer_blocks.1.ff.net.0.proj.weight is (5, 5)", "needs (96, 24)"]),
    "rows of qkv": (lambda w: w.update({"blocks.1.attn.qkv.weight": torch.ones(70, 24)}),
                    ["blocks.1.attn1.to_v.weight is (22, 24)"]),
    "scalar": (lambda w: w.update({"blocks.1.attn.qkv.weight": torch.tensor(1.0)}), ["damaged"]),
    "integers": (lambda w: w.update({"t_block.1.bias": torch.ones(144, dtype=torch.int32)}), ["torch.int32"]),
    "not finite": (lambda w: w["t_block.1.bias"][3:].fill_(torch.nan), ["values that are not finite"]),
    "twice": (lambda w: w.update({"module.t_block.1.bias": w["t_block.1.bias"]}), ["a tensor occurs twice"]),
    "no input": (lambda w: w.pop("x_embedder.proj.weight"), ["missing tensor x_embedder.proj.weight"]),
    "no tensors": (lambda w: [w.pop(k) for k in list(w)], ["holds no tensors by name"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_original_is_converted_strictly(tmp_path, case):
    change, words = BROKEN[case]
    weights = {k: v.clone() for k, v in original_by_hand(tiny()).items()}
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / "o.pth")
    refused(tmp_path / "o.pth", *words, heads=2)


DIFFERS = "its pos_embed differs from the one that the network computes by up to "
ERRORS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 0.02}  # just beyond rounding


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pth"])
def test_a_table_of_positions_must_be_the_networks_but_for_rounding(tmp_path, dtype, safe):
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in original_by_hand(tiny()).items()}
    save, path = safetensors.torch.save_file if safe else torch.save, tmp_path / "o"
    save(weights, path)
    load_transformer(path, heads=2)
    for error in (ERRORS[dtype], 0.5, torch.nan):
        weights["pos_embed"] = weights["pos_embed"].clone()
        weights["pos_embed"][0, 5, 7] += error
        save(weights, path)
        words = "tensor pos_embed.pos_embed has values that are not finite" if error != error else DIFFERS
        refused(path, words, heads=2)


def test_a_table_of_another_grid(tmp_path):
    weights = original_by_hand(tiny())
    torch.save(weights | {"pos_embed": weights["pos_embed"][:, :15]}, tmp_path / "o")
    words = "tensor pos_embed.pos_embed is (1, 15, 24) torch.float32, the network needs (1, 9, 24)"
    refused(tmp_path / "o", words, heads=2)


def test_heads_of_a_pipeline_as_wide(tmp_path, pipeline):
    torch.save(original_by_hand(tiny()), tmp_path / "o.pth")
    assert_same(load_transformer(tmp_path / "o.pth", like=pipeline)[0], tiny())
    assert load_transformer(tmp_path / "o.pth", like=str(pipeline))[0].config.num_attention_heads == 2
    tiny(cross_attention_dim=48, attention_head_dim=24).save_pretrained(tmp_path / "wide" / "transformer")
    refused(tmp_path / "o.pth", "the number of heads must be given", like=tmp_path / "wide")


def test_original_of_unknown_heads(tmp_path):
    torch.save(original_by_hand(tiny()), tmp_path / "o.pth")
    refused(tmp_path / "o.pth", "width 24, not XL's 1,152: the number of heads must be given")
    refused(tmp_path / "o.pth", "got 5", heads=5)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["o.pth", "o"])
def test_code_in_a_file_is_not_run(tmp_path, name, zipped):
    weights = original_by_hand(tiny())
    content = {"state_dict": weights, "args": Hostile(str(tmp_path / "executed"))}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    refused(tmp_path / name, "might be code", heads=2)
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / name, weights_only=False)  # so that the test could fail
    assert (tmp_path / "executed").exists()


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
    for changed, word in (
        ({k: v for k, v in weights.items() if k != "proj_out.bias"}, "missing tensor proj_out.bias"),
        (weights | {"extra": torch.ones(1)}, "unknown tensor extra"),
        (weights | {"proj_out.bias": torch.ones(3)}, "tensor proj_out.bias is (3,)"),
    ):
        safetensors.torch.save_file(changed, tmp_path / WEIGHTS)
        refused_folder(tmp_path, word)
    safetensors.torch.save_file(weights, tmp_path / WEIGHTS)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-5])
    refused_folder(tmp_path, "diffusion_pytorch_model.safetensors: damaged")
    (tmp_path / WEIGHTS).unlink()
    refused_folder(tmp_path, "diffusion_pytorch_model.safetensors")
    (tmp_path / WEIGHTS).write_bytes(whole)
    for text in (
        "{",
        "[]",
        "{}",
        '{"num_layers": 1e9, "sample_size": 8}',
        '{"num_layers": 2, "sample_size": 1048576}',
    ):
        config.write_text(text)
        refused_folder(tmp_path)
    config.unlink()
    refused_folder(tmp_path, "No such file")


def refused_folder(folder, *words):
    with pytest.raises(UserError) as error:
        load_transformer(folder)
    assert str(error.value).startswith(f"{folder}/transformer: ") and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


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


def test_a_network_of_another_kind(tmp_path):
    safetensors.torch.save_file(
        {"a": torch.ones(1)}, tmp_path / "s", {"config": '{"img_channels": 1}', "about": "{}"}
    )
    refused(tmp_path / "s", "no config of a PixArt transformer")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "s")
    refused(tmp_path / "s", "not in PixArt's naming: unknown tensor a")


def test_a_name_on_the_hub_when_offline():
    code = "from edm.text.pixart_files import load_transformer as f, UserError\n"
    code += "try: f('PixArt-alpha/x')\nexcept UserError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert re.fullmatch(
        r"PixArt-alpha/x: no such folder here, and not to be had from the hub \(\w+\)\n", done.stdout
    )


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
    export("No space left", error=OSError)
