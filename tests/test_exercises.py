"""The exercises: right answers pass however written, wrong ones are told why; the notebook runs."""

import ast
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch

from toy import mistakes, oracles, solutions
from toy.classroom import own_target
from toy.exercises import EXERCISES, check
from toy.marking import Wrong, mark, off
from toy.solutions import pseudo_huber_gradient as unit

ROOT = Path(__file__).parents[1]
PATH = ROOT / "toy/exercises.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
HOLES = {ast.parse(code).body[0].name: code for code in SOURCES if code.startswith("def ")}
QUICK = [name for name in EXERCISES if not EXERCISES[name].last]


def marked(name, answer, *tools):
    """The mark of any function as the answer to an exercise, which must be one line."""

    def named(*given):
        return answer(*given)

    named.__name__ = name
    right, line = mark(EXERCISES, named, *tools)
    assert "\n" not in line and line.startswith(f"{name}: ") and right == line.startswith(f"{name}: right. ")
    return right, line.removeprefix(f"{name}: ")


# --- right answers


@pytest.mark.parametrize("name", QUICK)
def test_the_solution_is_right(name):
    right, line = marked(name, getattr(solutions, name))
    assert right, line


OTHERWISE = {  # the same numbers by other algebra
    "score_from_denoiser": [lambda D, xt, s: torch.einsum("bi,b->bi", D - xt, s**-2.0)],
    "conditional_score": [lambda xt, x0, s: -((xt - x0) / s.view(-1, 1)) / s.unsqueeze(1)],
    "projection_mean": [
        lambda u, score, x0, s, e: (
            torch.einsum("bi,bi->", u(x0 + s[:, None] * e), score(x0 + s[:, None] * e, s) + e / s[:, None])
            / len(x0)
        ),
        lambda *given: solutions.projection_mean(*given).item(),
    ],
    "exp_gradient": [lambda y, a, b: b * a * y**a / y * (b * y.norm(p=a, dim=1, keepdim=True) ** a).exp()],
    "pseudo_huber_gradient": [lambda y, c: y * (y.square().sum(-1, keepdim=True) + c * c).rsqrt()],
    "surrogate": [
        lambda g, f, q, x: (g(q - f) * (f - x)).sum(-1),  # d' is odd
        lambda g, f, q, x: -torch.linalg.vecdot(g(f - q), f - q + q - x),
    ],
    "as_printed": [lambda g, s, p, q, c: torch.linalg.vecdot(g(q - s), p - c)],
    "stopped_score": [lambda law, m, xt, s: law(m.clone().detach()).score(xt + 0.0, s)],
    "full_loss": [lambda d, g, f, q, x: d(f - q) - (g(f - q) * (f - x)).sum(1)],
    "sid_alphas": [lambda: [torch.tensor(1.0), 1 / 2]],
    "draw_sigma": [
        lambda n, m, s, rng: torch.empty(n, dtype=torch.float64).log_normal_(m, s, generator=rng),
        lambda n, m, s, rng: torch.normal(m, s, (n,), generator=rng).exp(),
    ],
    "edm_weight": [lambda s, d: 1 / d**2 + 1 / s**2],
    "fake_loss": [
        lambda f, x, s, e, w: w * (f((x + s[:, None] * e).detach(), s) - x.detach()).norm(dim=1) ** 2
    ],
    "generator_loss": [
        lambda q, f, x, s, e, c: (
            unit(q(x + s[:, None] * e, s) - f(x + s[:, None] * e, s), c) * (f(x + s[:, None] * e, s) - x)
        ).sum(1)
    ],
}


@pytest.mark.parametrize("name, i", [(name, i) for name, ways in OTHERWISE.items() for i in range(len(ways))])
def test_a_right_answer_written_otherwise_is_right(name, i):
    right, line = marked(name, OTHERWISE[name][i])
    assert right, line


# --- wrong answers

KNOWN = [(name, words) for name, exercise in EXERCISES.items() for words in exercise.mistakes]


@pytest.mark.parametrize("name, words", KNOWN)
def test_every_known_mistake_gets_its_own_words(name, words):
    right, line = marked(name, EXERCISES[name].mistakes[words])
    assert not right and (line == f"not yet: {words}" or line.endswith(f" not: {words}")), line


