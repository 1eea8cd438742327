"""Bombs: small files that ask for hours or gigabytes.  Each is refused, in one line, for next to nothing."""

import gzip
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import zipfile
import zlib
from collections import Counter

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from edm.images import checkpoints
from edm.images.data import load_images
from edm.images.networks import EDMPrecond
from edm.images.safe_pickle import METERED
from edm.preference_study import read_answers, read_key
from edm.quality.metrics import load_statistics
from edm.text.pixart_files import load_transformer
from edm.text.prompts import CaptionFile, read_prompts
from tests.common import REFERENCE
from tests.data_files import pixels, python_batch, raw_png
from toy.files import UserError

SECONDS, MEGABYTES = 5, 2000


def outcome(read, path, seconds=SECONDS):
    """Call read(path) in a process of its own -> (what it said, or "" if it took the file; MB at most)."""
    out, into = os.pipe()
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        try:
            read(path)
            words = ""
        except UserError as error:
            words = str(error)
        except BaseException as error:
            words = f"TRACEBACK {type(error).__name__}: {error}"
        os.write(into, words.encode()[:60_000])
        os._exit(0)
    os.close(into)
    with open(out, "rb") as answer:
        words = answer.read().decode()
    _, status, used = os.wait4(child, 0)
    assert status == 0, f"{signal.Signals(os.WTERMSIG(status)).name} while {path} was read"
    return words, used.ru_maxrss / 1000


def refused(read, path, words=""):
    said, megabytes = outcome(read, path)
    assert said.startswith(str(path)) and said.isprintable() and len(said) < len(str(path)) + 300, said
    assert words in said and megabytes < MEGABYTES, (said, megabytes)


# ----------------------------------------------------------------------------------------------
# Pickles.

PAIRS = b"N" + 60 * b"2\x86"  # of the same pair twice, and so on: 2^60 parts
NUMBER, WORD = (struct.pack("<I", size) + size * b"a" for size in (2**22, 2**19))


def multiples(count):  # all of them are hashed to 0
    return b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(count))


def nested(names, depth):
    """A dictionary that holds another under each of these names, and so on."""
    keys = b"".join(b"\x8c" + bytes([len(name)]) + name.encode() + b"h%c" for name in names)
    level = lambda i: b"}q" + bytes([i + 1]) + b"(" + keys.replace(b"h%c", b"h" + bytes([i])) + b"u0"
    return b"}q\x000" + b"".join(map(level, range(depth))) + b"h" + bytes([depth])


NETS = "ema", "state_dict", "model_ema", "model", "module", "params", "generator", "net", "network"
LOAD = b"ctorch.storage\n_load_from_bytes\nq\1"
MAKE = b"ccollections\nOrderedDict\nq\1"
LIST = b"\x8c\x02abq\3](" + 10**5 * b"h\3"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\n"
PICKLES = {
    "a pair as a key": b"}" + PAIRS + b"Ns",
    "a pair in a set": b"\x8f(" + PAIRS + b"\x90",
    "a pair in a frozen set": b"(" + PAIRS + b"\x91",
    "a pair as a key of OrderedDict": MAKE + b"]" + PAIRS + b"N\x86a\x85R",
    "a pair as a storage's key": STORAGE + PAIRS + b"X\x03\0\0\0cpuK\x01tQ",
    "numbers of one hash": b"}(" + multiples(150_000) + b"u",
    "a number hashed often": b"}\x8b" + NUMBER.replace(b"a", b"\1") + b"q\0(" + 10**5 * b"h\0N" + b"u",
    "a network under all names": nested(NETS, 100),
    "a long list copied": LIST + b"e\x85q\2" + MAKE + b"(" + 10**5 * b"h\1h\2R" + b"l",
    "a long string as arguments": b"X" + WORD + b"q\2" + LOAD + b"(" + 10**5 * b"h\1h\2R" + b"l",
    "many names": b"(" + b"".join(b"ca\n%d\n" % i for i in range(10**6)) + b"l",
    "many opcodes": b"(" + 2**23 * b"\x8f" + b"l",
    "deep lists": 10**6 * b"]" + (10**6 - 1) * b"a",
    "a storage of 2^60": b"\x8e" + struct.pack("<Q", 2**60),
    "text of 2^40": b"\x8d" + struct.pack("<Q", 2**40),
    "a frame of 2^40": b"\x95" + struct.pack("<Q", 2**40),
    "a memo far away": b"Nr\xff\xff\xff\x7f",
}


