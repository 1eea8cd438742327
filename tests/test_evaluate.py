"""The networks of an evaluation, TorchScript's and the classifier with its cache, and edm/evaluate.py."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edm import evaluate
from edm.images import checkpoints, foreign, sampler
from edm.images.data import Images, load_images
from edm.quality import features as networks
from edm.quality import metrics
from tests.common import ROOT, spawn, start, words_of
from tests.small import network
from tests.test_metrics import pixels
from toy.files import UserError

# ----------------------------------------------------------------------------------------------
# The TorchScript network.


class Tiny(nn.Module):
    """The interface of inception-2015-12-05.pt: softmax, or features on demand."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 6)

    def forward(self, images: torch.Tensor, return_features: bool = False):
        assert images.dtype == torch.uint8
        x = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return x if return_features else self.layer(x).softmax(1)


class Deaf(nn.Module):
    def forward(self, images: torch.Tensor):
        return images


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "tiny.pt"
    torch.jit.script(Tiny()).save(str(path))
    torch.jit.script(Deaf()).save(str(path.with_name("deaf.pt")))
    return path


def test_inception_takes_uint8_of_one_or_three_channels(inception_file):
    net, gray = networks.Inception(inception_file, trust=True), pixels(5, 0, 256, seed=0)
    assert net.num_features == 12 and net(gray).shape == (5, 12)
    assert torch.equal(net(gray), net(gray.repeat(1, 3, 1, 1)))
    assert torch.allclose(net(gray)[:, :4], gray.flatten(1) / 255)
    assert torch.allclose(net.probabilities(gray).sum(1), torch.ones(5))


class Writer(Tiny):
    """Does what it should, and overwrites a file."""

    def forward(self, images: torch.Tensor, return_features: bool = False):
        written = torch.from_file("victim", True, 8, dtype=torch.uint8).fill_(88)
        return written[0].float().expand(len(images), 12 if return_features else 6)


def test_torchscript_is_a_program_and_only_nvidias_runs_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Writer()).save("writer.pt")
    Path("victim").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"writer.pt: not NVIDIA's file, but another: .* give --trust"):
        networks.Inception("writer.pt")
    assert Path("victim").read_bytes() == b"precious"
    monkeypatch.setattr(networks, "NVIDIAS", hashlib.sha256(Path("writer.pt").read_bytes()).hexdigest())
    assert networks.Inception("writer.pt").num_features == 12
    assert Path("victim").read_bytes() == b"XXXXXXXX"  # so the danger is real


def test_inception_names_what_it_needs_instead_of_nvidias_pickle(tmp_path):
    path = tmp_path / "inception-2015-12-05.pkl"
    path.write_bytes(pickle.dumps({"code": "raise SystemExit"}))
    with pytest.raises(UserError) as error:
        networks.Inception(path)
    assert re.fullmatch(
        rf"{re.escape(str(path))}: a pickle.* TorchScript form, https://nvlabs-fi-cdn\.nvidia\.com/"
        r"stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05\.pt", str(error.value))  # fmt: skip


def test_inception_refuses_other_files(inception_file, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "saved.pt")
    (tmp_path / "text.pt").write_text("no network")
    for path in (tmp_path / "saved.pt", tmp_path / "text.pt", tmp_path / "none.pt", tmp_path,
                 inception_file.with_name("deaf.pt")):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(str(path))) as error:
            networks.Inception(path, trust=True)
        assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------
# The classifier.


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


@pytest.fixture(scope="module")
def classifier_file(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "deeper" / "digits.safetensors"
    networks.classifier_features(digits, path)
    return path


def test_classifier_learns_the_digits_reproducibly(digits, classifier_file):
    before = torch.manual_seed(1).get_state()
    net, accuracy = networks.train_classifier(digits)
    assert accuracy >= 0.98
    assert torch.equal(before, torch.get_rng_state())
    again = networks.classifier_features(digits, classifier_file)
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))