def no_grad(function):
    return lambda *given: function(*(g.detach() if torch.is_tensor(g) else g for g in given))


def drifting(n, m, s, rng):
    return (m + s * torch.randn(n)).exp()


SOLVED = {name: getattr(solutions, name) for name in QUICK}
A_READERS = [  # as somebody would write them, who has not seen the list of mistakes
    ("score_from_denoiser", lambda D, xt, s: (D - xt) / s**2, "raises RuntimeError.*sigma\\[:, None\\]"),
    ("score_from_denoiser", lambda D, xt, s: 2 * (D - xt) / s[:, None] ** 2, "it is 2 times the right one"),
    ("score_from_denoiser", lambda D, xt, s: ((D - xt) / s[:, None] ** 2).float(), "returns torch.float32"),
    (
        "score_from_denoiser",
        lambda D, xt, s: -(D - xt),
        "two things: the sign is flipped; and it is not divided",
    ),
    ("score_from_denoiser", lambda D, xt, s: ((D - xt) / s[:, None] ** 2).tolist(), "returns a list"),
    ("score_from_denoiser", lambda D, xt, s: (D - xt) / (0 * s[:, None]), "not finite"),
    (
        "score_from_denoiser",
        lambda D, xt, s: (D - xt) / s[:, None] ** 3,
        "no mistake that is known here.*value by",
    ),
    ("score_from_denoiser", lambda D, xt: D - xt, "raises TypeError"),
    ("score_from_denoiser", lambda D, xt, s: None, "returns None"),
    ("score_from_denoiser", lambda D, xt, s: ..., "returns Ellipsis: not filled in yet"),
    ("score_from_denoiser", lambda D, xt, s: [][1], "raises IndexError"),
    ("score_from_denoiser", lambda D, xt, s: D.mean(), "returns shape \\(\\)"),
    ("conditional_score", lambda xt, x0, s: -(x0 - xt) / s[:, None] ** 2, "sign is flipped"),
    ("projection_mean", lambda u, score, x0, s, e: (u(x0) * x0).sum(1), "returns shape"),
    (
        "exp_gradient",
        lambda y, a, b: a * torch.exp(b * (y**a).sum(1, True)) * y ** (a - 1),
        "beta is missing",
    ),
    ("pseudo_huber_gradient", lambda y, c: 2 * SOLVED["pseudo_huber_gradient"](y, c), "Table 4's factor 2"),
    (
        "pseudo_huber_gradient",
        lambda y, c: -4 * SOLVED["pseudo_huber_gradient"](y, c),
        "it is -4 times the right one",
    ),
    ("surrogate", lambda g, f, q, x: -(g(q - f) * (f - x)).sum(1), "sign is flipped"),
    ("surrogate", lambda g, f, q, x: -(g(f - q) * (f - x)).sum(1).mean(), "too much is summed"),
    ("surrogate", lambda g, f, q, x: -g(f - q) * (f - x), "a sum over coordinates, or a mean, is missing"),
    ("surrogate", lambda g, f, q, x: -2 * (g(f - q) * (f - x)).sum(1), "it is 2 times the right one"),
    (
        "surrogate",
        no_grad(SOLVED["surrogate"]),
        "the value is right, the gradient is not: all of it is detached",
    ),
    (
        "surrogate",
        lambda g, f, q, x: (g(f - q).detach() * (f - x)).sum(1),
        "two things: the sign.*d' is detached",
    ),
    ("full_loss", lambda d, g, f, q, x: SOLVED["full_loss"](d, g, f, q, x) + 1.0, "known here.*the value by"),
    ("sid_alphas", lambda: 1.0, "two numbers are wanted"),
    ("sid_alphas", lambda: (1.0, 0.75), "the first is right, the second is not: no mistake that is known"),
    ("draw_sigma", drifting, "rng is not used"),
    ("draw_sigma", lambda n, m, s, rng: [1.0] * n, "returns a list"),
    ("draw_sigma", lambda n, m, s, rng: torch.randn(n, 1, generator=rng).exp(), "returns shape"),
    ("draw_sigma", lambda n, m, s, rng: torch.randn(n, generator=rng).exp(), "no mistake that is known"),
    ("edm_weight", lambda s, d: (s**2 + d**2) / (s * d), "denominator is not squared"),
    ("fake_loss", lambda *given: SOLVED["fake_loss"](*given) / 2, "a factor 1/2, or a mean"),
    ("fake_loss", lambda f, x, s, e, w: w * (f(x + s[:, None] * e, s) - x).square().sum(1), "reaches theta"),
    (
        "generator_loss",
        lambda q, f, x, s, e, c: 3 * SOLVED["generator_loss"](q, f, x, s, e, c),
        "it is 3 times the right one",
    ),
]


