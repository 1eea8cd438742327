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

import io
import json
import math
import os
import pickle
import re
import reprlib
import struct
import sys
from argparse import RawDescriptionHelpFormatter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import numpy as np
import safetensors.torch
import torch

from edm.config import SIGMA_INIT, Parser, UserError
from edm.networks import EDMPrecond
from edm.safe_pickle import load_inert


@contextmanager
def replacing(path):
    """Yield a neighbour to write to, then rename it: neither a reader nor a crash meets half a file."""
    path = Path(path)
    temporary = path.with_name("tmp-" + path.name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the contents
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path):
    """Turn every error into a UserError of one line that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes can raise nearly anything
        line = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: damaged, or of another kind ({type(error).__name__}: {line})") from None


# ----------------------------------------------------------------------------------------------
# Our own format.


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


# ----------------------------------------------------------------------------------------------
# From a config that may be damaged or hostile to a network.


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


# ----------------------------------------------------------------------------------------------
# EDM's .pkl: records instead of objects, then weights out of records.


class Record:
    """A call in the pickle, or an object: its arguments, and the state that it was given."""

    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):  # else pickle writes the state's entries over our attributes
        self.state = state


TABLE = {
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    # args: a dict with class_name, state and, never looked at, module_src
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Record,
    ("torch.nn.modules.container", "ModuleDict"): Record,  # state: its attributes
    ("torch._utils", "_rebuild_parameter"): Record,  # args: tensor, requires_grad, hooks
    ("torch._utils", "_rebuild_tensor_v2"): Record,  # args: storage, offset, size, stride, and more
    ("torch.storage", "_load_from_bytes"): Record,  # args: bytes
    ("numpy", "dtype"): Record,  # args: "f8", False, True; state: 3, byte order, and more
    ("numpy.core.multiarray", "scalar"): Record,  # args: dtype, bytes
    ("numpy._core.multiarray", "scalar"): Record,
}


def read_pickle(path):
    """EDM's .pkl -> (config, {name: tensor} in the order of a state dict), of its entry "ema".

    Raises UserError, naming the file, unless that is an EDMPrecond around a SongUNet.
    """
    with naming(path):
        content = load_inert(io.BytesIO(Path(path).read_bytes()), TABLE)
        ema = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(ema, Record):
            raise UserError("a pickle, but not one of EDM: no network under 'ema'")
        state = attributes(ema)
        kinds = [module.args[0]["class_name"] for module in (ema, *state["_modules"].values())]
        if kinds != ["EDMPrecond", "SongUNet"]:
            raise UserError(f"it holds {reprlib.repr(kinds)}; only EDMPrecond around SongUNet is supported")
        if state["_init_args"]:
            raise UserError("its network was made with positional arguments")
        dropped = ("model_type", "use_fp16", "sigma_min", "sigma_max")  # known, or without effect here
        config = {k: plain(v) for k, v in state["_init_kwargs"].items() if k not in dropped}
        stored = dict(named_tensors(ema, "", set()))
        weights = {name: single(name, tensor) for name, tensor in stored.items()}
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}
    if kinds - {"float32"}:
        tell(f"{path}: its weights are {' and '.join(sorted(kinds))}; read as float32")
    return config, weights


@cache
def tell(line):
    """To stderr, once: a command may load a file more than once."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def single(name, tensor):
    """Rounded to float32, which must hold it."""
    rounded = tensor.float()
    if (rounded.isinf() & tensor.isfinite()).any():
        raise UserError(f"tensor {name} has values beyond float32's range")
    return rounded


def attributes(module):
    """The attribute dict of a pickled module, of one of EDM's classes or torch's."""
    return module.args[0]["state"] if module.args else module.state


def plain(value):
    """A keyword argument, with numpy's float64 scalars made floats."""
    if not isinstance(value, Record):
        return value
    dtype, data = value.args
    if dtype.args[0] != "f8" or dtype.state[1] != "<":
        raise UserError("it has a numpy number that is not a float64")
    return struct.unpack("<d", data)[0]  # exactly 8 bytes


def named_tensors(module, prefix, seen):
    """(name, tensor) for all in a pickled module: parameters, buffers, then children."""
    once(module, seen)
    state = attributes(module)
    tensors = {name: p and p.args[0] for name, p in state["_parameters"].items()} | state["_buffers"]
    for name, tensor in tensors.items():
        if tensor is not None:
            yield prefix + name, read_tensor(tensor, seen)
    for name, child in state["_modules"].items():
        if child is not None:
            yield from named_tensors(child, f"{prefix}{name}.", seen)


