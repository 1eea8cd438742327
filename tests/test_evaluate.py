"""The metrics against closed forms, the classifier and its cache, and the command line."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edm import evaluate
from edm.config import command_line
from edm.images import checkpoints, foreign, sampler
from edm.images.data import Images, load_images
from edm.images.networks import EDMPrecond
from edm.quality import features as networks
from edm.quality import metrics
from toy.files import UserError

ROOT = Path(__file__).parents[1]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(n, d):
    """A sample (n, d) with mean exactly 0 and covariance, over n - 1, exactly 1."""
    x = normal(n, d)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T


# ----------------------------------------------------------------------------------------------
# Fréchet distance.


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (3, 1), (0, 2.5), (-0.5, 0.25)])
def test_frechet_distance_of_shifted_and_scaled_gaussians(shift, scale):
    x, d = white(200, 6), 6
    expected = d * shift**2 + d * (1 - scale) ** 2
    assert metrics.frechet_distance(scale * x + shift, x) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_divides_by_n_minus_1():
    a, b = torch.tensor([[0.0, 0], [2, 0]]), torch.zeros(2, 2)
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 2)  # over n it would be 1 + 1


def test_frechet_distance_of_any_gaussians_and_from_statistics(tmp_path):
    x, y = normal(300, 5) @ normal(5, 5, seed=1) + 7, normal(400, 5, seed=2) @ normal(5, 5, seed=3)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * cross
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    np.savez(tmp_path / "reference.npz", mu=y.mean(0).numpy(), sigma=b)
    statistics = metrics.load_statistics(tmp_path / "reference.npz", 5)
    assert metrics.frechet_distance(x, statistics) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(x.float(), statistics) == pytest.approx(expected, rel=1e-6)


def test_data_floor_is_small_seeded_and_says_its_sizes():
    x = normal(501, 4)
    floor = metrics.data_floor(x)
    assert floor["sizes"] == [251, 250] and 0 < floor["fd"] < 0.1
    assert floor == metrics.data_floor(x) != metrics.data_floor(x, seed=1)


# ----------------------------------------------------------------------------------------------
# Inception Score, precision and recall.


def test_inception_score_of_no_and_of_perfect_decisions():
    K = 7
    assert metrics.inception_score(torch.full((200, K), 1 / K)) == pytest.approx(1)
    sure = torch.eye(K).repeat(100, 1)
    assert metrics.inception_score(sure, splits=1) == pytest.approx(K)
    assert K - 1 < metrics.inception_score(sure) < K  # a split holds no class exactly equally often
    assert metrics.inception_score(torch.eye(K)[:1].repeat(50, 1)) == pytest.approx(1)  # all of one class


def test_inception_score_neither_uses_nor_moves_the_global_generator():
    p, seen = normal(100, 4).softmax(1), set()
    for seed in range(3):
        before = torch.manual_seed(seed).get_state()
        seen.add(metrics.inception_score(p))
        assert torch.equal(before, torch.get_rng_state())
    assert len(seen) == 1


def test_radii_and_shares_against_loops():
    x, y = normal(40, 3), 1.5 * normal(25, 3, seed=1)
    radii = metrics.neighbour_radii(x, k=3, chunk=7)
    for i in range(40):
        others = sorted((x[i] - x[j]).norm().item() for j in range(40) if j != i)
        assert radii[i].item() == pytest.approx(others[2])
    inside = sum(any((p - c).norm() <= r for c, r in zip(x, radii)) for p in y)
    assert 0 < inside < 25, "nothing to tell apart"
    assert metrics.share_inside(y, x, radii, chunk=7) == inside / 25


def test_inception_score_of_few_images_has_parts_that_can_tell_classes():
    for n, parts in ((6, 1), (19, 1), (40, 4), (100, 10), (1000, 10)):
        sure = torch.eye(3).repeat(n, 1)[:n]
        assert metrics.inception_score(sure) == metrics.inception_score(sure, parts) > 2


@pytest.mark.parametrize("away", [1e3, 1e4])
def test_features_far_from_the_origin_lose_no_digits(away):
    """Compared with what is left of them, rounded to float32 there, at the origin."""
    x, y = (normal(300, 5, seed=seed) * 0.1 for seed in range(2))
    x, y = (x + away).float(), (1.2 * y + away).float()
    near = x.double() - away, y.double() - away
    for of in (metrics.frechet_distance, lambda a, b: metrics.share_inside(a, b, metrics.neighbour_radii(b))):
        assert of(x, y) == pytest.approx(of(*near), rel=1e-6)
    expected = metrics.neighbour_radii(near[0])
    assert (metrics.neighbour_radii(x) - expected).abs().max() < 1e-6 * expected.min()
    statistics = y.double().mean(0), y.double().T.cov()
    assert metrics.frechet_distance(x, statistics) == pytest.approx(metrics.frechet_distance(*near), rel=1e-6)


def test_processes_without_images_have_those_of_the_others(monkeypatch):
    """Five images over seven processes."""
    for rows in [*metrics.features_of(Flat(), [pixels(5, 0, 9, seed=0)])]:
        told = [rows[:1].shape] * 5 + [None] * 2, [*rows.split(1), *torch.zeros(2, 1, rows.shape[1])]
        shapes, parts = (lambda out, mine, found=found: out.__setitem__(slice(None), found) for found in told)
        calls = dict(is_initialized=lambda: True, get_world_size=lambda: 7)
        with monkeypatch.context() as patch:
            for name, call in (calls | dict(all_gather_object=shapes, all_gather=parts)).items():
                patch.setattr(metrics.dist, name, call)
            for mine in (rows[:1], rows[4:], None):
                assert torch.equal(metrics.gather([] if mine is None else [mine], "cpu"), rows)


class Flat(nn.Module):
    """Pixels as features, the first ones also as class scores."""

    num_features = 4

    def forward(self, images):
        return images.flatten(1).float()

    def probabilities(self, images):
        return self(images)[:, :3].softmax(1)


def pixels(n, low, high, seed):
    return torch.randint(low, high, (n, 1, 2, 2), generator=torch.Generator().manual_seed(seed)).byte()


def judge(images, data):
    reference = metrics.Reference(metrics.features_of(Flat(), data.split(64))[0])
    return metrics.evaluate_samples(Flat(), reference, images.split(50))


def test_precision_and_recall_of_same_disjoint_and_half_covered_data():
    low, high = pixels(300, 0, 40, seed=0), pixels(300, 200, 240, seed=1)
    same = judge(pixels(300, 0, 40, seed=2), low)
    assert same["precision"] > 0.9 and same["recall"] > 0.9 and same["images"] == 300
    apart = judge(high, low)
    assert apart["precision"] == apart["recall"] == 0 and apart["fd"] > 1e4 > 100 > same["fd"]
    half = judge(pixels(300, 0, 40, seed=2), torch.cat([low, high]))
    assert half["precision"] > 0.9 and 0.4 < half["recall"] < 0.5


def test_class_histogram_and_too_few_images():
    images = torch.tensor([[0, 9, 0, 0]] * 5 + [[9, 0, 0, 0]] * 2).reshape(7, 1, 2, 2).byte()
    assert judge(images, images)["class_histogram"] == [2, 5, 0]
    for some, data in ((images[:4], images), (images, images[:4])):
        with pytest.raises(UserError, match="4 images are too few"):
            judge(some, data)


@pytest.mark.parametrize(("function", "least"), [
    (lambda x: metrics.frechet_distance(x, x), 2), (lambda x: metrics.frechet_distance(x, normal(9, 3)), 2),
    (metrics.data_floor, 4), (metrics.neighbour_radii, 4)])  # fmt: skip
def test_each_metric_says_its_least_number(function, least):
    function(normal(least, 3))
    with pytest.raises(UserError, match=f"at least {least} images"):
        function(normal(least - 1, 3))


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


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(mu=np.zeros(5), sigma=np.eye(5)), "12 features"),
        (dict(mu=np.zeros(12), sigma=np.eye(5)), "12 features"),
        (dict(mu=np.full(12, np.nan), sigma=np.eye(12)), "not finite"),
        (dict(mean=np.zeros(12), sigma=np.eye(12)), "mu"),
        (dict(mu=np.array([print] * 12), sigma=np.eye(12)), "pickle"),
        (None, "No such file"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, arrays, message):
    path = tmp_path / "reference.npz"
    if arrays:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        metrics.load_statistics(path, 12)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


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


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_classifier_learns_the_digits_reproducibly(digits, classifier_file):
    before = torch.manual_seed(1).get_state()
    net, accuracy = networks.train_classifier(digits)
    assert accuracy >= 0.98
    assert torch.equal(before, torch.get_rng_state())
    assert same_weights(net, networks.classifier_features(digits, classifier_file))


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


def tiny_network(channels=1, resolution=8):
    torch.manual_seed(0)
    net = EDMPrecond(resolution, channels, 10, model_channels=8, channel_mult=(1,), num_blocks=1,
                     attn_resolutions=(), dropout=0.0)  # fmt: skip
    for p in net.parameters():  # an untrained one gives back its noise
        p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.fixture
def files(tmp_path, classifier_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save("orphan.safetensors", tiny_network(), sigma_init=2.5)
    for name, shape in {"": (1, 8), "colour_": (3, 8), "large_": (1, 16)}.items():
        net, teacher = tiny_network(*shape), f"{name}teacher.safetensors"
        checkpoints.save(teacher, net)
        checkpoints.save(f"{name}student.safetensors", net, sigma_init=2.5, teacher=teacher)
    for name, count in (("few", 4), ("mute", 6)):
        Path(name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8), 9 * i).save(f"{name}/{i}.png")
    return tmp_path


SETTINGS = dict(student="student.safetensors", data="digits", samples=30, steps=3, batch=8)


def argv(**changes):
    given = {k: v for k, v in (SETTINGS | changes).items() if v is not None}
    words = [("--" + k.replace("_", "-"), *([] if v is True else [str(v)])) for k, v in given.items()]
    return [*itertools.chain(*words)]


def run(**changes):
    return command_line(evaluate.main, evaluate.Settings, evaluate.__doc__, argv(**changes))


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
    checkpoints.save("foreign.safetensors", tiny_network())
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
    assert json.loads(Path("c.json").read_text("utf-8"))["student"]["fd"] != pytest.approx(
        a["student"]["fd"], rel=0.01
    )


def test_the_teacher_of_a_students_notes_is_shown_before_it_is_opened(files, capsys):
    foreign.tell.cache_clear()
    checkpoints.save("stranger.safetensors", tiny_network(), sigma_init=2.5, teacher="some/where.pkl")
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
    with pytest.raises(SystemExit) as stop:
        run(student=None)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes, samples", [(2, 31), (6, 5)])
def test_processes_give_the_numbers_of_one(files, classifier_file, processes, samples):
    """Those without an image, too."""
    script, settings = str(ROOT / "edm/evaluate.py"), dict(samples=samples, classifier=classifier_file)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    for launcher, out in (([], "one.json"), (torchrun, "many.json")):
        command = [sys.executable, *launcher, script, *argv(out=out, **settings)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, many = (json.loads(Path(name).read_text("utf-8")) for name in ("one.json", "many.json"))
    assert many["run"]["processes"] == processes and one["run"]["processes"] == 1
    for name in ("student", "teacher", "data_floor"):
        for key in set(one[name]) - {"seconds", "images_per_second"}:
            assert many[name][key] == pytest.approx(one[name][key], rel=1e-5), (name, key)