@pytest.mark.parametrize("name, answer, words", A_READERS)
def test_a_readers_wrong_answer_is_told_why(name, answer, words):
    right, line = marked(name, answer)
    assert not right and re.search(words, line), line


def test_what_is_no_answer_is_told_too(capsys):
    for thing in (None, 3, print, lambda: 0, torch.zeros(2)):
        assert mark(EXERCISES, thing)[0] is False and "no exercise of this name" in mark(EXERCISES, thing)[1]
    check(None)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_open_hole_is_told_by_its_name():
    def pseudo_huber_gradient(y, c):
        raise NotImplementedError

    def generator_loss(teacher, fake, x0, sigma, noise, c):
        return pseudo_huber_gradient(x0, c)

    assert mark(EXERCISES, pseudo_huber_gradient)[1] == "pseudo_huber_gradient: not filled in yet"
    line = mark(EXERCISES, generator_loss)[1]
    assert line == "generator_loss: it needs pseudo_huber_gradient, which is not filled in yet"


@pytest.mark.parametrize(
    "name, where", [("projection_mean", (3, 4)), ("fake_loss", (2, 3)), ("generator_loss", (3, 4))]
)
def test_an_answer_that_writes_over_its_inputs_spoils_nothing(name, where):
    solution = getattr(solutions, name)

    def spoiling(*given):
        sound = solution(*(g.clone() if torch.is_tensor(g) else g for g in given))
        for i in where:
            given[i].mul_(math.nan)
        return sound

    for answer in (spoiling, spoiling, solution):
        assert marked(name, answer)[0]


def test_a_loop_without_end_ends():
    def endless(teacher, fake, generator, psi, theta, draw, steps):
        while True:
            draw()

    assert "does the loop end after `steps`?" in marked("distill", endless)[1]


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda: None, "pair"),
        (lambda: (torch.zeros(3), 0.1), "shape (3,)"),
        (lambda: (torch.randn(2, 5), 0.1), "shape (2, 5)"),
        (lambda: (torch.eye(2), 0.001), "std is 0.001"),
        (lambda: (torch.eye(2) * math.nan, 0.1), "finite"),
        (lambda: (torch.eye(2) + 3, 0.1), "away from 0"),
        (lambda: (torch.tensor([[-9.0, 0], [9.0, 0]]), 0.1), "standard deviation is 6.4"),
    ],
)
def test_a_target_that_does_not_fit_is_told(answer, words):
    right, line = marked("my_target", answer, solutions.distill)
    assert not right and words in line


def test_the_targets_of_the_solution_fits_and_needs_a_loop():
    assert own_target(solutions.my_target).data_std() == pytest.approx(0.54, abs=0.02)
    assert "check(my_target, distill)" in marked("my_target", solutions.my_target)[1]


# --- the oracles


def test_errors_are_relative_and_never_nan():
    one = torch.ones(4)
    assert off(1.5 * one, one) == 0.5 and off(one, 0 * one) == 2.0 and off(one * math.nan, one) == math.inf


@pytest.mark.parametrize("name", ["surrogate", "full_loss", "stopped_score", "generator_loss"])
def test_gradients_are_compared_with_the_objective_itself(name, monkeypatch):
    """With a broken formula in sim_core the oracle's gradient stays what it was: it does not use it."""
    before = EXERCISES[name].truth()["gradient"]
    monkeypatch.setattr(
        oracles.sim, "sim_loss", lambda fake, teacher, target, distance: (fake * target).sum(1)
    )
    monkeypatch.setattr(oracles.sim, "full_loss", oracles.sim.sim_loss)
    assert torch.equal(EXERCISES[name].truth()["gradient"], before) and before.norm() > 0.1


