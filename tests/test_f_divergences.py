"""toy/f_divergences.py: its rows against other formulas, and that it can fail."""

import json
import math

import numpy as np
import pytest
import torch

from toy import f_divergences, f_family, f_ring
from toy.f_family import F_DISTILL, ROWS
from toy.mixtures import Mixture

SIGMA = 0.7


# Textbook integrals of two densities, in numpy; nothing of f_family.
def _mean(p, q):
    return (p + q) / 2


def _kl(p, q):
    return p * np.log(p / q)


TEXTBOOK = {
    "kl": _kl,
    "forward_kl": lambda p, q: _kl(q, p),
    "jeffreys": lambda p, q: (p - q) * np.log(p / q),
    "jensen_shannon": lambda p, q: (_kl(p, _mean(p, q)) + _kl(q, _mean(p, q))) / 2,
    "hellinger": lambda p, q: (np.sqrt(p) - np.sqrt(q)) ** 2,
    "pearson": lambda p, q: (p - q) ** 2 / q,
    "neyman": lambda p, q: (p - q) ** 2 / p,
    "softened_kl": lambda p, q: 2 * _kl(_mean(p, q), q),
    "softened_forward": lambda p, q: 2 * _kl(_mean(p, q), p),
    "softened_chi2": lambda p, q: (p - q) ** 2 / (p + q),
}
MEANS, SHARES = np.array([-0.8, 0.1, 1.1]), np.array([0.2, 0.5, 0.3])  # p, of points
CENTRES, STDS = np.array([-0.5, 0.9]), np.array([0.3, 0.4])  # q
X = np.linspace(-14, 14, 4001)
CELL = X[1] - X[0]


def gaussians(centres, variance, shares):
    density = np.exp(-((X[:, None] - centres) ** 2) / (2 * variance)) / np.sqrt(2 * math.pi * variance)
    return (density * shares).sum(1)


def divergence(name, means, sigma=SIGMA):
    p = gaussians(means, sigma**2, SHARES)
    return TEXTBOOK[name](p, gaussians(CENTRES, sigma**2 + STDS**2, np.full(2, 0.5))).sum() * CELL


def ours():
    """p's means, r, y and the shares of p's components at X, by toy's mixtures."""
    column = lambda values: torch.tensor(values)[:, None]
    p = Mixture(column(MEANS), torch.zeros(3), torch.tensor(SHARES))
    q = Mixture(column(CENTRES), torch.tensor(STDS), torch.ones(2))
    x = column(X)
    r = (p.log_density(x, SIGMA) - q.log_density(x, SIGMA)).exp()
    y = (p.score(x, SIGMA) - q.score(x, SIGMA))[:, 0]
    each = np.exp(-((X[:, None] - MEANS) ** 2) / (2 * SIGMA**2)) / math.sqrt(2 * math.pi) / SIGMA * SHARES
    return r, y, torch.tensor(each) * CELL


