"""The metrics against closed forms and loops: Fréchet distance, Inception Score, precision, recall."""

import numpy as np
import pytest
import torch
from torch import nn

from edm.quality import metrics
from toy.files import UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(n, d):
    """A sample (n, d) with mean exactly 0 and covariance, over n - 1, exactly 1."""
    x = normal(n, d)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T


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


def test_data_floor_is_small_seeded_and_says_its_sizes():
    x = normal(501, 4)
    floor = metrics.data_floor(x)
    assert floor["sizes"] == [251, 250] and 0 < floor["fd"] < 0.1
    assert floor == metrics.data_floor(x) != metrics.data_floor(x, seed=1)


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


def test_inception_score_of_few_images_has_parts_that_can_tell_classes():
    for n, parts in ((6, 1), (19, 1), (40, 4), (100, 10), (1000, 10)):
        sure = torch.eye(3).repeat(n, 1)[:n]
        assert metrics.inception_score(sure) == metrics.inception_score(sure, parts) > 2


def test_radii_and_shares_against_loops():
    x, y = normal(40, 3), 1.5 * normal(25, 3, seed=1)
    radii = metrics.neighbour_radii(x, k=3, chunk=7)
    for i in range(40):
        others = sorted((x[i] - x[j]).norm().item() for j in range(40) if j != i)
        assert radii[i].item() == pytest.approx(others[2])
    inside = sum(any((p - c).norm() <= r for c, r in zip(x, radii)) for p in y)
    assert 0 < inside < 25, "nothing to tell apart"
    assert metrics.share_inside(y, x, radii, chunk=7) == inside / 25


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


class Flat(nn.Module):
    """Pixels as features, the first ones also as class scores."""

    num_features = 4

    def forward(self, images):
        return images.flatten(1).float()

    def probabilities(self, images):
        return self(images)[:, :3].softmax(1)


def pixels(n, low, high, seed):
    return torch.randint(low, high, (n, 1, 2, 2), generator=torch.Generator().manual_seed(seed)).byte()


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