def test_a_wrong_shape_is_wrong_in_words():
    with pytest.raises(Wrong, match=r"shape \(3, 2\), \(3,\) is wanted"):
        oracles.wanted(torch.zeros(3, 2).double(), 3)


# --- the notebook


def test_holes_are_the_exercises_and_each_is_followed_by_its_check():
    assert list(HOLES) == list(EXERCISES) and len(HOLES) >= 12
    for name, hole in HOLES.items():
        following = SOURCES[SOURCES.index(hole) + 1]
        assert re.fullmatch(rf"check\({name}(, distill)?\)", following)


@pytest.mark.parametrize("name", HOLES)
def test_a_hole_says_what_is_wanted_and_its_solution_is_short(name):
    hole = ast.parse(HOLES[name]).body[0]
    solution = ast.parse(inspect.getsource(getattr(solutions, name))).body[0]
    assert ast.unparse(hole.args) == ast.unparse(solution.args)
    assert ast.get_docstring(hole) and ast.unparse(hole.body[1:]) == "raise NotImplementedError"
    first, last = solution.body[0].lineno, solution.body[-1].end_lineno
    assert 1 <= last - first + 1 <= 6


def test_the_notebook_is_not_executed_and_gives_nothing_away():
    text = PATH.read_text(encoding="utf-8")
    for cell in CELLS:
        assert cell["metadata"] == {} and (cell["cell_type"] == "markdown" or not cell["outputs"])
    assert not re.search(r"import (mistakes|solutions)|from toy.(mistakes|solutions)", text)
    lines = [
        line.strip() for name in HOLES for line in inspect.getsource(SOLVED.get(name, check)).splitlines()[1:]
    ]
    assert not [line for line in lines if len(line) > 25 and line in text]


def test_the_page_counts_the_mistakes():
    page = (ROOT / "toy/README.md").read_text(encoding="utf-8")
    assert f"as {len(KNOWN)} known mistakes are compared with it" in page


def test_marks_know_nothing_of_the_solutions():
    for name in ("marking", "oracles", "mistakes", "exercises", "classroom"):
        assert "import solutions" not in (ROOT / f"toy/{name}.py").read_text(encoding="utf-8")


def run(fill, folder):
    """The notebook, executed in a fresh kernel in a folder -> what each cell printed, by its source."""
    nbformat = pytest.importorskip(
        "nbformat", reason="executing the notebook needs pip install nbclient ipykernel"
    )
    nbclient = pytest.importorskip(
        "nbclient", reason="executing the notebook needs pip install nbclient ipykernel"
    )
    notebook = nbformat.read(PATH, as_version=4)
    for cell in notebook.cells:
        if fill and cell.source.startswith("def "):
            name = ast.parse(cell.source).body[0].name
            cell.source = inspect.getsource(getattr(solutions, name))
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {c.source: "".join(o.text for o in c.outputs if o.get("name") == "stdout") for c in cells}


def test_untouched_every_check_says_so_and_no_cell_fails():
    said = run(fill=False, folder=ROOT / "toy")
    lines = [text.strip() for code, text in said.items() if code.startswith("check(")]
    assert lines == [f"{name}: not filled in yet" for name in EXERCISES]


@pytest.mark.slow
def test_with_the_solutions_every_check_passes():
    said = run(fill=True, folder=ROOT)
    lines = [text.splitlines()[-1] for code, text in said.items() if code.startswith("check(")]
    assert [line.split(". ")[0] for line in lines] == [f"{name}: right" for name in EXERCISES]


@pytest.mark.slow
def test_a_loop_that_draws_otherwise_is_judged_by_its_samples():
    """One batch for both updates, or theta first: no mistakes, and other numbers after five steps."""

    def one_batch(teacher, fake, generator, psi, theta, draw, steps):
        for _ in range(steps):
            z, sigma, noise = draw()
            solutions.update(theta, mistakes.theta_loss(teacher, fake, generator(z), sigma, noise))
            solutions.update(psi, mistakes.psi_loss(fake, generator(z), sigma, noise))

    def hasty(teacher, fake, generator, psi, theta, draw, steps):
        one_batch(teacher, fake, generator, psi, theta, draw, steps // 60)

    right, line = marked("distill", one_batch)
    assert right and "8 of 8 modes" in line
    right, line = marked("distill", hasty)
    assert not right and "the samples are not on the target" in line
