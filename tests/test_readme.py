"""The README: its commands are real, its paths exist, its defaults are the code's."""

import ast
import csv
import re
import shlex
import statistics
from pathlib import Path

import pytest

from edm.study_report import final
from toy import compare_2d
from toy.config import Config, check, parse_args, resolve
from toy.study_report import cell, summarise

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = README.split("## Results")[1].split("\n## ")[0]
# options of toy/train_2d.py, as the tables of results give them
OPTIONS = sorted(set(re.findall(r"^\| `(--[^`]+)`", RESULTS, re.M)))


@pytest.mark.parametrize("name", ["run", "test", "verify", "images", "text"])
def test_ci_runs_the_readmes_own_commands(name):
    assert re.search(rf"<!-- ci: {name} -->\n```bash\n(.+\n)+```", README)
    assert f"follow {name}\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_commands_of_the_results_are_valid(options):
    check(resolve(*parse_args("", shlex.split(options))))


COMMANDS = re.findall(r"python toy/(train_2d|compare_2d)\.py((?: +(?:--[\w-]+|\$?[\w.-]+))*)", README)


@pytest.mark.parametrize("script, words", COMMANDS)
def test_the_commands_of_the_page_are_valid(script, words):
    argv = words.replace("$c", "1").split()
    if script == "train_2d" and "--help" not in argv:
        check(resolve(*parse_args("", argv)))
    elif script == "compare_2d":
        compare_2d.plan(compare_2d.parse_args(argv))


def test_there_are_commands():
    assert {"train_2d", "compare_2d"} == {script for script, _ in COMMANDS} and len(COMMANDS) > 10


def test_there_are_results():
    assert len(OPTIONS) > 10


def test_paths_exist():
    paths = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(
        r"`((?:toy|edm|tests)/[\w.]*|\w+\.py)`", README
    )
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_knobs_tables_defaults_are_the_codes():
    rows = re.findall(r"^\| `--([\w-]+)` \|[^|]*\| `?([\w.]+)`? \|", README, re.M)
    assert len(rows) >= 9
    for name, default in rows:
        value = getattr(Config(), name.replace("-", "_"))
        value = 0.1 if name == "c" else value  # sim_core's
        assert str(value) == default or float(default) == value, name


def test_every_deviation_of_the_paper_is_listed():
    section = README.split("departs from the paper")[1].split("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", section, re.M) == [str(i) for i in range(1, 18)]


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README and "TODO" not in README


TABLE = README.split("## From the paper to the code")[1].split("\n## ")[0]
SEEDS = re.findall(r"^\| (.+) \| .+ \| `(.+)` \| \[`([\w./]+)`\]\(([\w/.]+)#L(\d+)\) \|$", TABLE, re.M)


@pytest.mark.parametrize("paper, code, name, path, line", SEEDS)
def test_each_seed_of_the_method_is_at_its_line(paper, code, name, path, line):
    lines = (ROOT / path).read_text().splitlines()
    found = [i for i, text in enumerate(lines, 1) if code in text]
    assert int(line) in found, f"{paper}: `{code}` is now at {path}#L{found}"
    if name != path:
        parts = [n for n in ast.walk(ast.parse("\n".join(lines))) if getattr(n, "name", None) == name]
        assert any(part.lineno <= int(line) <= part.end_lineno for part in parts), f"{paper}: not in {name}"


def test_the_seeds_are_all_of_the_appendix():
    named = " ".join(paper for paper, *_ in SEEDS)
    assert set(re.findall(r"\(([AB]\.\d+)\)", named)) == {
        *(f"A.{i}" for i in range(1, 6)),
        *(f"B.{i}" for i in range(1, 15)),
    }
    tables = (f"Table 4, row {i}" for i in range(1, 7))
    assert all(other in named for other in ("Algorithm 2", "Listing 1", "Table 5", "Figure 2", *tables))
    assert len(SEEDS) == TABLE.count("\n|") - 2  # all rows but the heading's two


def table_rows(section):
    """{first cell: the others} of the rows of a section's tables."""
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    ]
    return {name: cells for name, *cells in rows}


def records(path):
    """A committed study.csv: numbers as numbers."""
    words = ("arm", "target", "status", "error")
    with open(ROOT / path, newline="") as file:
        return [
            {k: v if k in words else float(v or "nan") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def test_the_study_in_the_plane_is_quoted_as_it_was_measured():
    found = summarise(records("toy/gallery/study.csv"))
    quoted = table_rows(README.split("<!-- the study in the plane -->")[1].split("<!-- end -->")[0])
    targets = quoted["arm"]
    assert {arm for arm, _ in found} == set(compare_2d.ARMS) and all(s["runs"] == 3 for s in found.values())
    for (arm, target), numbers in found.items():
        sharp = numbers["high_quality"][0]
        expected = f"{cell('{:.3g}', numbers['energy_over_floor'])}, {sharp:.0%}"
        assert quoted[arm][targets.index(target)] == expected, (arm, target)


def test_the_study_on_digits_is_quoted_as_it_was_measured():
    found = final(records("edm/gallery/study.csv"))
    quoted = table_rows(README.split("<!-- the study on digits -->")[1].split("<!-- end -->")[0])
    for arm, scores in found.items():
        each = ", ".join(f"{value:.2f}" for value in scores["fd"])
        medians = [f"{statistics.median(scores[name]):.2f}" for name in ("fd", "precision", "recall")]
        assert quoted[arm][:4] == [each, *medians], arm


def test_every_picture_has_its_command():
    section = README.split("## Gallery")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:toy|edm)/gallery/[\w.-]+)`", section))
    kept = {str(p.relative_to(ROOT)) for part in ("toy", "edm") for p in (ROOT / part / "gallery").iterdir()}
    assert named == kept
