"""Files of torch.save (.pth, .pt), read without executing anything in them.

Training scripts write more than weights: their arguments, numpy's numbers, an optimiser, a date.  Here every
name in the file's pickle is replaced by a stand-in that takes whatever it is given and keeps nothing
(`Forgotten`), but for those that tensors and dictionaries are made of.  Objects may so be of any class,
which is never looked up.  A call is another matter: unless it is one of `CALLS`, the file is refused.
"""

import io
import mmap
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm.images.foreign import Budget
from edm.images.safe_pickle import InertUnpickler, Record
from toy.files import UserError

# Where scripts keep weights, the moving average first.  A dictionary without any of these is the weights.
NESTS = "ema state_dict_ema ema_state_dict model_ema params_ema".split()
NESTS += "state_dict model_state_dict model module params generator net network".split()

# What takes the place of what follows.  None may be harmed by a __setstate__ of the file's choice.


class Call(type):
    """Of the stand-ins: whether they may be called."""

    def __call__(cls, *args, **kwargs) -> "Forgotten":
        if not cls.allowed:
            raise UserError(f"not opened: it calls {cls.__name__}, which might be code")
        return cls.__new__(cls)


class Forgotten(metaclass=Call):
    """Any class or function of a file, and its objects."""

    allowed = False

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def forget(self, *args) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = forget


class Dictionary(dict):
    __setstate__ = Forgotten.forget


class DefaultDictionary(Dictionary):
    def __init__(self, factory: Any = None):
        pass


class Storage(Record):
    """Numbers in the file: (their dtype, the key under which they are found)."""


class Tensor(Record):
    """Of a storage that part, in units of its elements: (storage, offset, shape, stride, ...)."""


class Parameter(Record):
    def __new__(cls, tensor, *more):
        return tensor


CALLS = {  # what may be called, to no effect
    "_codecs": "encode",
    "builtins": "bytearray bytes complex frozenset list object range set slice tuple xrange",
    "collections": "Counter deque",
    "copyreg": "_reconstructor __newobj__ __newobj_ex__",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "functools": "partial",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "torch": "Generator Size device",
    "torch.serialization": "_get_layout",
    "torch.storage": "_load_from_bytes",
    "torch._utils": "_rebuild_device_tensor_from_numpy _rebuild_meta_tensor_no_storage _rebuild_qtensor "
                    "_rebuild_sparse_tensor _rebuild_tensor_v3",
}  # fmt: skip
ALSO = {"builtins": "__builtin__", "copyreg": "copy_reg", "pathlib": "pathlib._local"}  # in other versions
ALSO |= {f"numpy.core.{name}": f"numpy._core.{name}" for name in ("multiarray", "numeric")}
DTYPES = dict(Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Double=torch.float64,
              Long=torch.int64, Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8,
              Bool=torch.bool)  # fmt: skip


def stand_in(module: str, name: str, allowed=False) -> Call:
    return Call(f"{module}.{name}"[:100], (Forgotten,), {"allowed": allowed})


TABLE = {
    (place, name): stand_in(module, name, allowed=True)
    for module, names in CALLS.items()
    for place in (module, ALSO.get(module))
    for name in names.split()
}
TABLE |= {("torch", f"{name}Storage"): dtype for name, dtype in DTYPES.items()}
TABLE |= {
    ("collections", "OrderedDict"): Dictionary,
    ("collections", "defaultdict"): DefaultDictionary,
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch._utils", "_rebuild_parameter"): Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): Parameter,
}


class Reader(InertUnpickler):
    """The table, a stand-in for every other name, and storages."""

    def __init__(self, file: io.BytesIO | mmap.mmap, storages: dict[Any, Storage]):
        super().__init__(file, TABLE, encoding="latin1")  # Python 2's strings can hold anything
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        return self.table.get((module, name)) or stand_in(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise UserError("it has persistent ids that are no storages")
        return self.storages.setdefault(key, Storage(dtype, key))


# The two forms of the file -> its content, {key of a storage: where its bytes are}.


def read_zip(path: str | Path, data: np.ndarray) -> tuple[Any, dict[str, slice]]:
    """A pickle, and a file for each storage, in a zip file."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in files if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UserError("a zip file, but not of torch.save")
    folder, places = pickles[0].removesuffix("data.pkl"), {}
    for name, info in files.items():
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{name[:100]} in it is compressed")
        head = info.header_offset + 30
        start = head + sum(struct.unpack("<HH", data[head - 4 : head]))  # after the name, and padding
        places[name.removeprefix(folder)] = slice(start, start + info.file_size)
    if "byteorder" in places and data[places["byteorder"]].tobytes() != b"little":
        raise UserError("written on a machine of another byte order")
    content = Reader(io.BytesIO(data[places["data.pkl"]].tobytes()), {}).load()
    return content, {name.removeprefix("data/"): place for name, place in places.items()}


def read_old(path: str | Path, data: np.ndarray) -> tuple[Any, dict[Any, slice]]:
    """Before torch 1.6: pickles of a magic number, a version, the machine; of the content and of the keys of
    the storages, which follow, each with its number of elements before it."""
    places, storages = {}, {}
    with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as file:
        magic, _, _, content, keys = (Reader(file, storages).load() for _ in range(5))
        if magic != 0x1950A86A20F9469CFC6C:
            raise UserError("not a file of torch.save")
        for key in keys:
            count, start = int.from_bytes(file.read(8), "little"), file.tell()
            places[key] = slice(start, start + count * storages[key].args[0].itemsize)
            file.seek(places[key].stop)
    return content, places


def read_pth(path: str | Path) -> dict[str, torch.Tensor]:
    """A file of torch.save -> {name: tensor}, views of the file; of several networks the moving average.

    What else is in it is ignored, and counted in one line on stderr.  Raises UserError, without the file's
    name, or whatever a damaged file raises.
    """
    data = np.memmap(path, np.uint8, "c")  # what is written to it stays out of the file
    content, places = (read_zip if zipfile.is_zipfile(path) else read_old)(path, data)
    weights, ignored = find_weights(content, set())
    if not weights:
        raise UserError("holds no tensors by name")
    if ignored:
        named = ", ".join(str(name)[:40] for name in ignored[:5]) + ", ..." * (len(ignored) > 5)
        entries = "entry" if len(ignored) == 1 else "entries"
        words = f"{len(weights)} tensors taken, {len(ignored)} other {entries} ignored ({named})"
        print(f"{path}: {words}", file=sys.stderr)
    found, budget = {}, Budget(2 * len(data), "its tensors are larger than the file")
    for name, tensor in weights.items():
        storage, offset, shape, stride, *_ = tensor.args
        dtype, key = storage.args
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"tensor {name[:100]} is of a kind that is not read")
        values = torch.from_numpy(data[places[key]]).view(dtype)
        found[name] = values.as_strided(shape, stride, offset)
        budget.spend(found[name].nbytes)
    return found


def find_weights(content: Any, seen: set[int]) -> tuple[dict[str, Tensor], list]:
    """A dictionary, with others in it -> ({name: Tensor}, names of all that is not among them).

    seen: ids of the dictionaries that were looked at: one that is found again and again is of no use.
    """
    if not isinstance(content, dict) or id(content) in seen:
        return {}, []
    seen.add(id(content))
    for key in NESTS:
        weights, ignored = find_weights(content.get(key), seen)
        if weights:
            return weights, [name for name in content if name != key] + ignored
    weights = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return weights, [name for name in content if name not in weights]
