"""verify_identity.py: that it passes, that it can fail, and what it writes."""

import json

import pytest
import torch

import sim_core as sim
import verify_identity as verify


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    assert verify.main(["--quick", "--json", str(folder / "v.json"), "--out", str(folder)]) == 0
    assert (folder / "verify_identity.png").stat().st_size > 10_000
    return json.loads((folder / "v.json").read_text())


def test_smooth_distances_hold_to_machine_precision(report):
    for name in ("l2", "power", "exp", "pseudo_huber"):
        row = report["distances"][name]
        assert max(row[c] for c in ("score", "noise", "denoised", "density")) < 1e-12


def test_kinks_and_jumps(report):
    huber, l1 = report["distances"]["huber"], report["distances"]["l1"]
    assert max(huber[c] for c in ("score", "noise", "denoised", "density")) < 1e-3
    assert l1["density"] < 5e-3 and 0.05 < l1["score"] < 1, "L1 under autograd is biased, and not by little"
    assert l1["score"] == pytest.approx(l1["detached"], abs=1e-9), "all that autograd sees of sign' is 0"


def test_wrong_variants_are_visibly_wrong(report):
    for row in report["distances"].values():
        assert row["detached"] > 0.01
    for name in ("l2", "power", "exp", "pseudo_huber"):
        row = report["distances"][name]
        assert row["flipped"] == pytest.approx(2, abs=1e-9) and row["misprint"] == pytest.approx(1, abs=1e-9)


def test_checks_and_convergence(report):
    assert len(report["checks"]) == 7 and all(c["error"] < c["tolerance"] for c in report["checks"].values())
    errors = report["convergence"]["pseudo_huber"]
    assert errors[0] > 1e3 * errors[-1], "spectral convergence shows"
    assert 0.01 < report["full_gradient"]["relative_difference"] < 2 and report["full_gradient"]["cosine"] < 1


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)])
def test_monte_carlo_errors_shrink(shape):
    mc = verify.check_monte_carlo(1, shape, batches=30, batch=500)
    assert abs(mc["mean"] - 1) < 4 * mc["standard_error"] and mc["errors"][-1] < 0.5 * mc["errors"][0]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_the_identity_at_other_seeds_and_noise_levels(monkeypatch, seed, sigma):
    monkeypatch.setattr(verify, "SIGMA", sigma)
    bed, distance = verify.TestBed(seed), sim.PseudoHuber(1.0)
    truth = bed.gradient(bed.objective(distance, "score"), 200)
    assert verify.relative(bed.gradient(bed.surrogate(distance), 200), truth) < 1e-8


def test_a_wrong_core_is_caught(monkeypatch, tmp_path, capsys):
    right = sim.sim_loss
    monkeypatch.setattr(
        sim,
        "sim_loss",
        lambda fake, teacher, target, distance: right(fake, teacher, target, distance) * 1.001,
    )
    assert verify.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_bad_arguments(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for args in (
        ["--seed", "x"],
        ["--json", str(tmp_path / "file/v.json")],
        ["--out", str(tmp_path / "file")],
    ):
        with pytest.raises(SystemExit) as error:
            verify.main(args)
        assert error.value.code == 2 and "error" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_noise_grid_integrates_moments():
    points, weight = verify.noise_grid(60, 2)
    assert weight.sum().item() == pytest.approx(1, abs=1e-14)
    assert (weight @ points.square()).tolist() == pytest.approx([1, 1], abs=1e-13)
    assert (weight @ points.prod(1)).abs() < 1e-14 and points.dtype == torch.float64