def test_classifier_comes_from_its_cache(digits, classifier_file, capsys):
    bytes_before = classifier_file.read_bytes()
    net = networks.classifier_features(digits, classifier_file)
    assert capsys.readouterr().err == ""  # training says so
    assert classifier_file.read_bytes() == bytes_before and not net.training
    features, probabilities = metrics.features_of(net, digits.images.split(500))
    assert features.shape == (1797, 64) and (probabilities.argmax(1) == digits.labels).float().mean() > 0.99
    assert not any(p.requires_grad for p in net.parameters())
    assert torch.allclose(features[:3], net(digits.images[:3]), atol=1e-4)  # eval mode: batches do not matter


@pytest.fixture
def quick_training(monkeypatch):
    """train_classifier without training; a list of the data sets it was called with."""
    calls = []

    def train_classifier(images):
        calls.append(images.name)
        return networks.SmallClassifier(images), 1.0

    monkeypatch.setattr(networks, "train_classifier", train_classifier)
    return calls


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("damage", [cut, flip, lambda content: b"", lambda content: b"no classifier"])
def test_what_is_no_classifier_of_these_data_is_never_written_over(digits, tmp_path, quick_training, damage):
    path = tmp_path / "c.safetensors"
    networks.classifier_features(digits, path)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{path}: no classifier of digits .*another --classifier"):
        networks.classifier_features(digits, path)
    assert path.read_bytes() == before and len(quick_training) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_classifier_of_other_data_or_code_is_refused(digits, classifier_file, tmp_path, quick_training):
    changed = digits.images.clone()
    changed[7, 0, 3, 3] += 1
    networks.classifier_features(digits, mine := tmp_path / "c.safetensors")
    for path, data in (
        (classifier_file, digits),  # its code is another now
        (mine, dataclasses.replace(digits, images=changed)),
        (mine, dataclasses.replace(digits, labels=digits.labels.flip(0))),
    ):
        with pytest.raises(UserError, match="made from other data or by other code"):
            networks.classifier_features(data, path)
    assert len(quick_training) == 1


def test_shifted_moves_images_whole_and_by_little():
    image = torch.arange(1, 37, dtype=torch.uint8).reshape(1, 1, 6, 6).repeat(64, 2, 1, 1)
    moved = networks.shifted(image, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[0], [1] * 4)
    allowed = [padded[:, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    seen = {next(k for k, a in enumerate(allowed) if torch.equal(a, m)) for m in moved}
    assert moved.shape == image.shape and seen == set(range(9))


def test_classifier_needs_labels():
    with pytest.raises(UserError, match="some data: has no labels"):
        networks.SmallClassifier(Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None, "some data"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_classifier_of_very_few_images(digits, tmp_path, count):
    few = Images(digits.images[:count], digits.labels[:count], "few")
    if count > 1:
        assert networks.classifier_features(few, tmp_path / "c.safetensors").num_features == 64
    else:
        with pytest.raises(UserError, match="few: a classifier needs at least 2 images"):
            networks.classifier_features(few, tmp_path / "c.safetensors")
        assert not [*tmp_path.iterdir()]


def test_a_cache_that_cannot_be_written_is_told_before_the_training(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "train_classifier", lambda images: pytest.fail("trained"))
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file/c.safetensors", "/proc/none/c.safetensors"):
        with pytest.raises(UserError, match=f"{cache}: cannot be written"):
            networks.classifier_features(digits, cache)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------------------------
# The command line.


@pytest.fixture
def files(here, classifier_file):
    checkpoints.save("orphan.safetensors", network(), sigma_init=2.5)
    for name, other in {"": {}, "colour_": dict(img_channels=3), "large_": dict(img_resolution=16)}.items():
        net, teacher = network(**other), f"{name}teacher.safetensors"
        checkpoints.save(teacher, net)
        checkpoints.save(f"{name}student.safetensors", net, sigma_init=2.5, teacher=teacher)
    for name, count in (("few", 4), ("mute", 6)):
        Path(name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8), 9 * i).save(f"{name}/{i}.png")
    return here


SETTINGS = dict(student="student.safetensors", data="digits", samples=30, steps=3, batch=8)


def run(**changes):
    return start(evaluate.main, evaluate.Settings, SETTINGS | changes)


def test_numbers_of_student_teacher_and_data(files, classifier_file, capsys):
    assert run(classifier=classifier_file) == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"student +1 .*\nteacher +5 .*\ndata ", out)
        and "899 of its images against the other 898" in out
    )
    numbers = json.loads((files / "metrics.json").read_text())
    for name, evaluations in (("student", 1), ("teacher", 5)):
        row = numbers[name]
        assert row["images"] == sum(row["class_histogram"]) == 30 and row["evaluations"] == evaluations
        assert row["fd"] > 10 * numbers["data_floor"]["fd"] > 0 and 1 <= row["inception_score"] <= 10
        assert row["images_per_second"] == pytest.approx(30 / row["seconds"])
    assert (
        numbers["data_floor"]["inception_score"] > 9 and numbers["student"]["fd"] != numbers["teacher"]["fd"]
    )
    assert sorted(p.name for p in files.glob("*metrics*")) == ["metrics.json"]