def once(record, seen):
    """Refuse what occurs twice: no part of these networks does, and a loop would not end."""
    if id(record) in seen:
        raise UserError("a module or storage occurs twice")
    seen.add(id(record))


def read_tensor(record, seen):
    """A pickled tensor, which must be the whole of its storage, in C order."""
    storage, offset, shape, stride, *_ = record.args
    once(storage, seen)
    values = read_storage(*storage.args)
    if offset != 0 or torch.Size(shape).numel() != len(values):
        raise UserError(f"a tensor does not fill its storage of {len(values)} elements")
    values = values.view(shape)
    if stride != values.stride():
        raise UserError("a tensor is not in C order")
    return values


# A storage's bytes are a file of torch.save before it used zip: five pickles, the number of elements
# (8 bytes), the elements.  They are compared, opcode by opcode, with the only form that a storage of
# floats has, rather than unpickled.  The first three pickles are constant.
CONSTANT = b"".join(
    pickle.dumps(value, protocol=2)
    for value in (
        0x1950A86A20F9469CFC6C,
        1001,
        dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4)),
    )
)
STORAGE = re.compile(
    re.escape(CONSTANT)
    # The fourth refers to ("storage", FloatStorage, key, "cpu", count, None), the fifth is [key].
    + rb"\x80\x02\(X\x07\0\0\0storageq\0ctorch\n(?P<kind>Half|Float|Double)Storage\nq\x01"
    rb"X(?P<key>[\x01-\x14]\0\0\0\d+)q\x02"
    rb"X\x03\0\0\0cpuq\x03(?:K(?P<n1>.)|M(?P<n2>..)|J(?P<n4>....))Ntq\x04Q\."
    rb"\x80\x02\]q\0X(?P=key)q\x01a\.(?P<count>.{8})",
    re.DOTALL,
)
KINDS = {b"Half": np.dtype("<f2"), b"Float": np.dtype("<f4"), b"Double": np.dtype("<f8")}


def read_storage(data):
    """The bytes of one HalfStorage, FloatStorage or DoubleStorage -> tensor (n,) of that type."""
    form = STORAGE.match(data)
    if not form:
        raise UserError("a tensor's storage is not in the one form that is accepted")
    count = int.from_bytes(form["count"], "little")
    declared = int.from_bytes(form["n1"] or form["n2"] or form["n4"], "little")
    kind = KINDS[form["kind"]]
    if not count == declared == (len(data) - form.end()) / kind.itemsize:
        size = f"{declared} elements of {kind.itemsize} bytes"
        raise UserError(f"a storage said to have {count} and {size} is damaged")
    values = np.frombuffer(data, kind, offset=form.end())
    return torch.from_numpy(values.astype(kind.newbyteorder("=")))  # a copy, which may be written to


# ----------------------------------------------------------------------------------------------
# Command line.


def describe(network):
    entries = network.state_dict()
    parameters = sum(p.numel() for p in network.parameters())
    return (
        f"{parameters:,} parameters, {len(entries)} entries, "
        f"resolution {network.img_resolution}, label_dim {network.label_dim}"
    )


def convert(args):
    if args.output.exists():
        raise UserError(f"{args.output}: exists already; choose another name or remove it")
    network, about = load(args.file, args.sigma_init)
    save(args.output, network, **about | {"converted_from": args.file.name})
    print(f"wrote {args.output}: {describe(network)}")


def show(args):
    network, about = load(args.file)
    print(f"config  {json.dumps(network.config)}\nabout   {json.dumps(about)}\n{describe(network)}")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{convert,show}")
    for function, help in (
        (convert, "write a file's network as .safetensors"),
        (show, "print what is in a file: config, notes, number of parameters"),
    ):
        command = commands.add_parser(function.__name__, help=help, description=help)
        command.set_defaults(run=function)
        command.add_argument("file", type=Path, help="a .pkl of EDM, or a .safetensors of ours")
    command = commands.choices["convert"]
    command.add_argument("output", type=Path, help="file to write; must not exist yet")
    command.add_argument("--sigma-init", type=float, metavar="SIGMA", help=f"to be noted: {SIGMA_INIT}")
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (UserError, OSError) as error:  # OSError: the disk is full, or gone
        parser.error(str(error))


if __name__ == "__main__":
    main()
