"""Bombs: small files that ask for hours or gigabytes.  Each is refused, in one line, for next to nothing."""

import os
import pickle
import resource
import signal
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch

from edm.config import UserError
from edm.images import checkpoints
from edm.images.data import load_images
from edm.text.pixart_files import load_transformer

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
LONG = b"\x8a\x09" + (2**61 - 1).to_bytes(9, "little")  # hashed to 0, as are its multiples


def multiples(count):
    return b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(count))


def nested(names, depth):
    """A dictionary that holds another under each of these names, and so on."""
    keys = b"".join(b"\x8c" + bytes([len(name)]) + name.encode() + b"h%c" for name in names)
    level = lambda i: b"}q" + bytes([i + 1]) + b"(" + keys.replace(b"h%c", b"h" + bytes([i])) + b"u0"
    return b"}q\x000" + b"".join(map(level, range(depth))) + b"h" + bytes([depth])


NETS = "ema", "state_dict", "model_ema", "model", "module", "params", "generator", "net", "network"
CALL = b"ccollections\nOrderedDict\nq\x01"
PICKLES = {
    "a pair as a key": b"}" + PAIRS + b"Ns",
    "a pair in a set": b"\x8f(" + PAIRS + b"\x90",
    "a pair in a frozen set": b"(" + PAIRS + b"\x91",
    "a pair as a key of OrderedDict": CALL + b"]" + PAIRS + b"N\x86a\x85R",
    "a pair as a storage's key": b"(X\x07\0\0\0storagectorch\nFloatStorage\n"
    + PAIRS
    + b"X\x03\0\0\0cpuK\x01tQ",
    "numbers of one hash": b"}(" + multiples(150_000) + b"u",
    "a number hashed often": b"}\x8b"
    + struct.pack("<I", 2**22)
    + b"\1" * 2**22
    + b"q\0("
    + 10**5 * b"h\0N"
    + b"u",
    "a network under all names": nested(NETS, 100),
    "a long list copied": b"](" + 10**5 * b"N" + b"eq\0\x85q\2" + CALL + b"0(" + 10**5 * b"h\1h\2R" + b"l",
    "a long string as arguments": b"X\0\0\x08\0"
    + b"a" * 2**19
    + b"q\2"
    + CALL
    + b"0("
    + 10**4 * b"h\1h\2R"
    + b"l",
    "many names": b"(" + b"".join(b"ca\n%d\n" % i for i in range(10**5)) + b"l",
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