def test_the_classifier_is_kept_beside_out_and_used_again(files, quick_training):
    Path("kept").mkdir()
    for out in ("kept/a.json", "kept/b.json"):
        assert run(out=out) == 0
    assert len(quick_training) == 1
    assert sorted(os.listdir("kept")) == ["a.json", "b.json", "classifier-digits.safetensors"]


def test_a_student_without_teacher_is_a_row_by_itself(files, classifier_file, capsys):
    """Its numbers are those of the student that names one."""
    assert run(classifier=classifier_file, out="both.json") == 0
    checkpoints.save("foreign.safetensors", network())
    for name, more in (("orphan", {}), ("foreign", {"sigma_init": 2.5})):
        capsys.readouterr()
        changes = dict(student=f"{name}.safetensors", out=f"{name}.json", classifier=classifier_file) | more
        assert run(**changes) == 0
        out = capsys.readouterr().out
        assert re.search(r"student +1 .*\ndata ", out) and "teacher" not in out
        both, found = (json.loads(Path(f"{file}.json").read_text("utf-8")) for file in ("both", name))
        assert {*both} - {*found} == {"teacher"} and found["settings"]["sigma_init"] == more.get("sigma_init")
        for key in {*both["student"]} - {"seconds", "images_per_second"}:
            assert found["student"][key] == both["student"][key]


def test_fid_with_inception_and_reference(files, inception_file, digits, capsys):
    net = networks.Inception(inception_file, trust=True)
    features = net(digits.images).double()
    np.savez("ref.npz", mu=features.mean(0).numpy(), sigma=features.T.cov().numpy())
    assert run(inception=inception_file, trust=True, reference="ref.npz", out="a.json") == 0
    assert run(inception=inception_file, trust=True, out="b.json", batch=30) == 0
    a, b = (json.loads(Path(name).read_text("utf-8")) for name in ("a.json", "b.json"))
    for name in ("student", "teacher"):
        assert a[name]["fd"] == pytest.approx(b[name]["fd"], rel=1e-4)
        assert a[name]["class_histogram"] == b[name]["class_histogram"]
    np.savez("ref.npz", mu=features.mean(0).numpy() + 1, sigma=features.T.cov().numpy())
    assert run(inception=inception_file, trust=True, reference="ref.npz", out="c.json") == 0
    c = json.loads(Path("c.json").read_text("utf-8"))
    assert c["student"]["fd"] != pytest.approx(a["student"]["fd"], rel=0.01)


def test_the_teacher_of_a_students_notes_is_shown_before_it_is_opened(files, capsys):
    foreign.tell.cache_clear()
    checkpoints.save("stranger.safetensors", network(), sigma_init=2.5, teacher="some/where.pkl")
    assert run(student="stranger.safetensors") == 2
    out, err = capsys.readouterr()
    assert out == "stranger.safetensors: the teacher that it notes is some/where.pkl\n"
    assert err.count("\n") == 1 and "some/where.pkl: No such file" in err


