"""verify_identity.py: that it passes, that it can fail, and what it writes."""

import json
import sys

import pytest
import torch

import sim_core as sim
import verify_identity as verify
from toy.test_bed import noise_grid


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "not/there/yet"
    assert verify.main(["--quick", "--json", str(folder / "v.json"), "--out", str(folder)]) == 0
    assert (folder / "verify_identity.png").stat().st_size > 10_000
    return json.loads((folder / "v.json").read_text())


def test_smooth_distances_hold_to_machine_precision(report):
    for name in ("l2", "power", "exp", "pseudo_huber"):
        row = report["distances"][name]
        assert max(row[c] for c in verify.RIGHT) < 1e-12


def test_kinks_and_jumps(report):
    huber, l1 = report["distances"]["huber"], report["distances"]["l1"]
    assert max(huber[c] for c in verify.RIGHT) < 1e-3
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
    for space in sim.SPACES:
        assert verify.full_error(bed, distance, space, 200) < 1e-8


def test_the_full_gradient_is_more_than_the_stopped_one():
    bed, l2 = verify.TestBed(1), sim.SquaredL2()
    stopped, full = (bed.gradient(bed.objective(l2, "score", law_moves), 60) for law_moves in (False, True))
    assert verify.relative(stopped, full) > 0.05
    half = bed.gradient(bed.on_triple(lambda *triple: sim.sid_loss(*triple, alpha=0.5)), 60)
    assert verify.relative(2 * half, full) < 1e-9


@pytest.mark.parametrize("name", ["sim_loss", "full_loss"])
def test_a_wrong_core_is_caught(name, monkeypatch, tmp_path, capsys):
    right = getattr(sim, name)
    monkeypatch.setattr(sim, name, lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    monkeypatch.setattr(verify, "ROWS", {"l2": (sim.SquaredL2(), 60, 1e-6)})
    monkeypatch.setattr(verify, "convergence", lambda *args: {})
    assert verify.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_bad_arguments(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for args in (
        ["--seed", "x"],
        ["--threads", "-1"],
        ["--seed", "-1"],
        ["--json", str(tmp_path)],
        ["--json", str(tmp_path / "file")],
        ["--json", str(tmp_path / "file/v.json")],
        ["--out", str(tmp_path / "file")],
    ):
        with pytest.raises(SystemExit) as error:
            sys.exit(verify.main(args))
        assert error.value.code == 2 and "error" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_noise_grid_integrates_moments():
    points, weight = noise_grid(60, 2)
    assert weight.sum().item() == pytest.approx(1, abs=1e-14)
    assert (weight @ points.square()).tolist() == pytest.approx([1, 1], abs=1e-13)
    assert (weight @ points.prod(1)).abs() < 1e-14 and points.dtype == torch.float64


# --- what the appendix leaves unsaid: the space of d, what a derivative holds, where gradients vanish ---

LEVELS = (0.4, 2.0)


def surrogate(bed, distance, space, level):
    """The gradient of sim_core's surrogate at one noise level."""
    fake = bed.law(bed.net(bed.z).detach()).denoiser

    def integrand(x0, noise, sigma, means):
        sigma = torch.full_like(sigma, level)
        return sim.generator_loss(bed.teacher.denoiser, fake, x0, sigma, noise, distance, space)

    return bed.gradient(integrand, 40)


@pytest.mark.parametrize("s", LEVELS)
def test_algorithm_2s_space_is_a_weight_for_powers_and_moves_the_bend_of_pseudo_huber(s):
    bed, d = verify.TestBed(0), sim.DISTANCES
    bend = d["pseudo_huber"](c=0.3), d["pseudo_huber"](c=0.3 / s**2), 2
    for denoised, score, power in ((d["l2"](),) * 2 + (4,), (d["power"](),) * 2 + (8,), bend):
        expected = s**power * surrogate(bed, score, "score", s)
        assert verify.relative(surrogate(bed, denoised, "denoised", s), expected) < 1e-12


@pytest.mark.parametrize("name", ["pseudo_huber", "huber", "exp"])
def test_where_d_bends_no_weights_of_the_levels_turn_one_space_into_the_other(name):
    bed, d = verify.TestBed(0), sim.DISTANCES[name]()
    denoised = sum(surrogate(bed, d, "denoised", s) for s in LEVELS)
    score = torch.stack([surrogate(bed, d, "score", s) for s in LEVELS], 1)
    best = score @ torch.linalg.lstsq(score, denoised[:, None]).solution[:, 0]
    assert verify.relative(best, denoised) > 0.02
    assert torch.cosine_similarity(score.sum(1), denoised, dim=0) < 0.9, "and with none they are far apart"


def test_the_conditional_scores_gradient_vanishes_at_fixed_noise_alone():
    bed, sigma = verify.TestBed(0), torch.full((6,), 0.7, dtype=torch.float64)
    x0, (noise, w) = bed.net(bed.z), torch.randn(2, 6, 2, dtype=torch.float64)
    xt, parameters = sim.add_noise(x0, sigma, noise), list(bed.net.parameters())
    gradient = lambda s: verify.flat(torch.autograd.grad((w * s).sum(), parameters, retain_graph=True))
    assert torch.allclose(sim.conditional_score(xt, x0, sigma), -noise / 0.7)
    expected = gradient(x0 / 0.7**2)
    assert gradient(sim.conditional_score(xt, x0, sigma)).norm() < 1e-12 * expected.norm()
    assert verify.relative(gradient(sim.conditional_score(xt.detach(), x0, sigma)), expected) < 1e-12


def test_where_the_scores_agree_the_gradient_is_0_if_that_of_d_is():
    class Tilted(sim.DISTANCES["l2"]):
        def grad(self, y):
            return super().grad(y) + 1

    bed = verify.TestBed(0)
    bed.teacher = bed.law(bed.net(bed.z).detach())
    tilted = surrogate(bed, Tilted(), "score", 0.7).norm()
    for distance in sim.DISTANCES.values():
        assert surrogate(bed, distance(), "score", 0.7).norm() < 1e-12 * tilted
