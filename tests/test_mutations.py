"""Break the program on purpose, one line at a time, and see its tests fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import CORE, IMAGE_PARTS, IMAGE_RUNS, IMAGES, PLANE, PLANE_PARTS, TEXT

ROOT = Path(__file__).parents[1]


OF_PARTS = (
    "test_latents or test_heun or test_generator or preconditioning or test_labels or dropout or pinned"
)
OF_TEXT = "moves_its_own or accumulation or algorithm_2 or captions_are or promises or bf16 or test_guidance"
SUITES = {  # the tests that must notice: what breaks
    "test_core.py": CORE,
    "test_steps_2d.py": PLANE,
    "test_toy.py": PLANE_PARTS,
    "test_steps_images.py": IMAGES,
    "test_distill.py -k promises or is_trained or average or log_has or chosen": IMAGE_RUNS,
    f"test_networks.py test_sample.py -k {OF_PARTS}": IMAGE_PARTS,
    f"test_distill_pixart.py test_pixart.py -k {OF_TEXT}": TEXT,
}

# Imports cost more than most of these tests: one process does them, and a fork of it runs each test.
FORKS = """
import importlib, os, signal, sys
for name in sys.argv[1].split():
    try:
        importlib.import_module(name)
    except ImportError:  # edm/requirements.txt is not installed
        pass
import pytest
from hypothesis import Phase, settings
settings.register_profile("no shrinking", phases=[Phase.generate])
settings.load_profile("no shrinking")
for line in sys.stdin:
    if not (child := os.fork()):
        folder, tests = line.rstrip().split(" ", 1)
        files, _, names = tests.partition(" -k ")
        os.chdir(folder)
        sys.path.insert(0, folder)
        signal.alarm(300)
        out = os.open("out", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        code = pytest.main(["-n", "0", "-x", "-p", "no:cacheprovider", "-k", names, *files.split()])
        sys.stdout.flush(), os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
HEAVY = """numpy torch torch._dynamo torch.distributed.fsdp torch.distributed.checkpoint.state_dict hypothesis
tqdm matplotlib.pyplot PIL.Image scipy.linalg sklearn.datasets accelerate safetensors.torch torchmetrics
diffusers.models.autoencoders.autoencoder_kl diffusers.models.transformers.pixart_transformer_2d
transformers.models.t5.modeling_t5"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(tests, file, old, new) -> exit code and output of the tests where old is new in that file."""
    command = [sys.executable, "-c", FORKS, HEAVY]
    forks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(tests, file="sim_core.py", old="", new=""):
        source = (ROOT / file).read_text()
        assert old in source, "the line has changed: update the mutation"
        folder = tmp_path_factory.mktemp("copy")
        for path in (
            *ROOT.glob("*.py"),
            *ROOT.glob("*/*.py"),
            *ROOT.glob("*/*/*.py"),
            ROOT / "pyproject.toml",
            ROOT / "README.md",
        ):
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
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


def pytest_generate_tests(metafunc):
    suites = metafunc.cls.suites
    if "name" in metafunc.fixturenames:
        broken = [(tests, name) for tests in suites for name in SUITES[tests]]
        metafunc.parametrize(
            "tests, name", broken, ids=[f"{tests.split()[0]}: {name}" for tests, name in broken]
        )
    else:
        metafunc.parametrize("tests", suites)
