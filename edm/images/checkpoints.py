"""Weights on disk: our own files, and the released .pkl files of EDM, read without executing them.

Our files are safetensors with two JSON texts in the metadata: "config", the arguments of EDMPrecond,
and "about", whatever the writer noted.  `load` reads both kinds and tells them apart by content.
A note sigma_init makes a denoiser a one-step generator, g(z) = D(sigma_init z; sigma_init).
"""

import hashlib
import json
import math
import pickle
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module

from edm.images.edm_pickle import read_pickle
from edm.images.foreign import loads, tell
from edm.images.networks import EDMPrecond
from toy.files import UserError, naming, replacing

MAX_BLOCKS = 128  # of a network: each takes some milliseconds to build, however small


def save(path: str | Path, network: Module, **about) -> None:
    """Write an EDMPrecond, or a model of diffusers: weights (as float32), config, and JSON-able notes."""
    weights = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in network.state_dict().items()}
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        metadata = {"config": json.dumps(config), "about": json.dumps(about)}
        metadata["digest"] = digest(*metadata.values(), weights)
        safetensors.torch.save_file(weights, temporary, metadata)
        temporary.chmod(mode)  # safetensors would leave it to its owner alone


def digest(*parts) -> str:
    """SHA-256 over strings, tensors with their shapes and types, and dictionaries of tensors."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            names = sorted(part)
            total.update(digest(*names, *(part[name] for name in names)).encode())
        else:
            tensor = isinstance(part, torch.Tensor)
            total.update((f"{part.dtype} {list(part.shape)}" if tensor else part).encode() + b"\0")
            total.update(part.numpy().tobytes() if tensor else b"")
    return total.hexdigest()


def load(path: str | Path, sigma_init: float | None = None) -> tuple[EDMPrecond, dict[str, Any]]:
    """-> (EDMPrecond on the CPU, eval mode, float32, gradients off; dict of the writer's notes).

    path: a file of `save`, or one of EDM's .pkl files, whose notes are empty.
    sigma_init: noted of a file that notes none, which makes it a one-step generator.
    Raises UserError, naming the file, for anything else: missing, damaged, another network, another
    sigma_init.
    """
    if sigma_init is not None and not 0 < sigma_init < math.inf:
        raise UserError(f"--sigma-init must be positive, got {sigma_init}")
    with naming(path):
        with open(path, "rb") as file:
            head = file.read(9)
        about = {}
        if is_safetensors(head):
            config, weights, about = read_safetensors(path)
        elif head[:1] == pickle.PROTO:
            config, weights = read_pickle(path)
        elif head[:2] == b"PK":
            raise UserError("a zip file, as torch.save writes; need .safetensors of ours or .pkl of EDM")
        else:
            raise UserError("neither a .safetensors file of ours nor a .pkl file of EDM")
        if sigma_init is not None and about.setdefault("sigma_init", sigma_init) != sigma_init:
            raise UserError(f"notes sigma_init {about['sigma_init']}, but --sigma-init says {sigma_init}")
        return build(config, weights), about


def is_safetensors(head: bytes) -> bool:
    """By the first nine bytes: eight of a length, then JSON.  More than a megabyte of it takes seconds."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 2**20


def open_safetensors(path: str | Path, framework="pt") -> safetensors.safe_open:
    with open(path, "rb") as file:
        if not is_safetensors(file.read(9)):
            raise UserError("not a safetensors file, or one with a header of more than a megabyte")
    return safetensors.safe_open(path, framework)


def read_safetensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """A file of `save` -> (config, {name: tensor}, about)."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if not {"config", "about"} <= metadata.keys():
            raise UserError("a safetensors file, but not one of ours: no config and about in its metadata")
        # clone: the tensors are views of the mapped file, which somebody may yet change
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    found = digest(metadata["config"], metadata["about"], weights)
    if metadata.get("digest", found) != found:
        raise UserError("damaged: its digest is another than that of its contents")
    config, about = loads(metadata["config"]), json.loads(metadata["about"])
    if not isinstance(config, dict) or not isinstance(about, dict):
        raise UserError("config or about in its metadata is not a dictionary")
    for name in NOTES.keys() & about.keys():
        if not NOTES[name](about[name]):
            raise UserError(f"its notes have {name}={reprlib.repr(about[name])}")
    return config, weights, about


def noted_teacher(path: str | Path, about: dict[str, Any]) -> str | None:
    """The teacher in a student's notes, or None: a stranger's words, so shown before anything is opened."""
    if teacher := about.get("teacher"):
        tell(f"{path}: the teacher that it notes is {teacher}", "stdout")
    return teacher


def integer(low: int, high=2**20) -> Callable:
    return lambda value: type(value) is int and low <= value < high


def number(low: float, high: float) -> Callable:
    return lambda value: type(value) in (int, float) and low <= value < high


def integers(value: Any) -> bool:
    return type(value) in (list, tuple) and len(value) < 16 and all(map(integer(1), value))


def word(value: Any) -> bool:
    return type(value) is str and len(value) < 2**12 and not re.search("[\0-\x1f\x7f-\x9f]", value)


NOTES = dict(sigma_init=number(5e-324, 1e308), teacher=word, preset=word, kind=word, shift=number(1e-6, 1e6),
             timesteps=integer(1), predicts=lambda value: value in ("noise", "velocity"))  # fmt: skip
OPTIONS = dict(
    img_resolution=integer(1, 2**10 + 1), img_channels=integer(1), label_dim=integer(0),
    augment_dim=integer(0),
    sigma_data=number(1e-9, 1e9), dropout=number(0, 1), label_dropout=number(0, 1),
    model_channels=integer(1), channel_mult=integers, channel_mult_emb=integer(1),
    channel_mult_noise=integer(1), num_blocks=integer(1), attn_resolutions=integers,
    embedding_type=word, encoder_type=word, decoder_type=word, resample_filter=integers,
)  # fmt: skip


def build(config: dict, weights: dict[str, Tensor]) -> EDMPrecond:
    """EDMPrecond(**config) with exactly these weights.  Allocates nothing that the file does not hold."""
    for name, value in config.items():
        if name not in OPTIONS or not OPTIONS[name](value):
            raise UserError(f"cannot build a network with {name}={reprlib.repr(value)}")
    levels, blocks = len(config.get("channel_mult", (1, 2, 2, 2))), config.get("num_blocks", 4)
    if levels * blocks > len(weights):  # before building them one by one
        raise UserError(f"{len(weights)} tensors are too few for {levels} levels of {blocks} blocks")
    if levels * blocks > MAX_BLOCKS:
        raise UserError(f"{levels} levels of {blocks} blocks, more than {MAX_BLOCKS} in all")
    with torch.device("meta"):
        network = EDMPrecond(**config).eval().requires_grad_(False)
    check_weights(weights, network.state_dict())
    network.load_state_dict(weights, assign=True)
    return network


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], dtypes=(torch.float32,)) -> None:
    """Names, shapes, types and values of {name: tensor} must be those of a network's.  Raises UserError."""
    missing, unknown = ([k for k in a if k not in b] for a, b in ((expected, weights), (weights, expected)))
    words = {"missing": missing, "unknown": unknown}
    if missing or unknown:
        raise UserError("; ".join(f"{word} {some(names)}" for word, names in words.items() if names))
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape or tensor.dtype not in dtypes:
            found, want = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected[name]))
            raise UserError(f"tensor {name} is {found}, the network needs {want}")
        if not tensor.isfinite().all():
            raise UserError(f"tensor {name} has values that are not finite")


def some(names: list[str]) -> str:
    """Words for a list of tensors: how many, and the first few."""
    listed = ", ".join(name[:100] for name in names[:3])
    return f"tensor{'s'[: len(names) > 1]} {listed}" + (f" and {len(names) - 3} more" if names[3:] else "")