def write_edm(folder, content):
    (folder / "a.pkl").write_bytes(content)
    return checkpoints.load, folder / "a.pkl"


def write_old(folder, content):
    machine = pickle.dumps({}, 2)
    whole = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + 2 * machine + content + pickle.dumps([], 2)
    (folder / "a.pth").write_bytes(whole)
    return load_transformer, folder / "a.pth"


def write_zip(folder, content):
    with zipfile.ZipFile(folder / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", content)
    return load_transformer, folder / "a.pth"


def write_batch(folder, content):
    (folder / "test_batch").write_bytes(content)
    return lambda path: load_images(path.parent, train=False), folder / "test_batch"


@pytest.mark.parametrize("write", [write_edm, write_old, write_zip, write_batch])
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(tmp_path, kind, write):
    refused(*write(tmp_path, b"\x80\x04" + PICKLES[kind] + b"."))


# ----------------------------------------------------------------------------------------------
# Weights.


def write_weights(path, config, tensors, about="{}"):
    """A safetensors file with these metadata; {name: shape} of zeros, float32."""
    head, end = {"__metadata__": {"config": json.dumps(config), "about": about}} if config else {}, 0
    for name, shape in tensors.items():
        size = 4 * int(torch.Size(shape).numel())
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(end))
    return path


def test_headers_of_safetensors(tmp_path):
    for name, length, body in (
        ("gigabytes", 2**33, b"{" + b" " * 100), ("announced", 2**62, b"{}"),
        ("entries", None, b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(4 * 10**6)) + b"}}"),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(struct.pack("<Q", length or len(body)) + body)
        for read in (checkpoints.load, load_transformer, CaptionFile):
            refused(read, path)


EDM = dict(img_resolution=8, img_channels=1, model_channels=4, channel_mult=[1])
EMPTY = {str(i): [0] for i in range(15_000)}


@pytest.mark.parametrize("changes, words", [
    (dict(num_blocks=10_000), "1 levels of 10000 blocks, more than 128 in all"),
    (dict(channel_mult=[1] * 15, num_blocks=900), "more than 128"),
    (dict(img_resolution=2**19), "img_resolution=524288"),
    (dict(model_channels=2**19), "missing tensor"),
])  # fmt: skip
def test_configs_of_edm(tmp_path, changes, words):
    refused(checkpoints.load, write_weights(tmp_path / "a.safetensors", EDM | changes, EMPTY), words)


PIXART = dict(num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8, num_layers=0,
              in_channels=4, out_channels=8, caption_channels=8, sample_size=8, patch_size=2)  # fmt: skip


@pytest.mark.parametrize("changes, words", [
    (dict(sample_size=1024, patch_size=1), "num_layers=0"),
    (dict(sample_size=1024, patch_size=1, num_layers=1), "missing tensor"),
    (dict(sample_size=1024, patch_size=1, num_layers=1, attention_head_dim=2048), "table of positions"),
    (dict(num_layers=700), "num_layers=700"),
    (dict(num_layers=100, cross_attention_dim=2**40), "cross_attention_dim"),
    (dict(num_layers=100, num_attention_heads="x" * 1000, attention_head_dim=10**9), "num_attention_heads"),
    (dict(num_layers=100, caption_channels=2**31), ""),
])  # fmt: skip
def test_configs_of_pixart(tmp_path, changes, words):
    refused(load_transformer, write_weights(tmp_path / "a.safetensors", PIXART | changes, EMPTY), words)


def test_a_storage_that_many_tensors_share(tmp_path):
    """A file of 4 MB whose tensors would take 40 GB: copies, and one number repeated."""
    whole = torch.zeros(10**6)
    torch.save({f"x{i}": whole.view(1000, 1000) for i in range(10**4)}, tmp_path / "copies.pth")
    torch.save({f"x{i}": whole[:1].expand(2**28) for i in range(100)}, tmp_path / "expanded.pth")
    for path in tmp_path.iterdir():
        refused(load_transformer, path, "its tensors are larger than the file")


# ----------------------------------------------------------------------------------------------
# Images.


