"""PixArt's own names for its tensors -> those of diffusers, and the config, which its files do not tell."""

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from edm.images.checkpoints import some
from edm.images.foreign import read_json
from toy.files import UserError, naming

POSITIONS = "pos_embed.pos_embed"  # computed, not learned
TOP = {  # PixArt's name -> diffusers'; .weight and .bias alike
    "pos_embed": POSITIONS,
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
EMBEDDERS = {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}  # the last two: 1,024 pixels only
for old, new in EMBEDDERS.items():
    TOP |= {f"{old}_embedder.mlp.{2 * i}": f"adaln_single.emb.{new}_embedder.linear_{i + 1}" for i in (0, 1)}
BLOCK = {  # in each block; several names: the rows are split
    "scale_shift_table": "scale_shift_table",
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
DROPPED = ("y_embedder.y_embedding", "u")  # the null caption, here that of ""; noise levels, computed here
PREFIX = re.compile(r"(?:(?:module|model|base_model|_orig_mod)\.)*")  # of what a network was wrapped in
NAME = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?P<layer>.+?)(?P<kind>\.weight|\.bias)?")


def from_original(
    weights: dict[str, Tensor], heads: int | None = None, like: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PixArt's {name: tensor} -> (config, diffusers' {name: tensor})."""
    plain = {PREFIX.sub("", name, count=1): value for name, value in weights.items()}
    if len(plain) < len(weights):
        raise UserError("a tensor occurs twice, with and without a prefix")
    converted, unknown = {}, []
    for name, tensor in plain.items():
        found = NAME.fullmatch(name)
        names = found and (BLOCK if found["block"] else TOP).get(found["layer"])
        if names:
            prefix = f"transformer_blocks.{found['block']}." if found["block"] else ""
            targets = [f"{prefix}{target}{found['kind'] or ''}" for target in names.split()]
            converted |= zip(targets, tensor.chunk(len(targets)), strict=True)
        elif name not in DROPPED:
            unknown.append(name)
    if unknown:
        raise UserError(f"not in PixArt's naming: unknown {some(unknown)}")
    config = infer_config(plain, heads, like)
    if config["use_additional_conditions"]:  # it uses no table, but computes one for each size of image
        converted.pop(POSITIONS, None)
    return config, converted


def infer_config(weights: dict, heads: int | None = None, like: str | Path | None = None) -> dict[str, Any]:
    """The arguments of PixArtTransformer2DModel, from the shapes under PixArt's names."""
    needed = ("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in weights]:
        raise UserError(f"not in PixArt's naming: missing {some(missing)}")
    (width, channels, patch, _), (_, caption), (out, _) = (weights[name].shape for name in needed)
    heads = heads or (like and heads_of(like, width)) or (16 if width == 1152 else None)
    if not heads or width % heads:
        words = "the number of heads must be given, or a pipeline with a transformer as wide"
        raise UserError(f"width {width}, not XL's 1,152: {words}; got {heads}")
    large = "csize_embedder.mlp.0.weight" in weights  # 1,024 pixels
    positions = weights["pos_embed"].shape[1] if "pos_embed" in weights else 32**2
    return dict(
        num_attention_heads=heads, attention_head_dim=width // heads, cross_attention_dim=width,
        in_channels=channels, out_channels=out // patch**2, patch_size=patch, caption_channels=caption,
        num_layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        sample_size=128 if large else math.isqrt(positions) * patch,
        interpolation_scale=2 if large else 1, use_additional_conditions=large,
    )  # fmt: skip


def heads_of(folder: str | Path, width: int) -> int | None:
    """Attention heads of a pipeline's transformer, if there is one here of this width."""
    path = Path(folder, "transformer", "config.json")
    if not path.exists():
        return None
    with naming(path):
        config = read_json(path)
        heads = config["num_attention_heads"]
        return heads if heads * config["attention_head_dim"] == width else None
