"""The method on one page: its parts against sim_core and toy/, and the page run where nothing else is."""

import ast
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from PIL import Image

import sim_core as sim
from toy.mixtures import make_target

PATH = Path(__file__).parents[1] / "toy/sim_in_one_page.py"
TEXT = PATH.read_text(encoding="utf-8")
SAID = r"([\d.]+)% within 3 std of a mode, (\d) of 8 modes; picture: (.+)\n"


def load():
    """The page, imported: its functions, nothing trained."""
    spec = spec_from_file_location("one_page", PATH)
    page = module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


PAGE = load()


def with_steps(teacher, steps):
    """The page with smaller numbers at its top, changed as a reader would."""
    usual = "TEACHER_STEPS, STEPS, BATCH = 1500, 3000, 256"
    assert TEXT.count(usual) == 1
    return TEXT.replace(usual, f"TEACHER_STEPS, STEPS, BATCH = {teacher}, {steps}, 256")


def run(code, folder):
    """From standard input, in an empty folder, and blind to this repository."""
    done = subprocess.run(
        [sys.executable, "-I", "-"], input=code, cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    share, modes, picture = re.fullmatch(SAID, done.stdout).groups()
    assert Path(picture) == folder / "sim_in_one_page.png" and [*folder.iterdir()] == [Path(picture)]
    assert min(Image.open(picture).size) > 300
    return float(share), int(modes)


def test_it_is_one_page_of_its_own():
    assert len(TEXT.splitlines()) <= 80
    tree = ast.parse(TEXT)
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", "matplotlib"}


def test_its_lines_name_the_equations():
    named = set(re.findall(r"\(([AB]\.\d+)\)", TEXT))
    assert named == {"A.4", *(f"B.{i}" for i in (2, 3, 4, 5, 6, 7, 9, 12))}
    assert all(
        words in TEXT for words in ("Algorithm 2, L(psi)", "Algorithm 2, L(theta)", "Table 4", "Table 5")
    )


def test_its_surrogate_is_sim_core_s_with_all_gradients():
    rng = torch.Generator().manual_seed(0)
    found, expected = (
        [
            torch.randn(64, 2, generator=rng.manual_seed(i), dtype=torch.float64).requires_grad_()
            for i in range(3)
        ]
        for _ in range(2)
    )
    mine, theirs = PAGE.surrogate(*found), sim.sim_loss(*expected, sim.PseudoHuber(c=PAGE.C))
    assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-13, atol=1e-14)
    mine.sum().backward()
    theirs.sum().backward()
    for a, b in zip(found, expected):  # d'(y) and the residual both live, down to x0
        assert b.grad.abs().max() > 0.1 and torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-13)


def test_both_updates_are_sim_core_s():
    """Of networks, from the same draws: parameter gradients of psi's and of theta's loss."""
    torch.manual_seed(0)
    psi, teacher, theta = (PAGE.Denoiser() for _ in range(3))
    x0 = PAGE.draw_data(32)
    parameters = [*psi.parameters(), *theta.parameters()]
    flat = lambda denoiser: lambda xt, sigma: denoiser(xt, sigma[:, None])

    torch.manual_seed(1)
    mine = PAGE.denoising_loss(psi, x0)
    torch.manual_seed(1)
    sigma, noise = PAGE.draw_sigma(32)[:, 0], torch.randn(32, 2)
    weight = sim.edm_weight(sigma, PAGE.SIGMA_DATA)
    theirs = sim.fake_loss(flat(psi), x0, sigma, noise, weight).mean()
    assert same_gradients(mine, theirs, parameters)

    torch.manual_seed(2)
    z = torch.randn(32, 2)
    torch.manual_seed(2)
    x0 = PAGE.generate(theta, 32)
    start = torch.full((32, 1), PAGE.SIGMA_INIT)
    assert torch.equal(x0, theta(PAGE.SIGMA_INIT * z, start))
    xt = x0 + sigma[:, None] * noise
    mine = PAGE.surrogate(psi(xt, sigma[:, None]), teacher(xt, sigma[:, None]), x0).mean()
    theirs = sim.generator_loss(flat(teacher), flat(psi), x0, sigma, noise, sim.PseudoHuber(c=PAGE.C)).mean()
    assert same_gradients(mine, theirs, parameters)


def same_gradients(mine, theirs, parameters):
    both = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (mine, theirs)]
    a, b = (torch.cat([g.flatten() for g in grads if g is not None]) for grads in both)
    return torch.allclose(mine, theirs, rtol=1e-5) and (a - b).norm() < 1e-5 * b.norm() and b.norm() > 0.01


def test_its_data_levels_and_network_are_those_of_the_plane():
    ring = make_target("ring")
    assert torch.allclose(PAGE.MODES, ring.means, atol=1e-6) and torch.allclose(
        ring.stds, torch.tensor(PAGE.STD)
    )
    assert pytest.approx(ring.data_std(), abs=0.005) == PAGE.SIGMA_DATA
    torch.manual_seed(0)
    log = PAGE.draw_sigma(100_000).log()
    assert log.mean().item() == pytest.approx(-1.2, abs=0.02) and log.std().item() == pytest.approx(
        1.2, abs=0.02
    )
    network, xt, sigma = PAGE.Denoiser(), torch.randn(9, 2), torch.rand(9, 1) + 0.1
    with torch.no_grad():  # F = 0 is the best linear denoiser, and c_out D's error at small sigma
        for p in network.last.parameters():
            p.zero_()
        linear = xt * PAGE.SIGMA_DATA**2 / (PAGE.SIGMA_DATA**2 + sigma**2)
        assert torch.allclose(network(xt, sigma), linear, atol=1e-6)
        network.last.bias.fill_(1.0)
        c_out = sigma * PAGE.SIGMA_DATA / (PAGE.SIGMA_DATA**2 + sigma**2).sqrt()
        assert torch.allclose(network(xt, sigma), linear + c_out, atol=1e-6)


def test_a_mover_ends_at_rest():
    torch.manual_seed(0)
    network = PAGE.Denoiser()
    move, x0 = PAGE.mover(network, 1e-3, 3), PAGE.draw_data(16)
    weights = []
    for _ in range(5):
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        move(PAGE.denoising_loss(network, x0))
    steps = [(b - a).abs().max().item() for a, b in zip(weights, weights[1:])]
    assert steps[0] == pytest.approx(1e-3, rel=0.01) and steps[2] > 0 == steps[3]


def test_it_runs_from_an_empty_folder_with_few_steps(tmp_path):
    share, _ = run(with_steps(3, 3), tmp_path)
    assert share < 50


@pytest.mark.slow
def test_pasted_into_a_notebook_it_shows_its_picture(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(with_steps(3, 3))])
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = notebook.cells[0].outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert re.fullmatch(SAID, "".join(o.text for o in outputs if o.output_type == "stream"))


@pytest.mark.slow
def test_it_ends_on_the_ring(tmp_path):
    share, modes = run(TEXT, tmp_path)
    assert share >= 90 and modes == 8