def black(size, more=b""):
    """A grey PNG of size x size, and bytes behind its end."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(size + 1)) for _ in range(size)) + packer.flush()
    return raw_png(size, size, 8, 0, body) + more


def write_zip_of(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_images(tmp_path):
    large, tail = black(13_000), black(8, bytes(10**8))
    for name, files, words in (
        ("pixels", {f"{i}.png": large for i in range(8)}, "expands to more than"),
        ("one", {"0.png": black(30_000)}, "expands to more than"),
        ("tails", {f"{i}.png": tail for i in range(5)}, "expands to more than"),
        ("labels", {"0.png": black(8), "dataset.json": b"[" * 10**8}, "larger than"),
        ("deep", {"0.png": black(8), "dataset.json": b"[" * 10**6}, "RecursionError"),
    ):
        refused(load_images, write_zip_of(tmp_path / f"{name}.zip", files), words)
    path = write_zip_of(tmp_path / "size.zip", {f"{i}.png": large for i in range(8)})
    refused(lambda path: load_images(path, resolution=32), path, "0.png: it is of resolution 13000, not 32")


def test_gzip_of_zeros(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">IIII", 0x803, 2**20, 28, 28))
        for _ in range(2**10):
            file.write(bytes(28 * 28 * 2**10))
    refused(lambda path: load_images(path.parent), path, "expands to more than")


# ----------------------------------------------------------------------------------------------
# Numbers and words.


def npy(shape, size):
    head = str({"descr": "<f8", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(size)


def test_statistics(tmp_path):
    for name, shape, size in (("large", (2**27,), 2**30), ("announced", (2**40,), 8), ("many", (2**30,), 8)):
        path = write_zip_of(tmp_path / f"{name}.npz", {"sigma.npy": npy((64, 64), 8 * 64 * 64)})
        archive = zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1)
        with archive, archive.open("mu.npy", "w", force_zip64=True) as file:
            file.write(npy(shape, 0))
            for _ in range(0, size, 2**24):
                file.write(bytes(min(size, 2**24)))
        refused(lambda path: load_statistics(path, 64), path)


def test_json(tmp_path):
    key = {"study": "s", "pairs": [{"a": "0", "b": "1"}]}
    readers = read_key, lambda path: read_answers(path, key)
    for name, text in (("deep", b"[" * 10**6), ("large", b"[" + b"[]," * 10**8), ("digits", b"1" * 10**7)):
        (tmp_path / name).write_bytes(text)
        (tmp_path / f"of {name}" / "transformer").mkdir(parents=True)
        (tmp_path / f"of {name}" / "transformer" / "config.json").write_bytes(text)
        for read in readers:
            refused(read, tmp_path / name)
        refused(load_transformer, tmp_path / f"of {name}")


def test_prompts(tmp_path):
    for name, text, words in (
        ("word.txt", b"a" * 5_000_000, "line 1: of more than 1,048,576 bytes"),
        ("words.txt", b"fox\n" + b"a " * 100_000, "line 2: a prompt of more than 16,384 characters"),
        ("field.csv", b'text\n"' + b"a\n" * 10**7, "field larger than"),
        ("columns.csv", b"," * 500_000 + b"text\n" + b",\n" * 500_000, 'no "text"'),
        ("deep.jsonl", b"[" * 500_000, "line 1: "),
        ("long.jsonl", b'{"text": "' + b"a" * 10**8 + b'"}', "line 1: of more than"),
    ):
        (tmp_path / name).write_bytes(text)
        refused(read_prompts, tmp_path / name, words)
    with open(tmp_path / "sparse.txt", "wb") as file:
        file.truncate(2**40)
    refused(read_prompts, tmp_path / "sparse.txt", "line 1: a binary file")


# ----------------------------------------------------------------------------------------------
# Many files at random: seconds, memory and what is said of each.


def seeds_of(folder):
    """{kind: (bytes, name of the file, how it is read)} of small good files."""
    images = {f"a/{i}.png": black(8) for i in range(3)}
    labels = json.dumps({"labels": [[f"{i}.png", i] for i in range(3)]}).encode()
    write_zip_of(folder / "set.zip", images | {"a/dataset.json": labels})
    weights = {f"layers.{i}.weight": torch.ones(3, 4) for i in range(3)} | {"big": 2**70, "o": [{1, 2}]}
    torch.save(weights, folder / "new.pth")
    torch.save({"state_dict": weights}, folder / "old.pth", _use_new_zipfile_serialization=False)
    network = EDMPrecond(**EDM | dict(num_blocks=1, attn_resolutions=[]))
    checkpoints.save(folder / "ours.safetensors", network, sigma_init=2.5, teacher="a")
    transformer = PixArtTransformer2DModel(**PIXART | dict(num_layers=1, norm_num_groups=1))
    checkpoints.save(folder / "text.safetensors", transformer, sigma_init=2.5)
    write_zip_of(folder / "a.npz", {"mu.npy": npy((8,), 64), "sigma.npy": npy((8, 8), 512)})
    (folder / "test_batch").write_bytes(python_batch(pixels(2, 3, 32, 32), [1, 2]))
    (folder / "study.json").write_text(json.dumps({"study": "s", "a": "x", "b": "y", "pairs": [
        {"a": "0", "b": "1", "prompt": "p"}]}))  # fmt: skip
    for name, text in (
        ("a.txt", "a red fox\n"),
        ("a.csv", 'n,text\n1,"a ""b"" c"\n'),
        ("a.jsonl", '{"text": "a"}\n'),
    ):
        (folder / name).write_text(2 * text)
    readers = dict.fromkeys(("a.txt", "a.csv", "a.jsonl"), read_prompts) | {
        "set.zip": load_images, "new.pth": load_transformer, "old.pth": load_transformer,
        "ours.safetensors": checkpoints.load, "text.safetensors": load_transformer, "study.json": read_key,
        "a.npz": lambda path: load_statistics(path, 8),
        "test_batch": lambda path: load_images(path.parent, train=False),
    }  # fmt: skip
    reference = REFERENCE / "edm/tiny_cond_vp.pkl"
    if reference.exists():
        (folder / reference.name).write_bytes(reference.read_bytes())
        readers[reference.name] = checkpoints.load
    return {name: ((folder / name).read_bytes(), read) for name, read in readers.items()}


OPCODES = [code for code in METERED if code != pickle.STOP[0]]


def mutated(content, others, rng):
    """Bytes changed to such as matter somewhere, parts cut, repeated, moved, or of another file."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 200) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 50))
        kind = rng.randrange(6)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at : at + length] = rng.choice((b"\xff", b"\0", b"\x7f", b"9", b"[", b"\x80")) * length
        elif kind == 2:
            out[at:at] = bytes(out[at : at + length]) * rng.choice((1, 3, 60, 3000))
        elif kind == 3:
            out[at:at] = bytes(rng.choices(OPCODES, k=length)) * rng.choice((1, 60, 3000))
        elif kind == 4:
            del out[at : at + length]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + length] = other[start : start + 8 * length]
    return bytes(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_files_at_random(tmp_path, seed, capsys, thorough):
    """1,000 files a seed, in processes of 100 with 5 s and 2 GB each: none hangs, grows, or raises."""
    if seed > 1 and not thorough:
        pytest.skip("with --thorough: minutes")
    good, rng = seeds_of(tmp_path), random.Random(seed)
    told = Counter()

    def read_many(path):
        for _ in range(100):
            name = rng.choice(list(good))
            content, read = good[name]
            (path / name).write_bytes(mutated(content, [c for c, _ in good.values()], rng))
            start = time.process_time()
            try:
                read(path / name)
            except UserError as error:
                said = str(error)
                assert said.startswith(str(path)) and said.isprintable() and len(said) < 500, (name, said)
                told["refused"] += 1
            took = time.process_time() - start
            assert took < SECONDS, (name, took, shutil.copy(path / name, tempfile.gettempdir()))
            told["tried"] += 1
        raise UserError(json.dumps(told))

    total, most = Counter(), 0
    for part in range(10):
        rng.seed(1000 * seed + part)
        said, megabytes = outcome(read_many, tmp_path, seconds=100)
        assert not said.startswith("TRACEBACK"), said
        total += Counter(json.loads(said))
        most = max(most, megabytes)
    with capsys.disabled():
        print(
            f"\nseed {seed}: {total['tried']} tried, {total['refused']} refused, at most {most:.0f} MB",
            end="",
        )
    assert most < MEGABYTES and total["tried"] == 1000
