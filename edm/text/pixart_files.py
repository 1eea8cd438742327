"""Weights of PixArt on disk: diffusers' folders, the original files, and our own students.

    transformer, about = load_transformer("PixArt-alpha/PixArt-XL-2-512x512")  # a folder, a file, a name
    checkpoints.save("generator.safetensors", transformer, sigma_init=2.5, teacher="...")

Students are files of `edm.images.checkpoints.save`, with sigma_init in their notes.
Every tensor of a file must find its place, and every place its tensor.  Nothing in a file is executed.
"""

import inspect
import math
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module

from edm.images.checkpoints import (
    MAX_BLOCKS,
    check_weights,
    is_safetensors,
    open_safetensors,
    read_safetensors,
)
from edm.images.foreign import read_json
from edm.images.pth import read_pth
from edm.text.flow import read_predictions
from edm.text.pixart import decode
from edm.text.pixart_names import POSITIONS, from_original
from edm.text.pretrained import pretrained
from toy.files import UserError, naming

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NULL = "caption_projection.y_embedding"  # the null caption, which old versions of diffusers kept
# What a config may ask for before it is compared with the tensors.  PixArt's at 1,024 pixels has a width of
# 16 * 72 and 64 * 64 patches, a table of positions of 4.7 million.
SIZES = dict(num_layers=MAX_BLOCKS, sample_size=1024, patch_size=64, num_attention_heads=256,
             attention_head_dim=2048, in_channels=2**14)  # fmt: skip
WIDTHS = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 2**14)
FAMILIES = {  # class of diffusers -> the sizes in its config
    "PixArtTransformer2DModel": SIZES | dict(cross_attention_dim=2**14),
    "SD3Transformer2DModel": SIZES | WIDTHS | dict(pos_embed_max_size=1024),
}
MAX_TABLE = 2**23
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_transformer(
    source: str | Path, heads: int | None = None, like: str | Path | None = None
) -> tuple[Module, dict[str, Any]]:
    """-> (a transformer of FAMILIES on the CPU, eval mode, float32, gradients off; dict of notes).

    source: a folder of a diffusers pipeline or of its transformer, the name of a pipeline on the hub, a
    student, or one in PixArt's own naming (.pth or .safetensors), such as the released
    SIM-DiT.  The latter do not tell the number of attention heads: `heads`, or that of `like`, a pipeline's
    folder with a transformer as wide, or 16 at width 1,152 (XL).  Notes are those of our own files; of others
    what is predicted (`edm.text.flow`), as the pipeline's scheduler tells it, or else that of `like`.
    Raises UserError, in one line that names the source.
    """
    path = Path(source)
    if path.is_file():
        with naming(path):
            config, weights, about = read_file(path, heads, like)
            return build(config, weights, about), about
    path, config, about = look(source, like)
    with naming(path):
        return build(config, read_weights(path), about), about


def look(source: str | Path, like: str | Path | None = None) -> tuple[Path, dict, dict[str, Any]]:
    """Of a folder or a name -> the transformer's folder, its config, what it predicts; else UserError.

    No weights are read.  Its scheduler is beside it, or in `like`.
    """
    pipeline = path = find(source, ("transformer", "scheduler"))
    if (pipeline / "transformer").is_dir():
        path = pipeline / "transformer"
    elif pipeline.resolve().name == "transformer":
        pipeline = pipeline.resolve().parent
    with naming(path):
        about = read_predictions(pipeline, *schedulers(like))
        config = read_json(path / "config.json")
        family_of(config, about)
    return path, config, about


def schedulers(like: str | Path | None) -> list[Path]:
    return [find(like, ("scheduler",))] if like else []


def read_file(path: Path, heads: int | None, like: str | Path | None) -> tuple[dict, dict[str, Tensor], dict]:
    """-> config, {name: tensor}, notes."""
    with open(path, "rb") as file:
        safe = is_safetensors(file.read(9))
    if safe:
        with open_safetensors(path) as file:
            ours = "config" in (file.metadata() or {})
        if ours:
            return read_safetensors(path)
    about = read_predictions(*schedulers(like))
    weights = safetensors.torch.load_file(path) if safe else read_pth(path)
    return *from_original(weights, heads, like), about


def family_of(config: Any, about: dict[str, Any]) -> str:
    """The class of diffusers that a config is of, where it goes with what is predicted."""
    sd3 = "joint_attention_dim" in config
    name = config.get("_class_name", "SD3Transformer2DModel" if sd3 else "PixArtTransformer2DModel")
    name = (
        "PixArtTransformer2DModel" if name == "Transformer2DModel" else name
    )  # in old versions of diffusers
    if name not in FAMILIES:
        raise UserError(f"a {reprlib.repr(name)}: only {' and '.join(FAMILIES)} are supported")
    if name == "SD3Transformer2DModel" and about.get("predicts") != "velocity":
        raise UserError(f"a {name}, but no scheduler says that it predicts velocities")
    return name


