"""Who may know whom, and how far it is from a command line to the loss."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BESIDE = ["config", "device"]  # of edm, lowest first; each may know those before it
SHARED = ("files", "folder", "command")  # of toy, which edm uses
ROOMS = ["images", "training", "text", "quality"]  # likewise, above these
# Commands and the course, as in pyproject.toml; what others import has type hints.
UNTYPED = """benchmark check_teacher checkpoints compare_digits distill distill_pixart evaluate
example_teacher preference_study prompts sample sample_pixart train_teacher classroom compare_2d exercises
explore marking mistakes sim_in_one_page solutions test_bed"""
FILES = [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("edm/**/*.py")]


def name_of(path):
    """edm/text/prompts.py -> ("edm", "text", "prompts")"""
    return path.relative_to(ROOT).with_suffix("").parts


def known_to(path):
    """The modules of this project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        inside = [f"{node.module}."] if isinstance(node, ast.ImportFrom) else [""]
        for name in (prefix + name for prefix in inside for name in names):
            parts = tuple(name.split("."))
            while parts and not (ROOT.joinpath(*parts).with_suffix(".py")).exists():
                parts = parts[:-1]
            if parts:
                yield parts


def rank(name):
    """Whoever imports must stand higher: sim_core 0, then edm's files, rooms, algorithm2 and commands."""
    if name == ("sim_core",):
        return 0
    if name[0] != "edm":
        return 1 if name[0] == "toy" else 2  # verify_identity uses the test bed of toy
    if len(name) == 3:
        return len(BESIDE) + 2 + ROOMS.index(name[1])
    return BESIDE.index(name[1]) + 2 if name[1] in BESIDE else 20 + (name[1] != "algorithm2")


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(name_of(path)))
def test_imports_go_down(path):
    mine = name_of(path)
    for other in known_to(path):
        assert mine[0] != "toy" or other[0] != "edm", f"{mine} imports {other}"
        assert mine[0] != "edm" or other[0] != "toy" or other[1] in SHARED, f"{mine} imports {other}"
        same_room = (len(mine) == len(other) == 3 and mine[1] == other[1]) or mine[0] == other[0] == "toy"
        commands = rank(mine) == rank(other) == 21
        assert rank(other) < rank(mine) or same_room or commands, (
            f"{'.'.join(mine)} imports {'.'.join(other)}"
        )


def test_rooms_are_no_commands():
    for path in ROOT.glob("edm/*/*.py"):
        assert "__main__" not in path.read_text(), path
    for path in ROOT.glob("edm/*.py"):
        if path.stem not in ("__init__", "algorithm2", "example_teacher", *BESIDE):
            assert '__name__ == "__main__"' in path.read_text(), path


def public(nodes):
    """Functions that others may call, and how their objects are made."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name == "__init__"):
            yield node
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield from public(node.body)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(name_of(path)))
def test_arguments_have_hints(path):
    """Where results have them (ruff's ANN201 with its exceptions): all but those whose default says it."""
    if len(name_of(path)) < 3 and path.stem in UNTYPED.split():  # no room
        return
    for function in public(ast.parse(path.read_text("utf-8")).body):
        given = function.args
        named = [*given.posonlyargs, *given.args][: -len(given.defaults) or None]
        named += [a for a, default in zip(given.kwonlyargs, given.kw_defaults) if default is None]
        bare = [a.arg for a in named if not a.annotation and a.arg not in ("self", "cls")]
        assert not bare, f"line {function.lineno}: {bare}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(name_of(path)))
def test_text_files_are_utf_8(path):
    """The linter sees only those of which it knows that they are a Path's."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
            given = [*node.args, *(word.value for word in node.keywords)]
            assert any(getattr(one, "value", "") == "utf-8" for one in given), f"line {node.lineno}"
