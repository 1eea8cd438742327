"""Image data sets, read whole into memory, and the way from pixels to network inputs and back.

Every reader returns images (N, C, H, W) uint8 and labels (N,) int64 or None.  Files are foreign:
nothing in them is executed, no count in a header is believed, and whatever is wrong with one becomes
a UserError that names it.
"""

import gzip
import math
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edm.config import LEAST_IMAGES
from edm.images.foreign import expanding, tell
from edm.images.pngs import load_pngs
from edm.images.safe_pickle import InertUnpickler, Record
from toy.files import UserError, naming

MAX_IMAGES = 2**20  # in an IDX file: far above any data set meant here, far below what a bomb announces
HIDDEN = re.compile(r"(^|/)(__MACOSX/|@eaDir/|\.[^/])")  # what Macs and Synology's disks leave everywhere


@dataclass(frozen=True)
class Images:
    """images (N, C, H, W) uint8; labels (N,) int64, or None; name: where they came from."""

    images: torch.Tensor
    labels: torch.Tensor | None
    name: str

    def __len__(self):
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Largest label + 1; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1


def load_images(source: str | Path, train=True, resolution: int | None = None) -> Images:
    """Read a data set, whose kind is told by its content.

    source: "digits" (scikit-learn's, 1797 of 1x8x8), or the path of
        a folder with MNIST's or Fashion-MNIST's IDX files, gzipped or not (1x28x28),
        a folder with CIFAR-10's batches, original binary or Python version (3x32x32),
        a zip or a folder of PNGs, nested or not, in the order of their names, with or without EDM's
        dataset.json for labels: all 8-bit grey or all 8-bit RGB, of one size, square.
    Hidden files are skipped, and counted in a line on stderr.
    train: the training or the test images; "digits" and PNGs have no such parts: always all of them.
    resolution: the height and width that the images must have; None: any.
    Raises UserError naming the file and the reason for anything missing, damaged or unfit.
    """
    path = Path(source)
    if source == "digits":
        images, labels = load_digits()
    elif path.is_dir():
        images, labels = load_folder(path, train, resolution)
    else:
        images, labels = load_zip(path, resolution)
    if resolution is not None and images.shape[-1] != resolution:
        raise UserError(f"{source}: its images are of resolution {images.shape[-1]}, not {resolution}")
    return Images(images, labels, str(source))


def load_fitting(source: str | Path, shape: Sequence[int], label_dim=0, judge=False, labelled=True) -> Images:
    """`load_images`, refused at once where it does not fit what will be done with it.

    shape: (C, H, W) of the network.  label_dim: classes that it learns from the data; 0: none.
    judge: samples will be compared with the data, which takes a few images and, unless not labelled, the
    labels for a classifier.  Raises UserError.
    """
    data = load_images(source, resolution=shape[-1])
    if len(data.images[0]) != shape[0]:
        raise UserError(f"{source}: its images have {len(data.images[0])} channels, not {shape[0]}")
    if label_dim and not 0 < data.num_classes <= label_dim:
        raise UserError(f"{source}: {data.num_classes} classes, but the network takes {label_dim}")
    if judge and len(data) < LEAST_IMAGES:
        raise UserError(f"{source}: {len(data)} images, but an evaluation needs at least {LEAST_IMAGES}")
    if judge and labelled and data.labels is None:
        raise UserError(f"{source}: has no labels, which the classifier of an evaluation needs")
    return data


def load_digits() -> tuple[Tensor, Tensor]:
    from sklearn import datasets  # here, because importing it takes a second

    digits = datasets.load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))  # were 0 to 16
    return images[:, None], torch.from_numpy(digits.target.astype(np.int64))


