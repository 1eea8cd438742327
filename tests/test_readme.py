"""The pages: their commands parse, their links lead where they say, their numbers are those of the files."""

import argparse
import ast
import csv
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from edm.quality.study_report import final
from tests.conftest import collect_ignore
from toy import compare_2d
from toy.config import Config, check, parse_args, resolve
from toy.study_report import cell, summarise

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "toy/README.md", "edm/README.md", "LOG.md", "CONTRIBUTING.md")
}
README, TOY, EDM = (PAGES[name] for name in ("README.md", "toy/README.md", "edm/README.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def section(page, title):
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_door_is_short_and_prose_has_short_lines():
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 20_000
    for page, text in PAGES.items():
        prose = FENCE.sub("", text).splitlines()
        assert [line for line in prose if len(line) > 120 and line[0] != "|"] == [], page
        assert "@@" not in text and "TODO" not in text


def anchors(text):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [  # (page, file, #anchor)
    (page, (ROOT / page).parent / path if path else ROOT / page, anchor)
    for page, text in PAGES.items()
    for path, anchor in re.findall(r"\]\((?!https://)([^)\s#]*)#?([^)\s]*)\)", FENCE.sub("", text))
]


def test_links_lead_somewhere():
    named = [
        (page, ROOT / path, "")
        for page, text in PAGES.items()
        for path in re.findall(r"`((?:toy|edm|tests)/[\w./]*)`", text)
    ]
    assert len(LINKS) > 100 and len(named) > 50
    for page, file, anchor in LINKS + named:
        assert file.exists(), (page, file)
        if anchor and not re.fullmatch(r"L\d+", anchor):  # lines have a test of their own
            assert anchor in anchors(file.read_text()), (page, file, anchor)


def names(node):
    """What a def, a class or an assignment names."""
    targets = getattr(node, "targets", ())
    return [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]


LINES = [
    (page, *found)
    for page, text in PAGES.items()
    for found in re.findall(r"(?:\| `([^`]+)` \| )?\[`([\w./]+)`\]\(([\w./]+\.py)#L(\d+)\)", text)
]


@pytest.mark.parametrize("page, code, name, path, line", LINES)
def test_each_line_of_the_method_is_where_its_link_says(page, code, name, path, line):
    source = ((ROOT / page).parent / path).read_text()
    found = [i for i, text in enumerate(source.splitlines(), 1) if code in text]
    assert int(line) in found, f"`{code}` is now at {path}#L{found}"
    if "." not in name:
        parts = [node for node in ast.walk(ast.parse(source)) if name in names(node)]
        assert any(part.lineno <= int(line) <= part.end_lineno for part in parts), f"not in {name}"


def test_the_lines_are_all_of_the_appendix():
    table = section(TOY, "From the paper to the code")
    rows = re.findall(r"^\| (.+?) \| .+ \| `.+` \| \[`.+\.py#L\d+\) \|$", table, re.M)
    assert len(rows) == table.count("\n|") - 2  # all but the heading's two
    named = " ".join(rows)
    equations = {f"A.{i}" for i in range(1, 6)} | {f"B.{i}" for i in range(1, 15)}
    assert set(re.findall(r"\(([AB]\.\d+)\)", named)) == equations
    tables = (f"Table 4, row {i}" for i in range(1, 7))
    assert all(other in named for other in ("Algorithm 2", "Listing 1", "Table 5", "Figure 2", *tables))


def commands():
    """(script, words) of every command, in fences and in the text."""
    found = set()
    for page, text in PAGES.items():
        text = text.replace("\\\n", " ")
        fenced = "\n".join(code for language, code in FENCE.findall(text) if language == "bash").splitlines()
        spans = re.findall(r"`((?:python|torchrun|(?:toy|edm)/\w+\.py) [^`…]+)`", FENCE.sub("", text))
        for line in fenced + spans:
            if command := re.search(r"\b((?:(?:toy|edm)/\w+|verify_identity)\.py)([^;#|&]*)", line):
                found.add((command[1], re.sub(r"\bS$|\$\w+", "1", command[2].strip())))
        if page in ("toy/README.md", "LOG.md"):  # their tables and lists give train_2d.py's options alone
            options = re.findall(r"^(?:\| |- \*\*)`(--[\w-]+ [^`]+)`", text, re.M)
            found |= {("toy/train_2d.py", words) for words in options}
    return sorted(found)


class Parsed(Exception):
    pass


@pytest.mark.parametrize("script, words", commands())
def test_commands_are_valid(script, words, monkeypatch):
    if script.startswith("edm/") and collect_ignore:
        pytest.skip("edm/requirements.txt is not installed")
    if script == "toy/sim_in_one_page.py":  # has no options
        assert not words
        return
    whole = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        whole(*args, **kwargs)
        raise Parsed

    words = shlex.split(words)
    with monkeypatch.context() as patch, pytest.raises(Parsed if "--help" not in words else SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [script, *words])
        patch.setattr(sys, "path", sys.path[:])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    if script == "toy/train_2d.py" and "--help" not in words:
        check(resolve(*parse_args("", words)))
    elif script == "toy/compare_2d.py":
        compare_2d.plan(compare_2d.parse_args(words))


def test_commands_are_found():
    scripts = {script for script, _ in commands()}
    public = {str(p.relative_to(ROOT)) for p in ROOT.glob("[te]*/*.py") if p.parent.name != "tests"}
    public = {name for name in public if "__main__" in (ROOT / name).read_text()} | {"verify_identity.py"}
    assert scripts == public and len(commands()) > 50


@pytest.mark.parametrize("name", ["run", "test", "verify", "images", "fashion", "text"])
def test_ci_runs_the_pages_own_commands(name):
    ci = (ROOT / ".ci/run").read_text()
    function = re.search(r"^readme\(\) .*?^\}", ci, re.M | re.S)[0]
    run = subprocess.run(
        ["bash", "-c", f"{function}\nreadme {name}"], cwd=ROOT, capture_output=True, text=True
    )
    block = re.search(rf"<!-- ci: {name} -->\n```bash\n(.+?)```", README + EDM, re.S)[1]
    assert run.stdout == block and f"follow {name}\n" in ci


def test_the_ladders_numbers_are_those_of_its_rooms():
    rows = [line.split(" | ") for line in section(README, "The ladder").splitlines() if line[:3] == "| ["]
    assert len(rows) == 6
    for first, *_, measured in rows:
        page, anchor = re.search(r"\((.+)#(.+)\)", first).groups()
        parts = re.split(r"^## (.+)\n", PAGES[page], flags=re.M)
        room = next(
            body for title, body in zip(parts[1::2], parts[2::2]) if anchors(f"# {title}") == {anchor}
        )
        missing = [n for n in re.findall(r"\d+\.\d+", measured) if n not in room]
        assert not missing and ("not run" in measured or re.search(r"\d\.\d", measured)), (first, missing)


def test_the_knobs_tables_defaults_are_the_codes():
    rows = re.findall(r"^\| `--([\w-]+)` \|[^|]*\| `?([\w.]+)`? \|", section(TOY, "Knobs"), re.M)
    assert len(rows) >= 9
    for name, default in rows:
        value = getattr(Config(), name.replace("-", "_"))
        value = 0.1 if name == "c" else value  # sim_core's
        assert str(value) == default or float(default) == value, name


def test_every_deviation_of_the_paper_is_listed():
    deviations = section(README, "Where the code departs from the paper's text")
    assert re.findall(r"^(\d+)\. ", deviations, re.M) == [str(i) for i in range(1, 19)]


def table_rows(page, mark):
    """{first cell: the others} of the rows of the tables that follow a mark."""
    lines = page.split(f"<!-- {mark} -->")[1].split("<!-- end -->")[0].splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {name: cells for name, *cells in rows}


def records(path):
    """A committed study.csv: numbers as numbers."""
    words = ("arm", "target", "status", "error")
    with open(ROOT / path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in words else float(v or "nan") for k, v in row.items()} for row in rows]


def test_the_study_in_the_plane_is_quoted_as_it_was_measured():
    found = summarise(records("toy/gallery/study.csv"))
    quoted = table_rows(TOY, "the study in the plane")
    targets = quoted["arm"]
    assert {arm for arm, _ in found} == set(compare_2d.ARMS) and all(s["runs"] == 3 for s in found.values())
    for (arm, target), numbers in found.items():
        sharp = numbers["high_quality"][0]
        expected = f"{cell('{:.3g}', numbers['energy_over_floor'])}, {sharp:.0%}"
        assert quoted[arm][targets.index(target)] == expected, (arm, target)


@pytest.mark.parametrize("file, mark", [
    ("study", "the study on digits"), ("study-b3", "the study of B.3"),
    ("study-start", "the study of sigma_init"), ("study-means", "the study of means"),
    ("study-means-text", "the study of means by caption"),
    ("study-start-text", "the study of sigma_init by caption"),
    ("study-widths", "the study of widths"),
    ("study-widths-text", "the study of widths by caption")])  # fmt: skip
def test_a_study_on_digits_is_quoted_as_it_was_measured(file, mark):
    found = final(records(f"edm/gallery/{file}.csv"))
    quoted = table_rows(EDM, mark)
    for arm, scores in found.items():
        each = ", ".join(f"{value:.2f}" for value in scores["fd"])
        medians = [f"{statistics.median(scores[name]):.2f}" for name in ("fd", "precision", "recall")]
        assert quoted[arm][:4] == [each, *medians], arm
        assert "follows" not in scores or quoted[arm][4] == f"{statistics.median(scores['follows']):.2f}"
    rows = records(f"edm/gallery/{file}.csv")
    at = lambda name, arm, step: statistics.median(
        r[name] for r in rows if (r["arm"], r["step"]) == (arm, step)
    )
    for arm in set(found) - {"teacher"}:
        text = "follows" in found[arm]  # whose column, compared above, comes first
        if file.startswith("study-start"):
            early = (134, 201, 268) if text else (100, 150, 200)
            assert quoted[arm][4 + text :] == [f"{at('fd', arm, step):.2f}" for step in early], arm
        if file.startswith(("study-means", "study-widths")):
            brighter = f"{statistics.median(found[arm]['brighter']):+.3f}"
            expected = [brighter] if text else [brighter, f"{at('change', arm, 200):.2f}"]
            assert quoted[arm][4 + text :] == expected, arm


def test_every_picture_is_shown_and_has_its_command():
    shown = {file.resolve() for _, file, _ in LINKS}
    for part, page in ("toy", TOY), ("edm", EDM):
        kept = {f"{part}/gallery/{p.name}" for p in (ROOT / part / "gallery").iterdir()}
        rows = "\n".join(re.findall(r"^\| .+ \| `python .+$", section(page, "Gallery"), re.M))
        assert set(re.findall(r"`((?:toy|edm)/gallery/[\w.-]+)`", rows)) == kept
        assert {ROOT / name for name in kept} <= shown
