"""Data sets: what each kind of file gives, pixels and labels."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from edm.images.data import Images, load_images, one_hot, to_network, to_uint8
from tests.data_files import (
    binary_batch,
    edm_files,
    fails,
    pixels,
    png,
    python_batch,
    same,
    write_cifar10,
    write_mnist,
    write_pngs,
)
from toy.files import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def test_digits():
    from sklearn.datasets import load_digits

    found, digits = load_images("digits", resolution=8), load_digits()
    assert found.images.shape == (1797, 1, 8, 8) and found.images.dtype == torch.uint8
    assert [round(v * 255 / 16) for v in digits.images.ravel()] == found.images.ravel().tolist()
    assert found.labels.tolist() == digits.target.tolist() and found.labels.dtype == torch.int64
    assert found.num_classes == 10 and found.name == "digits"
    assert torch.equal(found.images, load_images("digits", train=False).images)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, zipped):
    train, test = pixels(5, 28, 28), pixels(3, 28, 28, seed=1)
    write_mnist(tmp_path, train, [3, 1, 4, 1, 5], zipped=zipped)
    write_mnist(tmp_path, test, [9, 2, 6], "t10k", zipped)
    same(tmp_path, train[:, None], [3, 1, 4, 1, 5], resolution=28)
    same(tmp_path, test[:, None], [9, 2, 6], train=False)
    fails(tmp_path, "28", "32", resolution=32)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_as_debian_packs_it():
    found = load_images(FASHION, train=False, resolution=28)
    assert found.images.shape == (10000, 1, 28, 28) and found.labels.bincount().tolist() == [1000] * 10
    assert found.labels[:5].tolist() == [9, 2, 1, 1, 6]


@pytest.mark.parametrize("suffix, batch", [(".bin", binary_batch), ("", python_batch)])
def test_cifar10_in_the_order_of_its_batches(tmp_path, suffix, batch):
    parts = write_cifar10(tmp_path, batch, suffix)
    (tmp_path / "batches.meta").write_bytes(b"not needed")
    images, labels = zip(*parts[:5])
    same(tmp_path, np.concatenate(images), [label for part in labels for label in part], resolution=32)
    same(tmp_path, *parts[5], train=False)
    (tmp_path / f"data_batch_4{suffix}").unlink()
    with pytest.raises(UserError, match=f"data_batch_4{suffix}: No such file"):
        load_images(tmp_path)


def test_the_crafted_batch_is_what_numpy_reads():
    images = pixels(300, 3, 32, 32)
    batch = pickle.loads(python_batch(images, [7] * 300), encoding="bytes")
    assert list(batch) == [b"batch_label", b"labels", b"data", b"filenames"]
    assert batch[b"data"].dtype == np.uint8 and batch[b"labels"] == [7] * 300
    assert np.array_equal(batch[b"data"], images.reshape(300, 3072))


@pytest.mark.parametrize("where", ["d.zip", "d"])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(
    "labels", [..., None, [5, 0, 2, 2], [[0, 0, 1], [1, 0, 0], [0.0, 1.0, 0.0], [1, 0, 0]]]
)
def test_pngs_in_the_order_of_their_names(tmp_path, where, channels, labels):
    images = pixels(4, 6, 6, *channels)
    path = write_pngs(tmp_path / where, edm_files(images, labels))
    want = np.moveaxis(images, -1, 1) if channels else images[:, None]
    if labels in (..., None):
        labels = None
    elif labels[0] != 5:
        labels = [2, 0, 1, 0]
    same(path, want, labels, resolution=6)
    same(str(path), want, labels, train=False)


def test_names_sort_as_whole_strings_and_other_files_are_left_alone(tmp_path):
    images = pixels(4, 4, 4)
    names = ["10.png", "9.png", "b/1.PNG", "b.png"]  # "." comes before "/"
    order = [0, 1, 3, 2]
    for where in (tmp_path / "d", tmp_path / "d.zip"):
        files = dict(zip(names, map(png, images))) | {"README.txt": b"x", "b/dataset.json": b"x"}
        same(write_pngs(where, files), images[order][:, None], None)


@pytest.mark.parametrize("where", ["d.zip", "d"])
def test_hidden_files_are_no_images_and_an_inner_folder_is_the_set(tmp_path, where, capsys):
    images = pixels(3, 4, 4)
    files = {f"faces/{name}": content for name, content in edm_files(images, [2, 0, 1]).items()}
    plain = write_pngs(tmp_path / f"plain {where}", files | {"LICENSE.txt": b"x"})
    same(plain, images[:, None], [2, 0, 1])
    assert capsys.readouterr().err == ""
    forks = "__MACOSX/faces/00000/._img00000000.png", "faces/.DS_Store", "faces/.thumbnails/a.png", ".b.png"
    path = write_pngs(tmp_path / where, files | dict.fromkeys(forks, b"no PNG"))
    same(path, images[:, None], [2, 0, 1])
    same(path, images[:, None], [2, 0, 1])
    assert capsys.readouterr().err == f"{path}: 4 hidden files skipped\n"


def test_a_hidden_file_beside_mnist_or_of_a_wrong_folder(tmp_path, capsys):
    write_mnist(tmp_path, pixels(2, 28, 28), [1, 2])
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert len(load_images(tmp_path)) == 2
    assert capsys.readouterr().err == f"{tmp_path}: 1 hidden file skipped\n"
    files = {"a/0.png": png(pixels(4, 4)), "b/0.png": png(pixels(4, 4)), "a/dataset.json": b"not of all"}
    assert load_images(write_pngs(tmp_path / "d", files)).labels is None
    path = write_pngs(tmp_path / "e", {"__MACOSX/0.png": b"", ".0.png": b""})
    fails(path, "there are no images in it")


def test_names_of_windows_and_forks_of_other_systems(tmp_path, capsys):
    images, path = pixels(3, 4, 4), tmp_path / "d.zip"
    files = {f"set/{name}": content for name, content in edm_files(images, [2, 0, 1]).items()}
    files |= {"set/@eaDir/a.png/THUMB.png": b"", "set/.a.png": b""}
    write_pngs(path, {name.replace("/", "\\"): content for name, content in files.items()})
    same(path, images[:, None], [2, 0, 1])
    assert capsys.readouterr().err == f"{path}: 2 hidden files skipped\n"


def test_what_is_neither_file_nor_folder_is_told_and_never_waited_for(tmp_path, capsys):
    path = write_pngs(tmp_path / "d", edm_files(images := pixels(2, 4, 4)))
    for name, to in {"a.png": "nothing", "more": "00000"}.items():
        (path / name).symlink_to(to)
    os.mkfifo(path / "b.png")
    same(path, images[:, None], None)
    assert "d: 3 skipped, links" in capsys.readouterr().err
    fails(path / "b.png", "a device, or the like")


# --- pixels and labels ---------------------------------------------------------------------------


def test_pixels_and_network_inputs():
    every = torch.arange(256, dtype=torch.uint8)
    x = to_network(every)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert (x.double() - (every.double() / 127.5 - 1)).abs().max() < 1e-7
    assert torch.equal(to_uint8(x), every)
    assert torch.equal(to_uint8(x.double()), every)
    with pytest.raises(ValueError, match="float32, not uint8"):
        to_network(x)


def test_to_uint8_truncates_and_clips():
    u = torch.arange(256, dtype=torch.float64)
    edge = (u - 128) / 127.5  # where u begins
    assert to_uint8(edge + 1e-9).tolist() == list(range(256))
    assert to_uint8(edge - 1e-9).tolist() == [0, *range(255)]
    beyond = torch.tensor([-2.0, -torch.inf, 1.0, 1.01, 7.0, torch.inf])
    assert to_uint8(beyond).tolist() == [0] * 2 + [255] * 4
    assert to_uint8(torch.tensor(0.0)) == 128
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]))


def test_one_hot():
    found = one_hot(torch.tensor([2, 0, 2]), 4)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert one_hot(torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)
    for label, dim in (4, 4), (-1, 4), (0, 0):
        with pytest.raises(UserError, match=f"label {label} .* {dim} classes"):
            one_hot(torch.tensor([label]), dim)


def test_images_without_labels_have_no_classes():
    assert Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, "x").num_classes == 0
