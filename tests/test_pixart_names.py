"""Weights of PixArt under PixArt's own names: converted strictly, whatever stands around them."""

import json
import os

import pytest
import safetensors.torch
import torch
from diffusers import PixArtTransformer2DModel

from edm.images.sampler import latents
from edm.text.pixart import PixArtDenoiser
from edm.text.pixart_files import load_transformer
from edm.text.pixart_names import from_original
from tests import pixart
from tests.common import reference
from tests.pixart import assert_same, original_by_hand, refused, tiny
from tests.snapshots import Reduced

pipeline = pixart.pipeline  # a fixture


def conditions(network, batch=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.tensor([[7], [2], [4]])[:batch]
    return {
        "caption": torch.randn(batch, 7, network.config.caption_channels, generator=rng),
        "mask": mask.long(),
    }


def original_by_reference(network):
    """The inverse of the reference's key_map.json."""
    table = json.loads(reference("pixart/key_map.json").read_text())
    state, found = network.state_dict(), {}
    for old, new in (table["rename"] | table["only_1024_ms"] | table["split_along_dim_0"]).items():
        for w in ("weight", "bias"):
            for i in range(network.config.num_layers):
                names = [name.format(w=w, i=i) for name in ([new] if isinstance(new, str) else new)]
                if names[0] in state:
                    found[old.format(w=w, i=i)] = torch.cat([state[name] for name in names])
    values = network.pos_embed.pos_embed, torch.randn(120, 32), torch.randn(1001)
    dropped = dict(zip(table["dropped"], values))
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
    plain = lambda config: {k: v for k, v in config.items() if k[0] != "_"}
    assert plain(found.config) == plain(want)
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
    published = json.loads(reference("pixart/pixart_xl2_512_config.json").read_text())
    config = published["transformer"]
    with torch.device("meta"):
        network = PixArtTransformer2DModel(**config)
        weights = original_by_hand(network)
    assert sum(p.numel() for p in network.parameters()) == published["params"]["transformer_512"]
    found, _ = from_original(weights)
    inferred = dict(interpolation_scale=1, use_additional_conditions=False)
    assert found == {k: config.get(k) for k in found} | inferred
    assert found["use_additional_conditions"] is False


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


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["o.pth", "o"])
def test_code_in_a_file_is_not_run(tmp_path, name, zipped):
    weights = original_by_hand(tiny())
    content = {"state_dict": weights, "args": Reduced(os.mkdir, str(tmp_path / "executed"))}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    refused(tmp_path / name, "might be code", heads=2)
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / name, weights_only=False)  # so that the test could fail
    assert (tmp_path / "executed").exists()
