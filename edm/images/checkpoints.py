"""Weights on disk: our own files, and the released .pkl files of EDM, read without executing them.

    python edm/checkpoints.py convert edm-cifar10-32x32-cond-vp.pkl teacher.safetensors
    python edm/checkpoints.py convert sid-cifar10-cond.pkl generator.safetensors --sigma-init 2.5
    python edm/checkpoints.py show teacher.safetensors

Our files are safetensors with two JSON texts in the metadata: "config", the arguments of EDMPrecond,
and "about", whatever the writer noted.  `load` reads both kinds and tells them apart by content.
A note sigma_init makes a denoiser a one-step generator, g(z) = D(sigma_init z; sigma_init).  No .pkl names
one, neither teachers nor the one-step generators that others released in EDM's format: --sigma-init does.

A .pkl is a program that builds Python objects, and those of EDM carry source code besides.  Here every
name in it is replaced by a record of its arguments (`TABLE`); the weights are then picked out of those
records.  Nothing in the file runs, and its source code is never looked at.
"""

import json
import math
import pickle
import reprlib

import safetensors.torch
import torch

from edm.config import UserError
from edm.files import naming, replacing
from edm.images.edm_pickle import read_pickle
from edm.images.networks import EDMPrecond


def save(path, network, **about):
    """Write an EDMPrecond's weights (as float32) and config, and JSON-able notes about them."""
    weights = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in network.state_dict().items()}
    metadata = {"config": json.dumps(network.config), "about": json.dumps(about)}
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(weights, metadata))


def load(path, sigma_init=None):
    """-> (EDMPrecond on the CPU, eval mode, float32, gradients off; dict of the writer's notes).

    path: a file of `save`, or one of EDM's .pkl files, whose notes are empty.
    sigma_init: noted of a file that notes none, which makes it a one-step generator.
    Raises UserError, naming the file, for anything else: missing, damaged, another network, another
    sigma_init.
    """
    if sigma_init is not None and not 0 < sigma_init < math.inf:
        raise UserError(f"--sigma-init must be positive, got {sigma_init}")
    with naming(path), open(path, "rb") as file:
        head = file.read(9)
    about = {}
    if head[6:] == b"\0\0{":  # eight bytes of length, then JSON
        config, weights, about = read_safetensors(path)
    elif head[:1] == pickle.PROTO:
        config, weights = read_pickle(path)
    elif head[:2] == b"PK":
        raise UserError(f"{path}: a zip file, as torch.save writes; need .safetensors of ours or .pkl of EDM")
    else:
        raise UserError(f"{path}: neither a .safetensors file of ours nor a .pkl file of EDM")
    with naming(path):
        if sigma_init is not None and about.setdefault("sigma_init", sigma_init) != sigma_init:
            raise UserError(f"notes sigma_init {about['sigma_init']}, but --sigma-init says {sigma_init}")
        return build(config, weights), about


def read_safetensors(path):
    """-> (config, {name: tensor}, about)."""
    with naming(path), safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if not {"config", "about"} <= metadata.keys():
            raise UserError("a safetensors file, but not one of ours: no config and about in its metadata")
        # clone: the tensors are views of the mapped file, which somebody may yet change
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        config, about = json.loads(metadata["config"]), json.loads(metadata["about"])
        if not isinstance(config, dict) or not isinstance(about, dict):
            raise UserError("config or about in its metadata is not a dictionary")
        return config, weights, about


def integer(low):
    return lambda value: type(value) is int and low <= value < 2**20


def number(low, high):
    return lambda value: type(value) in (int, float) and low <= value < high


def integers(value):
    return type(value) in (list, tuple) and len(value) < 16 and all(map(integer(1), value))


def word(value):  # SongUNet knows which
    return type(value) is str


OPTIONS = dict(
    img_resolution=integer(1), img_channels=integer(1), label_dim=integer(0), augment_dim=integer(0),
    sigma_data=number(1e-9, 1e9), dropout=number(0, 1), label_dropout=number(0, 1),
    model_channels=integer(1), channel_mult=integers, channel_mult_emb=integer(1),
    channel_mult_noise=integer(1), num_blocks=integer(1), attn_resolutions=integers,
    embedding_type=word, encoder_type=word, decoder_type=word, resample_filter=integers,
)  # fmt: skip


def build(config, weights):
    """EDMPrecond(**config) with exactly these weights.  Allocates nothing that the file does not hold."""
    for name, value in config.items():
        if name not in OPTIONS or not OPTIONS[name](value):
            raise UserError(f"cannot build a network with {name}={reprlib.repr(value)}")
    levels, blocks = len(config.get("channel_mult", (1, 2, 2, 2))), config.get("num_blocks", 4)
    if levels * blocks > len(weights):  # before building them one by one
        raise UserError(f"{len(weights)} tensors are too few for {levels} levels of {blocks} blocks")
    with torch.device("meta"):
        network = EDMPrecond(**config).eval().requires_grad_(False)
    check_weights(weights, network.state_dict())
    network.load_state_dict(weights, assign=True)
    return network


def check_weights(weights, expected):
    """Names, shapes, type and values of {name: tensor}."""
    for name in [*expected, *weights]:
        if (name in expected) != (name in weights):
            raise UserError(f"{'missing' if name in expected else 'unknown'} tensor {name[:100]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
            found, want = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected[name]))
            raise UserError(f"tensor {name} is {found}, the network needs {want}")
        if not tensor.isfinite().all():
            raise UserError(f"tensor {name} has values that are not finite")