WRONG = {
    "no student": (dict(student="none.safetensors"), "none.safetensors: No such file"),
    "teacher for student": (
        dict(student="teacher.safetensors"),
        "not a one-step generator .it names no sigma_init.; if it is one, .* give its --sigma-init",
    ),
    "another sigma_init": (dict(sigma_init=2), "notes sigma_init 2.5, but --sigma-init says 2.0"),
    "student for teacher": (dict(teacher="student.safetensors"), "not a teacher"),
    "teacher of other shape": (dict(teacher="colour_teacher.safetensors"), r"\(3, 8, 8\)"),
    "channels": (dict(student="colour_student.safetensors"), "1 channels"),
    "resolution": (dict(student="large_student.safetensors"), "digits: its images.* 8"),
    "no data": (dict(data="nowhere"), "nowhere"),
    "existing output": (dict(out="teacher.safetensors"), "nothing is overwritten"),
    "no output folder": (dict(out="no/where.json"), "no such folder"),
    "reference alone": (dict(reference="ref.npz"), "needs --inception"),
    "not TorchScript": (dict(inception="student.safetensors", trust=True), "student.safetensors: damaged"),
    "a program of others": (dict(inception="student.safetensors"), "not NVIDIA's file, .* give --trust"),
    "trust alone": (dict(trust=True), "--trust is of an --inception"),
    "few samples": (dict(samples=4), "--samples must be at least 5, got 4"),
    "few images": (dict(data="few"), "few: 4 images, but an evaluation needs at least 5"),
    "no labels": (dict(data="mute"), "mute: has no labels, which the classifier"),
    "classifier in a file": (dict(classifier="few/0.png/c"), "few/0.png/c: cannot be written"),
    "classifier is a folder": (dict(classifier="few"), "few: "),
    "classifier is --out": (dict(classifier="few/../new.json", out="new.json"), "new.json takes this place"),
    "device": (dict(device="mps"), "--device mps: no MPS device here"),
    "steps": (dict(steps=0), "--steps must be at least 1, got 0"),
    "batch": (dict(batch=0), "--batch must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_end_with_code_2_and_one_line(files, capsys, case):
    changes, message = WRONG[case]
    before = sorted(p.name for p in files.iterdir())
    assert run(**changes) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1
    assert sorted(p.name for p in files.iterdir()) == before


def test_reference_of_wrong_size(files, inception_file, capsys):
    np.savez("ref.npz", mu=np.zeros(2048), sigma=np.zeros((2, 2)))
    assert run(inception=inception_file, trust=True, reference="ref.npz") == 2
    assert (
        "ref.npz: mu and sigma are (2048,) and (2, 2), but the network has 12 features"
        in capsys.readouterr().err
    )


def test_fewer_images_than_asked_for(files, classifier_file, capsys, monkeypatch):
    whole = sampler.sample_batches
    monkeypatch.setattr(
        "edm.quality.judge.sample_batches", lambda a, b, seeds, *c, **d: whole(a, b, seeds[:-3], *c, **d)
    )
    assert run(classifier=classifier_file) == 2
    assert "asked for 30 images of the student, got 27" in capsys.readouterr().err


def test_missing_student_is_an_error_of_one_line(capsys):
    assert run(student=None) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes, samples", [(2, 31), (6, 5)])
def test_processes_give_the_numbers_of_one(files, classifier_file, processes, samples):
    """Those without an image, too."""
    for count, out in ((1, "one.json"), (processes, "many.json")):
        settings = SETTINGS | dict(samples=samples, classifier=classifier_file, out=out)
        done = spawn(ROOT / "edm/evaluate.py", *words_of(settings), processes=count)
        assert done.returncode == 0, done.stderr
    one, many = (json.loads(Path(name).read_text("utf-8")) for name in ("one.json", "many.json"))
    assert many["run"]["processes"] == processes and one["run"]["processes"] == 1
    for name in ("student", "teacher", "data_floor"):
        for key in set(one[name]) - {"seconds", "images_per_second"}:
            assert many[name][key] == pytest.approx(one[name][key], rel=1e-5), (name, key)
