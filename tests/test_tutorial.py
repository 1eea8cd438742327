"""The notebook: as committed, and executed in a fresh kernel with every hidden solution (slow)."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from toy import classroom, plots

ROOT = Path(__file__).parents[1]
PATH, EXERCISES = ROOT / "toy/tutorial.ipynb", ROOT / "toy/exercises.ipynb"
CELLS, AT_HOME = (json.loads(path.read_text(encoding="utf-8"))["cells"] for path in (PATH, EXERCISES))
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
PROJECT = [
    ROOT / "sim_core.py",
    ROOT / "verify_identity.py",
    *ROOT.glob("toy/*.py"),
    *ROOT.glob("edm/**/*.py"),
]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


def source(cell):
    return "".join(cell["source"])


def solutions(text):
    """The code of a Markdown cell's hidden solutions."""
    hidden = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", text, re.S)
    return [block for part in hidden for block in re.findall(r"```python\n(.*?)```", part, re.S)]


def printed(outputs):
    return "".join("".join(output.get("text", "")) for output in outputs)


# --- as committed --------------------------------------------------------------------------------


def test_every_cell_was_run_once_and_in_order():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_no_cell_failed_or_complained():
    assert len(OUTPUTS) > 20
    assert not [o for o in OUTPUTS if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_it_is_small_and_has_its_figures():
    assert PATH.stat().st_size < 900_000
    images = [o["data"]["image/png"] for o in OUTPUTS if "image/png" in o.get("data", {})]
    assert len(images) >= 12 and max(map(len, images)) < 200_000


def test_nothing_in_it_belongs_to_one_machine_or_one_moment():
    shown = printed(OUTPUTS) + "".join(
        "".join(o["data"].get("text/plain", "")) for o in OUTPUTS if "data" in o
    )
    assert not re.search(r"(^|[\s'\"(=])/\w+/\w", shown) and str(ROOT) not in PATH.read_text()
    assert all(cell["metadata"] == {} for cell in CELLS)
    about = json.loads(PATH.read_text())["metadata"]
    assert about["kernelspec"]["name"] == "python3" and "version" not in about.get("language_info", {})


def names_defined(tree):
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_no_cell_defines_what_the_project_has():
    modules = [
        path for path in PROJECT if path.relative_to(ROOT).parts[0] != "edm"
    ]  # it calls those by their command line
    project = set().union(*(names_defined(ast.parse(path.read_text())) for path in modules))
    cells = set().union(*(names_defined(ast.parse(source(cell))) for cell in CODE))
    assert cells and not cells & project


def test_no_cell_repeats_the_projects_lines():
    def triples(text):
        lines = [
            line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")
        ]
        lines = [line for line in lines if not line.startswith(("import ", "from "))]
        return {t for t in zip(lines, lines[1:], lines[2:]) if sum(map(len, t)) > 60}

    project = set().union(*(triples(path.read_text()) for path in PROJECT))
    for cell in CODE:
        assert not triples(source(cell)) & project


def test_ten_parts_and_every_exercise_has_a_solution():
    parts = re.split(r"^## (?=\d+\. )", "\n".join(TEXT), flags=re.M)[1:]
    assert [part.split(".")[0] for part in parts] == [str(i) for i in range(1, 11)]
    exercises = re.findall(r"\*\*Exercise (\d+)\.\*\*", "\n".join(TEXT))
    assert exercises == [str(i) for i in range(1, len(exercises) + 1)] and len(exercises) >= 8
    assert sum(len(solutions(text)) for text in TEXT) == len(exercises)


def test_the_parts_minutes_are_two_hours():
    minutes = [int(m) for m in re.findall(r"^\| \d+ \| .+ \| (\d+) \|$", TEXT[0], re.M)]
    assert len(minutes) == 10 and sum(minutes) == 120


def test_most_cells_that_compute_assert():
    assert sum("assert" in source(cell) for cell in CODE) >= 15


def test_the_files_it_names_exist():
    named = set(re.findall(r"`(?:python )?((?:toy|edm)/[\w.]+|\w+\.py)", "\n".join(TEXT)))
    assert len(named) >= 4 and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("cell", CODE, ids=lambda cell: cell["id"])
def test_a_cell_fits_a_screen_and_has_no_scaffolding(cell):
    assert len(source(cell).splitlines()) < 25
    assert not re.search(r"mock|redirect|StringIO|subprocess|environ|contextlib|_ = ", source(cell))
    assert "sys.path" not in source(cell) or cell is CODE[0]


def test_a_share_in_the_text_says_where_it_is_from():
    """README, with which page it is, or this run: then cells print it."""
    shown = printed(OUTPUTS)
    for paragraph in "\n\n".join(TEXT).split("\n\n"):
        shares = re.findall(r"[\d.]+(?: to [\d.]+)? %", paragraph)
        assert not shares or "README" in paragraph or "this run" in paragraph, paragraph
    assert shown.count("cosine") and "this run" in "".join(TEXT)


def first_cell(folder):
    """The notebook's first cell and an import, as run in a folder."""
    program = source(CODE[0]) + "\nimport sim_core, toy.plots; print(ROOT)"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean, timeout=120)


