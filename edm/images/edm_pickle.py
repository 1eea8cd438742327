"""EDM's .pkl files, read without executing them.

Every name in one is replaced by a record of its arguments (`TABLE`); weights are picked out of the records.
"""

import io
import pickle
import re
import reprlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm.images.foreign import tell
from edm.images.safe_pickle import InertUnpickler, Record
from toy.files import UserError

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


def read_pickle(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """EDM's .pkl -> (config, {name: tensor} in the order of a state dict), of its entry "ema".

    Raises UserError, without the file's name, unless that is an EDMPrecond around a SongUNet.
    """
    content = InertUnpickler(io.BytesIO(Path(path).read_bytes()), TABLE).load()
    ema = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, Record):
        raise UserError("a pickle, but not one of EDM: no network under 'ema'")
    state = attributes(ema)
    kinds = [module.args[0]["class_name"] for module in (ema, *state["_modules"].values())]
    if kinds != ["EDMPrecond", "SongUNet"]:
        adm = "; DhariwalUNet is ADM, the network of ImageNet-64" if "DhariwalUNet" in kinds else ""
        raise UserError(f"it holds {reprlib.repr(kinds)}; only EDMPrecond around SongUNet is supported{adm}")
    if state["_init_args"]:
        raise UserError("its network was made with positional arguments")
    dropped = ("model_type", "use_fp16", "sigma_min", "sigma_max")  # known, or without effect here
    config = {k: plain(v) for k, v in state["_init_kwargs"].items() if k not in dropped}
    stored = dict(named_tensors(ema, "", set()))
    weights = {name: tensor.float() for name, tensor in stored.items()}
    for name, tensor in weights.items():
        if (tensor.isinf() & stored[name].isfinite()).any():
            raise UserError(f"tensor {name} has values beyond float32's range")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}
    if kinds - {"float32"}:
        tell(f"{path}: its weights are {' and '.join(sorted(kinds))}; read as float32")
    return config, weights


def attributes(module: Any) -> Any:
    """The attribute dict of a pickled module, of one of EDM's classes or torch's."""
    return module.args[0]["state"] if module.args else module.state


def plain(value: Any) -> Any:
    """A keyword argument, with numpy's float64 scalars made floats."""
    if not isinstance(value, Record):
        return tuple(value) if isinstance(value, tuple) else value
    dtype, data = value.args
    if dtype.args[0] != "f8" or dtype.state[1] != "<":
        raise UserError("it has a numpy number that is not a float64")
    return struct.unpack("<d", data)[0]  # exactly 8 bytes


def named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for all in a pickled module: parameters, buffers, then children."""
    state = attributes(module)
    for part in (module, state["_parameters"], state["_buffers"], state["_modules"]):
        once(part, seen)
    tensors = {name: p and p.args[0] for name, p in state["_parameters"].items()} | state["_buffers"]
    for name, tensor in tensors.items():
        if tensor is not None:
            yield prefix + name, read_tensor(tensor, seen)
    for name, child in state["_modules"].items():
        if child is not None:
            yield from named_tensors(child, f"{prefix}{name}.", seen)


def once(part: Any, seen: set[int]) -> None:
    """Refuse what occurs twice: no part of these networks does, and a loop would not end."""
    if id(part) in seen:
        raise UserError("a module or storage occurs twice")
    seen.add(id(part))


def read_tensor(record: Any, seen: set[int]) -> Tensor:
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


def read_storage(data: bytes) -> Tensor:
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