def visible(source: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Of {name: bytes} the files that are not hidden."""
    shown = {name: size for name, size in sizes.items() if not HIDDEN.search(name)}
    if hidden := len(sizes) - len(shown):
        tell(f"{source}: {hidden} hidden file{'s'[: hidden > 1]} skipped")
    return shown


def load_folder(folder: Path, train: bool, resolution: int | None) -> tuple[Tensor, Tensor | None]:
    with naming(folder):
        found = [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in found if p.is_file()}
    if odd := len(found) - len(sizes):
        tell(f"{folder}: {odd} skipped, links to folders or to nothing, or the like")
    files = visible(folder, sizes)
    if any(file.startswith(("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")) for file in files):
        return load_mnist(folder, "train" if train else "t10k")
    batches = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
    for suffix, read in (".bin", read_binary_batch), ("", read_python_batch):
        if any(batch + suffix in files for part in batches for batch in part):
            return load_cifar10([folder / (batch + suffix) for batch in batches[not train]], read)
    read = lambda name: (folder / name).read_bytes()
    return load_pngs(folder, files, sum(files.values()), read, resolution)


def below_ten(labels: Tensor) -> Tensor:  # MNIST and CIFAR-10 both have ten classes
    if labels.max() > 9:
        raise UserError(f"label {int(labels.max())} is not one of the ten classes")
    return labels.long()


# MNIST's format, IDX: two zero bytes, 8 for "unsigned bytes", the number of dimensions, the
# dimensions as big-endian 32-bit numbers, the bytes.


def load_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(folder / f"{part}-images-idx3-ubyte", 28, 28)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte")
    with naming(folder / f"{part}-labels-idx1-ubyte"):
        if len(labels) != len(images):
            raise UserError(f"{len(labels)} labels for {len(images)} images")
        return images[:, None], below_ten(labels)


def read_idx(file: Path, *size) -> Tensor:
    """An IDX file of N items of this size, or the same with .gz -> (N, *size) uint8."""
    file = file if file.exists() else file.with_name(file.name + ".gz")
    with naming(file), (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
        head = stream.read(8 + 4 * len(size)).ljust(8 + 4 * len(size), b"\0")
        magic, count, *found = struct.unpack(f">{2 + len(size)}I", head)
        if magic != 0x801 + len(size):
            raise UserError(f"it begins with {magic:08x}, not with {0x801 + len(size):08x}")
        if found != [*size] or not 0 < count <= MAX_IMAGES:
            raise UserError(f"it announces {count} items of size {found}, not 1 to {MAX_IMAGES} of {[*size]}")
        total = count * math.prod(size)
        expanding(file.stat().st_size).spend(total)
        body = stream.read(total + 1)  # to the end: only there does gzip check its checksum
        if len(body) != total:
            holds = "more" if len(body) > total else len(body)
            raise UserError(f"it announces {total} bytes but holds {holds}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(count, *size)


# CIFAR-10's batches: 3072 bytes an image, [C, H, W]; labels 0 to 9.


def load_cifar10(files: list[Path], read: Callable) -> tuple[Tensor, Tensor]:
    parts = []
    for file in files:
        with naming(file):
            images, labels = read(file.read_bytes())
            parts.append((images.reshape(-1, 3, 32, 32), below_ten(labels)))
    images, labels = zip(*parts)
    return torch.cat(images), torch.cat(labels)


def read_binary_batch(content: bytes) -> tuple[Tensor, Tensor]:
    """Records of a label and an image -> images (N, 3072), labels (N,), uint8."""
    if not content or len(content) % 3073:
        raise UserError(f"its {len(content)} bytes are not whole records of 3073")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


# A class, not a function, for _reconstruct too: a pickle can set a function's attributes.
NUMPY = {("numpy.core.multiarray", "_reconstruct"): Record, ("numpy", "ndarray"): Record,
         ("numpy", "dtype"): Record}  # fmt: skip


def read_python_batch(content: bytes) -> tuple[Tensor, Tensor]:
    """A pickle of Python 2, a dictionary with data and labels -> images (N, 3072), labels (N,), uint8."""
    batch = InertUnpickler(BytesIO(content), NUMPY, encoding="bytes").load()
    labels = bytearray(list(batch[b"labels"]))  # fails for all but numbers from 0 to 255
    _, shape, dtype, fortran_order, data = batch[b"data"].state
    if dtype.args[:1] != (b"u1",) or fortran_order or shape != (len(labels), 3072) or not labels:
        raise UserError(f"its data are not an array of bytes ({len(labels)}, 3072), as many as its labels")
    if len(data) != 3072 * len(labels):
        raise UserError(f"its array does not hold {3072 * len(labels)} bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.frombuffer(labels, dtype=torch.uint8)


def load_zip(path: Path, resolution: int | None) -> tuple[Tensor, Tensor | None]:
    with naming(path):
        archive = zipfile.ZipFile(path)
    with archive:  # if a size is a lie, zipfile refuses it
        # Windows' own zips have backslashes
        members = {member.filename.replace("\\", "/"): member for member in archive.infolist()}
        sizes = {name: member.file_size for name, member in members.items() if not name.endswith("/")}
        read = lambda name: archive.read(members[name])
        return load_pngs(path, visible(path, sizes), path.stat().st_size, read, resolution)


# Pixels, labels and what the networks take.


def to_network(images: Tensor) -> Tensor:
    """uint8 images, any shape -> float32 in [-1, 1]: u / 127.5 - 1."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images of {images.dtype}, not uint8")
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float images, any shape -> uint8: x * 127.5 + 128, clipped to [0, 255], truncated, not rounded.

    Takes back to_network exactly.  Raises ValueError for NaN, which has no pixel value.
    """
    if torch.isnan(x).any():
        raise ValueError("the images contain NaN")
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def one_hot(labels: Tensor, label_dim: int) -> Tensor:
    """labels (N,) int64 -> (N, label_dim) float32.  Raises UserError naming a label out of range."""
    outside = labels[(labels < 0) | (labels >= label_dim)]
    if len(outside):
        raise UserError(f"label {int(outside[0])} is not one of the {label_dim} classes, which begin with 0")
    return F.one_hot(labels, label_dim).to(torch.float32)