@pytest.mark.parametrize("folder", [".", "toy"])
def test_the_first_cell_finds_the_project(folder):
    done = first_cell(ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT


def test_the_first_cell_finds_a_project_that_was_put_beside_it(tmp_path):
    (tmp_path / "sample_data").mkdir()
    (tmp_path / "unpacked").symlink_to(ROOT)
    done = first_cell(tmp_path)
    assert done.returncode == 0 and Path(done.stdout.strip()) == tmp_path / "unpacked", done.stderr


def test_alone_the_first_cell_says_in_one_line_what_to_fetch(tmp_path):
    done = first_cell(tmp_path)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "git clone" in done.stderr and "run this cell again" in done.stderr


def test_both_notebooks_have_the_same_first_cell():
    code = [cell for cell in AT_HOME if cell["cell_type"] == "code"]
    assert source(code[0]) == source(CODE[0])


def test_without_the_requirements_of_edm_the_last_part_says_so(capsys, monkeypatch):
    cell = next(source(cell) for cell in CODE if "images_are_ready" in source(cell))
    monkeypatch.setattr(classroom, "find_spec", lambda name: None)
    exec(cell, {"classroom": classroom})
    assert capsys.readouterr().out.startswith("Skipped: this part needs pip install -r edm/requirements.txt")


def test_a_command_of_edm_that_fails_fails_loudly(tmp_path):
    with pytest.raises(RuntimeError, match="--no-such-option"):
        classroom.digits_command(tmp_path, "distill.py", "--no-such-option")


# --- what it draws with ----------------------------------------------------------------------------


def test_sample_panels_show_every_sample_on_the_data():
    panels = {f"panel {i}": torch.full((30, 2), 0.1 * i) for i in range(5)}
    figure = plots.sample_panels(panels, torch.zeros(70, 2), columns=3)
    used, empty = figure.axes[:5], figure.axes[5:]
    assert [ax.get_title(loc="left") for ax in used] == list(panels) and len(empty) == 1
    for ax, points in zip(used, panels.values()):
        data, samples = (torch.tensor(c.get_offsets()) for c in ax.collections)
        assert len(data) == 70 and torch.allclose(samples, points.double(), atol=1e-6)
        assert ax.get_xlim() == ax.get_ylim() == (-plots.LIMIT, plots.LIMIT)
    assert not empty[0].axison


def test_png_is_a_small_picture_of_the_figure():
    figure = plots.Figure(figsize=(4, 2))
    figure.subplots().plot([0, 1], [0, 1], color=plots.ORANGE, lw=9)
    with Image.open(BytesIO(plots.png(figure, dpi=50, colours=16))) as image:
        assert image.format == "PNG" and image.size == (200, 100) and 2 <= len(image.getcolors()) <= 16
        orange = [
            abs(r - 232) + abs(g - 112) + abs(b - 42) for _, (r, g, b) in image.convert("RGB").getcolors()
        ]
    assert min(orange) < 40


# --- in a fresh kernel ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed():
    reason = "executing the notebook needs pip install nbclient ipykernel"
    nbformat = pytest.importorskip("nbformat", reason=reason)
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    notebook = nbformat.read(PATH, as_version=4)
    cells = []
    for cell in notebook.cells:  # what a student does: run it, and try each solution where it stands
        cells.append(cell)
        if cell.cell_type == "markdown":
            cells += [nbformat.v4.new_code_cell(code) for code in solutions(cell.source)]
    notebook.cells = cells
    where = {"metadata": {"path": str(ROOT / "toy")}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return notebook  # an assertion that fails has raised by now


@pytest.mark.slow
def test_every_assertion_and_every_solution_holds(executed):
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert len(code) == len(CODE) + sum(len(solutions(text)) for text in TEXT)
    assert all(cell.execution_count for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]


@pytest.mark.slow
def test_solutions_say_what_their_text_says(executed):
    said = {cell.source: printed(cell.outputs) for cell in executed.cells if cell.cell_type == "code"}

    def numbers(key):
        text = next(text for code, text in said.items() if key in code)
        return [float(x) for x in re.findall(r"tensor\((-?[\d.e+-]+)", text)]

    wrong, square = numbers("sim.score_projection(w - s, w, conditional)")
    assert wrong == pytest.approx(square, rel=0.05) and square > 0.01
    nothing, something = numbers("bed.misprint(l2)")
    assert nothing < 1e-10 < something
    far, near = numbers("sim.PseudoHuber(c=1e4)")
    assert far < 1e-6 and near == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_the_digits_ran_wherever_they_can(executed):
    last = printed([o for cell in executed.cells if cell.cell_type == "code" for o in cell.outputs])
    needed = ("accelerate", "PIL", "safetensors", "torchmetrics", "sklearn")
    assert ("Frechet distance of 256 samples" if all(map(find_spec, needed)) else "Skipped:") in last