def test_the_rows_are_the_textbook_s():
    assert set(ROWS) == set(TEXTBOOK)
    r, _, each = ours()
    q = each.sum(1) / r
    for name, row in ROWS.items():
        assert (q * row.f(r)).sum().item() == pytest.approx(divergence(name, MEANS), rel=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_line_1_against_finite_differences_of_the_textbook(name):
    r, y, each = ours()
    h = 1e-3  # fourth order
    for k, direction in enumerate(np.eye(3)):
        at = lambda step, d=direction: divergence(name, MEANS + step * h * d)
        truth = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
        assert (each[:, k] * ROWS[name].h(r) * y).sum().item() == pytest.approx(truth, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("name", ROWS)
def test_line_3_against_the_slope_in_sigma_of_the_textbook(name):
    r, y, each = ours()
    h = 1e-3
    at = lambda step: divergence(name, MEANS, SIGMA + step * h)
    slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    fisher = (each.sum(1) * ROWS[name].h(r) * y**2).sum().item()
    assert -SIGMA * fisher == pytest.approx(slope, rel=1e-8)


def test_a_row_holds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f_divergences, "ROWS", {"forward_kl": ROWS["forward_kl"]})
        assert f_divergences.worst_of([f_divergences.check(0)])["forward_kl"]["ok"]


@pytest.mark.slow
def test_the_lines_hold_and_what_is_published(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(f_divergences, "ROWS", {k: ROWS[k] for k in ("kl", "jensen_shannon", "neyman")})
        rows = f_divergences.worst_of([f_divergences.check(3)])  # a seed of heavy tails
    assert all(row["ok"] for row in rows.values()), rows
    checks, off = f_divergences.check_neighbours(3)
    assert len(checks) == 11 and all(error < limit for _, error, limit in checks), checks
    assert off > 0.01


@pytest.mark.parametrize(
    "wrong", [lambda r: 1 / r**2, lambda r: 1.001 / r, lambda r: 1 / (r + 1e-3), torch.ones_like, lambda r: r]
)
def test_a_wrong_h_is_noticed(wrong, monkeypatch):
    monkeypatch.setattr(f_divergences, "NODES", 60)
    monkeypatch.setattr(f_divergences, "ROWS", {"forward_kl": ROWS["forward_kl"]._replace(h=wrong)})
    row = f_divergences.check(0)["forward_kl"]
    assert min(row["f'', h"], row["(1)"], row["(3)"]) > 1e-6  # (2) is true of any h


def test_a_wrong_slope_is_noticed(monkeypatch):
    monkeypatch.setattr(f_divergences, "NODES", 60)
    monkeypatch.setattr(f_divergences, "ROWS", {"pearson": ROWS["pearson"]})
    assert f_divergences.check(0)["pearson"]["(2)"] < 1e-4
    monkeypatch.setattr(f_family.Divergence, "slope", lambda self, r: 1.01 * 2 * self.h(r))
    assert f_divergences.check(0)["pearson"]["(2)"] > 1e-4


def test_the_sign_of_f_and_a_missing_factor_are_noticed(monkeypatch):
    monkeypatch.setattr(f_divergences, "NODES", 60)
    for f in (lambda r: r.log(), lambda r: -2 * r.log(), lambda r: -r.log() + 1e-6 * r**2):
        row = ROWS["forward_kl"]._replace(f=f)
        monkeypatch.setattr(f_divergences, "ROWS", {"forward_kl": row})
        errors = f_divergences.check(0)["forward_kl"]
        assert errors["f'', h"] > 1e-9 and errors["(1)"] > 1e-9 and errors["(3)"] > 1e-9


def test_f_distill_s_weights_follow_from_its_own_f():
    """There D_f(q, p) = E_p f(rho), rho = q / p, and the weight is rho^2 f''(rho)."""
    their_f = {
        "rkl": lambda x: -x.log(),
        "kl": lambda x: x * x.log(),
        "jf": lambda x: (x - 1) * x.log(),
        "js": lambda x: x * x.log() - (1 + x) * ((1 + x) / 2).log(),
        "sh": lambda x: 2 * (x.sqrt() - 1) ** 2,
        "neyman": lambda x: (x - 1) ** 2 / (2 * x),
        "sf": lambda x: (1 + x) * ((1 + x) / (2 * x)).log(),
    }
    assert set(their_f) == set(F_DISTILL)
    rho = torch.logspace(-1.5, 1.5, 31, dtype=torch.float64, requires_grad=True)
    for name, (weight, row, factor) in F_DISTILL.items():
        (first,) = torch.autograd.grad(their_f[name](rho).sum(), rho, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), rho)
        assert torch.allclose(rho**2 * second, weight(rho).double(), rtol=1e-10)
        assert torch.allclose(their_f[name](rho) / rho, factor * ROWS[row].f(1 / rho) * 1.0, rtol=1e-10)


def quick(monkeypatch, steps=3):
    kept = {k: ROWS[k] for k in ("kl", "forward_kl")}
    scenes = {key: scene._replace(steps=steps) for key, scene in f_ring.SCENES.items()}
    monkeypatch.setattr(f_ring, "SCENES", scenes)
    for module in (f_divergences, f_ring):
        monkeypatch.setattr(module, "ROWS", kept)


def test_kl_seeks_and_its_reverse_covers():
    target = f_ring.ring()
    found = {}
    for name in ("kl", "forward_kl"):
        points = f_ring.settle(ROWS[name], f_ring.SCENES["few"], 0, target)
        found[name] = f_ring.judge(points, f_ring.SCENES["few"], target, 0)
    assert found["kl"]["high_quality"] == 1 and found["forward_kl"]["high_quality"] <= 0.25
    assert found["forward_kl"]["energy"] < found["kl"]["energy"] / 4


def test_the_grid_s_step_is_the_sampler_s_mean():
    """Of the same points: the pull of (1) from many samples, within its standard error."""
    scene, target = f_ring.SCENES["few"], f_ring.ring()
    points = torch.tensor([[1.0, 0.2], [0.3, 0.8], [-0.9, 0.1], [0.1, -1.2]], dtype=torch.float64)
    pulls = {}
    for draws in (0, 100_000):
        x, share = f_ring.shares(scene._replace(draws=draws), points, torch.Generator().manual_seed(0))
        p = f_ring.sample_law(points)
        y = p.score(x, scene.sigma) - target.score(x, scene.sigma)
        pulls[draws] = share.T @ y
        assert share.sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(pulls[0], pulls[100_000], atol=0.05 * pulls[0].abs().max().item())


def test_where_neyman_has_no_value():
    target = f_ring.ring()
    scenes = {key: f_ring.finite("neyman", scene, target) for key, scene in f_ring.SCENES.items()}
    assert scenes == {"few": True, "missing": False, "sampled": False}
    assert f_ring.finite("kl", f_ring.SCENES["missing"], target)


def test_the_command(monkeypatch, tmp_path, capsys):
    quick(monkeypatch)
    monkeypatch.setattr(f_divergences, "check_neighbours", lambda seed: ([("a check", 0.0, 1.0)], 0.3))
    argv = ["--quick", "--out", str(tmp_path / "new"), "--json", str(tmp_path / "f.json")]
    assert f_divergences.main(argv) == 0
    out = capsys.readouterr().out
    assert "Every row holds" in out and out.count("holds") == 4 and "of the 8 modes at first" in out
    assert 5_000 < (tmp_path / "new/f_divergences.png").stat().st_size < 200_000
    content = json.loads((tmp_path / "f.json").read_text())
    assert (
        content["ok"]
        and len(content["ring"]) == 6
        and set(content["f_divergences"]["rows"]) == set(f_ring.ROWS)
    )
    monkeypatch.setattr(f_divergences, "check_neighbours", lambda seed: ([("a check", 2.0, 1.0)], 0.3))
    assert f_divergences.main(argv) == 1 and "FAILS" in capsys.readouterr().out


def test_bad_arguments(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for args in (
        ["--json", str(tmp_path / "file")],
        ["--out", str(tmp_path / "file")],
        ["--json", str(tmp_path)],
    ):
        assert f_divergences.main(args) == 2 and capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
