"""Data sets written in each of their kinds, and what load_images must make of them."""

import gzip
import io
import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from edm.images.data import load_images
from toy.files import UserError

CIFAR = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fails(path, *words, **how):
    """load_images must raise one line that holds these words, the file's name among them."""
    with pytest.raises(UserError) as caught:
        load_images(path, **how)
    line = str(caught.value)
    assert line.isprintable() and all(word in line for word in words), line
    assert str(path) in line


def same(path, images, labels, **how):
    found = load_images(path, **how)
    assert found.images.dtype == torch.uint8 and np.array_equal(found.images, images)
    if labels is None:
        assert found.labels is None and found.num_classes == 0
    else:
        assert found.labels.dtype == torch.int64 and found.labels.tolist() == list(labels)
        assert found.num_classes == max(labels) + 1
    assert len(found) == len(images) and found.name == str(path)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, images, labels, part="train", zipped=False):
    for name, array in ("images-idx3", images), ("labels-idx1", np.array(labels, np.uint8)):
        content = gzip.compress(idx(array)) if zipped else idx(array)
        (folder / f"{part}-{name}-ubyte{'.gz' * zipped}").write_bytes(content)


def binary_batch(images, labels):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels))


def number(value):
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def string(text):
    return b"U" + bytes([len(text)]) + text


DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def python_batch(images, labels, dtype=DTYPE, order=b"\x89", rows=None, width=3072, body=None):
    """The opcodes that Python 2's cPickle and its numpy wrote, protocol 2; the rest is for damage."""
    body = images.tobytes() if body is None else body
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += number(len(labels) if rows is None else rows) + number(width) + b"\x86" + dtype + order
    array += b"T" + struct.pack("<I", len(body)) + body + b"tb"
    items = [string(b"batch_label"), string(b"training batch 1 of 5")]
    items += [string(b"labels"), b"](" + b"".join(map(number, labels)) + b"e", string(b"data"), array]
    items += [string(b"filenames"), b"](" + string(b"a_s_000001.png") + b"e"]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def write_cifar10(folder, batch, suffix=""):
    """Batch i has i + 1 images and labels i, i + 1, ...  Returns the images and labels of each."""
    parts = []
    for i, name in enumerate(CIFAR):
        images, labels = pixels(i + 1, 3, 32, 32, seed=i), [(i + j) % 10 for j in range(i + 1)]
        (folder / (name + suffix)).write_bytes(batch(images, labels))
        parts.append((images, labels))
    return parts


def png(image, **how):
    """(H, W) or (H, W, 3) uint8, or anything that pillow takes -> bytes."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **how)
    return buffer.getvalue()


def raw_png(width, height, depth, colour, packed):
    """A PNG by the specification alone, for what pillow does not write.  packed: its rows, compressed."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + content))
        out += struct.pack(">I", len(content)) + kind + content + check
    return out


def write_pngs(where, files):
    """files {name: bytes} into a new folder, or into a zip if so named."""
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    for name, content in files.items() if where.suffix != ".zip" else ():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(content)
    return where


def edm_files(images, labels=...):
    """(N, H, W[, 3]) -> EDM's members, not in their order; with dataset.json if there are labels or None."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    files = {name: png(image) for name, image in zip(names, images)}
    files = dict(reversed(files.items()))
    if labels is not ...:
        pairs = None if labels is None else [[name, label] for name, label in zip(names, labels)][::-1]
        files["dataset.json"] = json.dumps({"labels": pairs}).encode()
    return files
