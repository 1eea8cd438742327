"""Break the program on purpose, one line at a time, and see its tests fail."""

import compileall
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.mutants import CORE, IMAGE_PARTS, IMAGE_RUNS, IMAGES, PLANE, PLANE_PARTS, TEXT

ROOT = Path(__file__).parents[1]


OF_PARTS = (
    "test_latents or test_heun or test_generator or preconditioning or test_labels or dropout or pinned"
)
OF_RUNS = "promises or is_trained or average or log_has or chosen"
OF_TEXT = (
    "moves_its_own or accumulation or algorithm_2 or captions_are or promises or bf16 or test_guidance"
    " or of_a_gaussian or of_its_training"
)
SUITES = {  # the tests that must notice: what breaks
    "test_core.py test_core_numbers.py": CORE,
    "test_steps_2d.py": PLANE,
    "test_toy.py": PLANE_PARTS,
    "test_steps_images.py": IMAGES,
    f"test_distill.py test_distill_runs.py -k {OF_RUNS}": IMAGE_RUNS,
    f"test_networks.py test_sample.py -k {OF_PARTS}": IMAGE_PARTS,
    f"test_distill_pixart.py test_pixart.py test_flow.py -k {OF_TEXT}": TEXT,
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder of the program and its tests, compiled."""
    folder = tmp_path_factory.mktemp("copy")
    files = [path for part in ("toy", "edm", "tests") for path in (ROOT / part).rglob("*.py")]
    for path in (*files, *ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / path.relative_to(ROOT))
    compileall.compile_dir(folder, quiet=1)
    return folder


@pytest.fixture(scope="module")
def run(copy, tmp_path_factory):
    """run(tests, file, old, new) -> exit code and output of the tests where old is new in that file."""
    command = [sys.executable, ROOT / "tests/forks.py"]
    forks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(tests, file="sim_core.py", old="", new=""):
        source = (ROOT / file).read_text()
        assert old in source, "the line has changed: update the mutation"
        folder = tmp_path_factory.mktemp("broken") / "it"
        shutil.copytree(copy, folder, copy_function=os.link)
        (folder / file).unlink()
        (folder / file).write_text(source.replace(old, new) if old else source)
        files, _, names = tests.partition(" -k ")
        files = " ".join(f"tests/{name}" for name in files.split())
        print(folder, files, *(["-k", names] if names else []), file=forks.stdin, flush=True)
        return int(forks.stdout.readline()), (folder / "out").read_text()

    yield run
    forks.stdin.close()
    forks.wait()


class Broken:
    def test_the_program_as_it_is_passes(self, run, tests):
        code, out = run(tests)
        assert code == 0, out[-2000:]

    def test_a_broken_program_is_caught(self, run, tests, name):
        code, out = run(tests, *SUITES[tests][name])
        assert code == 1 and "1 failed" in out, f"{name} went unnoticed:\n{out[-2000:]}"


@pytest.mark.slow
class TestTheCoreAndThePlane(Broken):  # a class to a worker
    suites = tuple(tests for tests in SUITES if SUITES[tests] in (CORE, PLANE, PLANE_PARTS))


@pytest.mark.slow
class TestImagesAndText(Broken):
    suites = tuple(tests for tests in SUITES if tests not in TestTheCoreAndThePlane.suites)


def drawn(name, file, config):
    """Whether it is its turn: one in eight, others after every change of the file that it breaks."""
    return config.getoption("--thorough") or not zlib.crc32(name.encode() + (ROOT / file).read_bytes()) % 8


def test_every_line_to_break_stands_once():
    for name, (file, old, new) in (
        (name, found) for suite in SUITES.values() for name, found in suite.items()
    ):
        assert (ROOT / file).read_text().count(old) == 1 and old != new, f"{file}: {name}"


def pytest_generate_tests(metafunc):
    if metafunc.cls is None:
        return
    all_ = [(tests, name, SUITES[tests][name][0]) for tests in metafunc.cls.suites for name in SUITES[tests]]
    broken = [(tests, name) for tests, name, file in all_ if drawn(name, file, metafunc.config)]
    if "name" in metafunc.fixturenames:
        ids = [f"{tests.split()[0]}: {name}" for tests, name in broken]
        metafunc.parametrize("tests, name", broken, ids=ids)
    else:
        metafunc.parametrize("tests", dict.fromkeys(tests for tests, _ in broken))
