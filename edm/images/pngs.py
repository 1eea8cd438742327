"""PNGs and their labels, by name: of a folder or a zip.  Foreign files, as in data.py."""

import json
import math
import os
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edm.images.foreign import expanding
from toy.files import UserError, naming

MAX_FILE, MAX_CLASSES = 2**28, 2**16  # bytes of a PNG; labels: far above any data set meant here
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"


def load_pngs(
    source: Path, files: dict[str, int], stored: int, read: Callable, resolution: int | None
) -> tuple[Tensor, Tensor | None]:
    """files: {name: bytes}, all of them.  stored: bytes that they take on the disk.  read(name) -> bytes.

    An image of another kind is an error, not skipped.  What is too large is refused before it is decoded.
    """
    budget, known, images, labels = expanding(stored), Image.registered_extensions(), None, None
    names = sorted(name for name in files if os.path.splitext(name)[1].lower() in known)
    if not names:
        raise UserError(f"{source}: there are no images in it")

    def content(name, most=MAX_FILE):
        if files[name] > most:
            raise UserError(f"larger than {most:,} bytes")
        budget.spend(files[name])
        return read(name)

    for i, name in enumerate(names):
        with naming(f"{source}/{name}"):
            png = content(name)
            shape = png_shape(png)
            if images is None:
                if resolution not in (None, shape[1]):
                    raise UserError(f"it is of resolution {shape[1]}, not {resolution}")
                budget.spend(len(names) * math.prod(shape))
                images = np.empty((len(names), *shape), np.uint8)
            if shape != images.shape[1:]:
                first = f"those of {names[0]} {images.shape[1:]}"
                raise UserError(f"its channels, height and width are {shape}, {first}")
            images[i] = read_png(png, shape)
    if (file := labels_file(files, names)) is not None:
        with naming(f"{source}/{file}"):
            text, above = content(file, 2**20 + 1024 * len(names)), len(file) - len("dataset.json")
            labels = read_labels(text, [name[above:] for name in names])
    return torch.from_numpy(images), labels


# dataset.json: {"labels": [[name, label], ...] or null}, label a class index or one-hot.


def labels_file(files: dict[str, int], names: list[str]) -> str | None:
    """The topmost dataset.json in a folder that holds all images, such as a zip's only one; or None."""
    for file in sorted(files, key=len):
        folder, _, last = file.rpartition("/")
        if last == "dataset.json" and all(name.startswith(f"{folder}/" * bool(folder)) for name in names):
            return file


def png_shape(content: bytes) -> tuple[int, int, int]:
    """The bytes of a square 8-bit grey or RGB PNG -> (C, H, W), C = 1 or 3, as its head announces."""
    if not content.startswith(PNG_START) or len(content) < 26:
        raise UserError("not a PNG")
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    if depth != 8 or colour not in (0, 2):  # pillow would convert, or give a palette's indices
        found = f"its bit depth is {depth}, its colour type {colour}"
        raise UserError(f"{found}: neither 8-bit grey nor 8-bit RGB")
    if width != height:
        raise UserError(f"it is {height}x{width}, not square")
    return (1 if colour == 0 else 3), height, width


def read_png(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """-> (C, H, W) uint8 array."""
    try:
        Image.open(BytesIO(content), formats=["PNG"]).verify()  # the checksums, which decoding ignores
        pixels = np.asarray(Image.open(BytesIO(content), formats=["PNG"]))
    except Exception as error:  # pillow's own words name a buffer's address, not the file
        raise UserError(f"a damaged PNG ({type(error).__name__})") from None
    return pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)


def read_labels(content: bytes, names: list[str]) -> Tensor | None:
    """The text of dataset.json -> labels (N,) int64 in the order of names, or None."""
    entries = json.loads(content)["labels"]
    if entries is None:
        return None
    if len(entries) != len(names):
        raise UserError(f"{len(entries)} labels for {len(names)} images")
    labels = dict(entries)
    return torch.tensor([class_index(name, labels.get(name)) for name in names])


def class_index(name: str, label: Any) -> int:
    if isinstance(label, list) and sorted(label) == [0] * (len(label) - 1) + [1]:
        label = label.index(1)
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise UserError(f"the label of {name}, {str(label)[:60]}, is neither a class index nor one-hot")
    return label