def find(source: str | Path, parts: Iterable[str]) -> Path:
    """A folder, or the name of a pipeline on the hub, of which these parts are fetched -> the folder."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or path.suffix in (".safetensors", ".pth") or not HUB_NAME.fullmatch(str(source)):
        raise UserError(f"{source}: not a folder" if path.exists() else f"{source}: no such file or folder")
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *(f"{part}/*" for part in parts)]
    unwanted = ["*.bin", "*.fp16.*", "*.msgpack", "*.h5"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # it has many, of several libraries
        words = f"no such folder here, and not to be had from the hub ({type(error).__name__})"
        raise UserError(f"{source}: {words}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    names, index = {WEIGHTS}, folder / f"{WEIGHTS}.index.json"
    if index.exists():  # a large one, in several files
        names = {Path(name).name for name in read_json(index)["weight_map"].values()}
    weights = {}
    for name in sorted(names):
        with naming(name), open_safetensors(folder / name) as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights.pop(OLD_NULL, None)
    return weights


def load_vae(folder: str | Path) -> Module:
    """The AutoencoderKL of a pipeline folder, as `load_transformer` returns a transformer."""
    from diffusers import AutoencoderKL

    vae = pretrained(AutoencoderKL, folder, "vae", dtype=torch.float32, use_safetensors=True)
    with naming(Path(folder, "vae")):
        decode(vae, torch.zeros(1, vae.config.latent_channels, 2, 2))  # whatever its config says
        if not vae.config.scaling_factor > 0:
            raise UserError(f"its scaling_factor is {vae.config.scaling_factor}")
    return vae


def empty(family: str, config: dict[str, Any], tensors: int) -> Module:
    """The network without weights, if so many tensors can fill it; only PixArt's table is there."""
    import diffusers
    from accelerate import init_empty_weights

    cls, limits = getattr(diffusers, family), FAMILIES[family]
    words = f"no config of a {family.removesuffix('Transformer2DModel')} transformer"
    known = inspect.signature(cls).parameters  # old versions' configs have more
    config = {name: value for name, value in config.items() if name in known}
    if "num_layers" not in config:
        raise UserError(f"{words}: it names no num_layers")
    sizes = {name: config.get(name, known[name].default) for name in limits}
    for name, value in sizes.items():
        if type(value) is not int or not 0 < value <= limits[name]:
            raise UserError(f"{words}: {name}={reprlib.repr(value)}")
    layers, patches = sizes["num_layers"], sizes["sample_size"] // sizes["patch_size"]
    computes = "pos_embed_max_size" not in sizes  # its positions, which SD3's files hold
    if computes and patches**2 * sizes["num_attention_heads"] * sizes["attention_head_dim"] > MAX_TABLE:
        raise UserError(f"{words}: its table of positions is too large")
    if layers * 21 > tensors:  # of a block; before building them one by one
        raise UserError(f"{tensors} tensors are too few for {layers} layers")
    with init_empty_weights() if computes else torch.device("meta"):
        return cls(**config)


def build(config: dict[str, Any], weights: dict[str, Tensor], about: dict[str, Any]) -> Module:
    """A transformer of FAMILIES with exactly these weights, as float32; both may be hostile."""
    family = family_of(config, about)
    network = empty(family, config, len(weights))
    stored = network.state_dict()
    computed = {POSITIONS: network.pos_embed.pos_embed} if POSITIONS in weights.keys() - stored.keys() else {}
    check_weights(weights, stored | computed, FLOATS)
    for name in computed:
        table = weights.pop(name)
        error = (table.double() - computed[name].double()).abs().max().item()
        if error > max(1e-5, torch.finfo(table.dtype).eps):  # entries are at most 1
            words = "differs from the one that the network computes by up to"
            raise UserError(f"its pos_embed {words} {error:.3g}")
    # copied: they are views of the mapped file, which somebody may yet change
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    network.load_state_dict(copies, assign=True)
    return network.eval().requires_grad_(False)


def sigma_init_of(path: str | Path, about: dict[str, Any], given: float | None = None) -> float:
    """sigma_init from the notes of a student, or where they have none, as it is given.  Raises UserError."""
    noted = given if about.get("sigma_init") is None else about["sigma_init"]
    if type(noted) not in (int, float) or not 0 < noted < math.inf:
        words = "; it may be a one-step generator of others: then give its --sigma-init (SIM-DiT's is 2.5)"
        words = words if noted is None else ""
        raise UserError(f"{path}: not a student: its notes have sigma_init={noted!r}{words}")
    if given not in (None, noted):
        raise UserError(f"--sigma-init {given}: but {path} was distilled at {noted}")
    return noted


def parts_of(transformer: Module) -> tuple[list[str], str]:
    """-> the folders of a pipeline beside the transformer, and which of them has the captions' width."""
    numbers = ("", "_2", "_3") if is_joint(transformer) else ("",)
    texts = [f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in numbers]
    return [*texts, "vae"], texts[-1]


def is_joint(transformer: Module) -> bool:
    """Whether it is of SD3's family, which takes the captions of three text encoders, and pooled ones."""
    return "joint_attention_dim" in transformer.config


def caption_width(transformer: Module) -> int:
    return transformer.config["joint_attention_dim" if is_joint(transformer) else "caption_channels"]


def caption_kind(transformer: Module) -> tuple[bool, int]:
    return is_joint(transformer), caption_width(transformer)


def find_pipeline(source: str | Path, transformer: Module) -> Path:
    """`find`, for a pipeline with all parts, whose captions are as wide as the transformer's."""
    parts, encoder = parts_of(transformer)
    folder = find(source, (*parts, "scheduler"))
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"{source}: has no {part}, so is not a whole pipeline")
    config = folder / encoder / "config.json"
    with naming(config):
        width = read_json(config)["d_model"]
    if width != caption_width(transformer):
        raise UserError(
            f"{source}: its captions are {width} wide, the student's {caption_width(transformer)}"
        )
    return folder
