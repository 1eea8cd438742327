"""Data sets: a faulty or hostile file gives one line of error, a damaged one that, or what makes sense."""

import gzip
import io
import json
import pickle
import random
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edm.images.data import load_images
from edm.images.safe_pickle import Record
from tests.data_files import (
    DTYPE,
    binary_batch,
    edm_files,
    fails,
    idx,
    pixels,
    png,
    python_batch,
    raw_png,
    same,
    write_cifar10,
    write_mnist,
    write_pngs,
)
from toy.files import UserError


def test_what_is_not_there(tmp_path):
    fails(tmp_path / "gone", "No such file")
    fails(tmp_path, "no images")
    (tmp_path / "file").write_bytes(b"neither")
    fails(tmp_path / "file", "not a zip file")
    (tmp_path / "empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    fails(tmp_path / "empty.zip", "no images")


IDX_FAULTS = {
    "short header": (lambda b: b[:10], "announces"),
    "no header": (lambda b: b"", "begins with 00000000"),
    "magic": (lambda b: b"\0\0\x09\3" + b[4:], "begins with 00000903"),
    "truncated": (lambda b: b[:-1], "holds 1567"),
    "longer": (lambda b: b + b"\0", "holds more"),
    "size": (lambda b: b[:8] + struct.pack(">II", 14, 56) + b[16:], "[14, 56]"),
    "no images": (lambda b: b[:4] + bytes(4) + b[8:16], "0 items"),
    "count": (lambda b: b[:4] + struct.pack(">I", 2**20 + 1) + b[8:], "1048577 items"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_faulty_mnist(tmp_path, fault, zipped):
    write_mnist(tmp_path, pixels(2, 28, 28), [1, 2], zipped=zipped)
    damage, words = IDX_FAULTS[fault]
    content = damage(idx(pixels(2, 28, 28)))
    file = tmp_path / f"train-images-idx3-ubyte{'.gz' * zipped}"
    file.write_bytes(gzip.compress(content) if zipped else content)
    fails(tmp_path, str(file), words)


def test_faulty_mnist_labels_and_gzip(tmp_path):
    fails_labels = tmp_path / "train-labels-idx1-ubyte"
    write_mnist(tmp_path, pixels(2, 28, 28), [1, 2, 3])
    fails(tmp_path, str(fails_labels), "3 labels for 2 images")
    write_mnist(tmp_path, pixels(2, 28, 28), [1, 10])
    fails(tmp_path, str(fails_labels), "label 10")
    fails_labels.write_bytes(idx(pixels(2, 28, 28)))
    fails(tmp_path, str(fails_labels), "begins with 00000803")
    fails_labels.unlink()
    fails(tmp_path, str(fails_labels) + ".gz", "No such file")
    fails(tmp_path, "t10k-images-idx3-ubyte.gz", train=False)
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images-idx3-ubyte.gz")
    fails(tmp_path, "train-images-idx3-ubyte.gz", "Not a gzipped file")


def test_gzip_bomb_is_read_no_further_than_announced(tmp_path):
    write_mnist(tmp_path, pixels(1, 28, 28), [1])
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as stream:
        stream.write(idx(pixels(1, 28, 28)))
        stream.write(bytes(2**26))
    tracemalloc.start()
    fails(tmp_path, "train-images-idx3-ubyte.gz", "holds more")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize(
    "content, words",
    [(b"", "0 bytes"), (bytes(3072), "3072 bytes"), (bytes(3073 * 2 + 1), "6147 bytes"),
     (b"\x0a" + bytes(3072), "label 10")],
)  # fmt: skip
def test_faulty_binary_batch(tmp_path, content, words):
    write_cifar10(tmp_path, binary_batch, ".bin")
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    fails(tmp_path, "data_batch_3.bin", words)
    assert len(load_images(tmp_path, train=False)) == 6


TWO = pixels(2, 3, 32, 32), [1, 2]
OBJECTS = DTYPE.replace(b"u1", b"O8")
PYTHON_FAULTS = {
    "empty": (b"", "not a readable pickle"),
    "truncated": (python_batch(*TWO)[:-100], "not a readable pickle"),
    "no dictionary": (b"\x80\x02K\x01.", "damaged, or of another kind"),
    "no data": (b"\x80\x02}U\x06labels](K\x01es.", "data"),
    "no images": (python_batch(TWO[0][:0], []), "not an array"),
    "fewer labels": (python_batch(TWO[0], [1], rows=2), "not an array of bytes (1, 3072)"),
    "label 10": (python_batch(TWO[0], [1, 10]), "label 10"),
    "label 300": (python_batch(TWO[0], [1, 300]), "range(0, 256)"),
    "labels a number": (python_batch(*TWO).replace(b"](K\x01K\x02e", b"J\xff\xff\xff\x7f"), "iterable"),
    "width": (python_batch(*TWO, width=3071), "not an array"),
    "fewer bytes": (python_batch(*TWO, body=bytes(6143)), "6144 bytes"),
    "more bytes": (python_batch(*TWO, body=bytes(6145)), "6144 bytes"),
    "Fortran order": (python_batch(*TWO, order=b"\x88"), "not an array"),
    "floats": (python_batch(*TWO, dtype=DTYPE.replace(b"u1", b"f4")), "not an array"),
    "objects": (python_batch(*TWO, dtype=OBJECTS), "not an array"),
    "data a list": (b"\x80\x02}(U\x06labels](K\x01eU\x04data](K\x01eu.", "damaged, or of another kind"),
}


@pytest.mark.parametrize("fault", PYTHON_FAULTS)
def test_faulty_python_batch(tmp_path, fault):
    content, words = PYTHON_FAULTS[fault]
    write_cifar10(tmp_path, python_batch)
    (tmp_path / "data_batch_2").write_bytes(content)
    fails(tmp_path, str(tmp_path / "data_batch_2"), words)


def call(module, name, argument, protocol=2):
    """A pickle that calls module.name(argument)."""
    if protocol == 2:
        return f"c{module}\n{name}\n".encode() + b"U" + bytes([len(argument)]) + argument + b"\x85R"
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return texts + b"\x93U" + bytes([len(argument)]) + argument + b"\x85R"


HOSTILE = {
    "posix system": lambda a: call("posix", "system", a),
    "builtins exec": lambda a: call("__builtin__", "exec", b"import os; os.system('" + a + b"')"),
    "a path through numpy": lambda a: call("numpy", "os.system", a, protocol=4),
    "a path through ndarray": lambda a: call("numpy", "ndarray.__class__", a, protocol=4),
    "elsewhere in numpy": lambda a: call("numpy.core.multiarray", "fromfile", a),
    "encoder": lambda a: call("_codecs", "encode", a),
    "persistent id": lambda a: b"U\x01aQ",
    "extension": lambda a: b"\x82\x01",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_batch_is_refused_and_not_executed(tmp_path, kind):
    write_cifar10(tmp_path, python_batch)
    attack = HOSTILE[kind](f"touch {tmp_path}/owned".encode())
    file = tmp_path / "test_batch"
    for content in (
        b"\x80\x04" + attack + b".",
        b"\x80\x04" + attack + b"0" + python_batch(*TWO)[2:],  # before an honest batch
        python_batch(*TWO, dtype=attack + b"0" + DTYPE),  # and within it
    ):
        file.write_bytes(content)
        fails(tmp_path, str(file), "not allowed", train=False)
    assert not (tmp_path / "owned").exists()
    if kind == "posix system":  # the attack is real: this would be executed
        pickle.loads(b"\x80\x02" + attack + b".")
        assert (tmp_path / "owned").exists()


def test_a_batch_cannot_change_the_stand_ins(tmp_path):
    """BUILD with a pair as state sets attributes: of the class, were it not for its __setstate__."""
    write_cifar10(tmp_path, python_batch)
    before = dict(vars(Record))
    for name in (b"numpy\nndarray", b"numpy.core.multiarray\n_reconstruct"):
        (tmp_path / "test_batch").write_bytes(b"\x80\x02c" + name + b"\nN}U\x04argsK\x07s\x86b.")
        fails(tmp_path, "test_batch", train=False)
    assert dict(vars(Record)) == before


GREY = png(pixels(8, 8))
PNG_FAULTS = {
    "empty": (b"", "not a PNG"),
    "text": (b"hello" * 20, "not a PNG"),
    "JPEG": (None, "not a PNG"),
    "header only": (GREY[:24], "not a PNG"),
    "truncated header": (GREY[:30], "damaged PNG"),
    "truncated": (GREY[:-20], "damaged PNG"),
    "no end": (GREY[:-12], "damaged PNG"),
    "16-bit grey": (png(Image.fromarray(np.full((8, 8), 7, np.uint16))), "bit depth is 16"),
    "16-bit RGB": (raw_png(8, 8, 16, 2, zlib.compress(bytes(8 * 49))), "bit depth is 16"),
    "1-bit": (png(Image.new("1", (8, 8))), "bit depth is 1,"),
    "palette": (png(Image.fromarray(pixels(8, 8)).convert("P")), "bit depth is 8, its colour type 3"),
    "grey and alpha": (png(Image.new("LA", (8, 8))), "its colour type 4"),
    "RGBA": (png(Image.new("RGBA", (8, 8))), "its colour type 6"),
    "other size": (png(pixels(9, 9)), "(1, 9, 9), those of 00000/img00000000.png (1, 8, 8)"),
    "other channels": (png(pixels(8, 8, 3)), "(3, 8, 8)"),
    "not square": (png(pixels(8, 9)), "8x9"),
    "bomb": (raw_png(100000, 100000, 8, 0, zlib.compress(bytes(100))), "(1, 100000, 100000), those of"),
}


@pytest.mark.parametrize("where", ["d.zip", "d"])
@pytest.mark.parametrize("fault", PNG_FAULTS)
def test_faulty_png(tmp_path, fault, where):
    content, words = PNG_FAULTS[fault]
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(pixels(8, 8)).save(buffer, "JPEG")
        content = buffer.getvalue()
    files = edm_files(pixels(3, 8, 8), [0, 1, 2]) | {"00000/img00000001.png": content}
    fails(write_pngs(tmp_path / where, files), f"{where}/00000/img00000001.png", words)


def test_raw_png_is_one(tmp_path):
    """The writer of the 16-bit fault is right: at 8 bits its file is read."""
    rows = b"\0" + bytes(range(6)) + b"\0" + bytes(range(6, 12))
    path = write_pngs(tmp_path / "d", {"a.png": raw_png(2, 2, 8, 2, zlib.compress(rows))})
    same(path, np.arange(12).reshape(2, 2, 3).transpose(2, 0, 1)[None], None)


def test_an_image_of_another_kind_is_not_skipped(tmp_path):
    path = write_pngs(tmp_path / "d", edm_files(pixels(2, 4, 4)) | {"00000/x.jpg": b"\xff\xd8"})
    fails(path, "00000/x.jpg", "not a PNG")


def test_an_image_of_wrong_resolution(tmp_path):
    path = write_pngs(tmp_path / "d.zip", edm_files(pixels(2, 4, 4)))
    fails(path, "resolution 4", "not 8", resolution=8)


NAMES = ["00000/img00000000.png", "00000/img00000001.png"]
JSON_FAULTS = {
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe\xff",
    "deep": "[" * 100000,
    "no labels": "{}",
    "a list": "[]",
    "a number": '{"labels": 3}',
    "a string": '{"labels": "ab"}',
    "fewer": {NAMES[0]: 0},
    "more": {NAMES[0]: 0, NAMES[1]: 1, "other.png": 2},
    "other names": {NAMES[0]: 0, "other.png": 1},
    "twice": json.dumps({"labels": [[NAMES[0], 0], [NAMES[0], 1]]}),
    "negative": {NAMES[0]: 0, NAMES[1]: -1},
    "huge": {NAMES[0]: 0, NAMES[1]: 2**70},
    "huge too": {NAMES[0]: 0, NAMES[1]: 2**16},
    "fraction": {NAMES[0]: 0, NAMES[1]: 1.5},
    "truth": {NAMES[0]: 0, NAMES[1]: True},
    "null": {NAMES[0]: 0, NAMES[1]: None},
    "two hot": {NAMES[0]: [0, 1], NAMES[1]: [1, 1]},
    "none hot": {NAMES[0]: [0, 1], NAMES[1]: [0, 0]},
    "soft": {NAMES[0]: [0, 1], NAMES[1]: [0.5, 0.5]},
    "half more": {NAMES[0]: [0, 1], NAMES[1]: [1, 0.5]},
    "empty": {NAMES[0]: [0, 1], NAMES[1]: []},
}


@pytest.mark.parametrize("where", ["d.zip", "d"])
@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_faulty_labels(tmp_path, fault, where):
    text = JSON_FAULTS[fault]
    if isinstance(text, dict):
        text = json.dumps({"labels": list(text.items())})
    text = text if isinstance(text, bytes) else text.encode()
    files = edm_files(pixels(2, 4, 4)) | {"dataset.json": text}
    reason = "neither a class index nor one-hot" if b"[0, 1]" in text else ""
    fails(write_pngs(tmp_path / where, files), f"{where}/dataset.json", reason)


def test_zip_faults(tmp_path):
    path = write_pngs(tmp_path / "d.zip", edm_files(pixels(3, 8, 8)))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    fails(path, "not a zip file")
    at = content.index(b"IDAT") + 20
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    fails(path, "/00000/img00000002.png", "CRC")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_members_with_one_name_the_last_counts_once(tmp_path):
    old, new = pixels(2, 4, 4)
    path = write_pngs(tmp_path / "d.zip", {"a.png": png(old)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.png", png(new))
    same(path, new[None, None], None)


def test_a_members_name_cannot_break_the_line(tmp_path):
    fails(write_pngs(tmp_path / "d.zip", {"a\n\x1b[31mb.png": b""}), "a??[31mb.png: not a PNG")


# --- random damage -------------------------------------------------------------------------------


def damaged(content, seed, first):
    """Up to three bytes changed, among the first ones, or a cut, or an insertion."""
    rng = random.Random(seed)
    out = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        out[rng.randrange(min(first, len(out)))] = rng.randrange(256)
    at = rng.randrange(len(out))
    if rng.random() < 0.2:
        out = out[:at]
    elif rng.random() < 0.2:
        out[at:at] = bytes([rng.randrange(256)])
    return bytes(out)


def outcome(path, train=True):
    """Images that are well formed, or None after an error of one line.  Anything else raises."""
    try:
        found = load_images(path, train=train)
    except UserError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return None
    assert found.images.dtype == torch.uint8 and found.images.ndim == 4 and len(found) > 0
    assert found.labels is None or (found.labels.shape == (len(found),) and found.labels.dtype == torch.int64)
    return found


seeds = st.integers(0, 2**32)
few = settings(max_examples=150, deadline=None)


@few
@given(seeds, st.booleans(), st.booleans())
def test_damaged_mnist(seed, zipped, of_labels):
    images = pixels(2, 28, 28)
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder), images, [1, 2], zipped=zipped)
        name = ("train-labels-idx1-ubyte", "train-images-idx3-ubyte")[not of_labels] + ".gz" * zipped
        file = Path(folder) / name
        content = file.read_bytes()
        changed = damaged(content, seed, 8 if of_labels else 16)
        file.write_bytes(changed)
        found = outcome(folder)
        if found is not None and zipped:  # the bytes of time and system may change, nothing else
            assert np.array_equal(found.images[:, 0], images) and found.labels.tolist() == [1, 2]
        elif not zipped:
            assert (found is None) == (changed != content)


@few
@given(seeds)
def test_damaged_binary_batch(seed):
    content = damaged(binary_batch(*TWO), seed, 3)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_batch.bin").write_bytes(content)
        found = outcome(folder, train=False)
        whole = len(content) == 6146
        assert (found is not None) == (
            (whole or len(content) == 3073) and content[0] < 10 and content[-3073] < 10
        )


@settings(max_examples=400, deadline=None)
@given(seeds, st.sampled_from([60, 120, 330]))
def test_damaged_python_batch(seed, first):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_batch").write_bytes(damaged(python_batch(*TWO), seed, first))
        found = outcome(folder, train=False)
        assert found is None or (found.images.shape[1:] == (3, 32, 32) and found.labels.max() < 10)


@few
@given(seeds, st.sampled_from([40, 10**6]))
def test_damaged_png_is_never_taken_for_another_image(seed, first):
    image = pixels(8, 8, 3)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.png").write_bytes(damaged(png(image), seed, first))
        found = outcome(folder)
        assert found is None or np.array_equal(found.images[0], image.transpose(2, 0, 1))


@few
@given(seeds)
def test_damaged_zip(seed):
    with tempfile.TemporaryDirectory() as folder:
        path = write_pngs(Path(folder) / "d.zip", edm_files(pixels(2, 4, 4), [0, 1]))
        path.write_bytes(damaged(path.read_bytes(), seed, 10**6))
        outcome(path)
