"""Break the program on purpose, one line at a time, and see its tests fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import IMAGE_PARTS, IMAGE_RUNS, IMAGES, PLANE, PLANE_PARTS, TEXT

ROOT = Path(__file__).parents[1]

MUTATIONS = {  # what is broken: (line of sim_core.py, its replacement)
    "surrogate: sign flipped": (
        "return -_dot(distance.grad(fake - teacher), fake - target)",
        "return _dot(distance.grad(fake - teacher), fake - target)",
    ),
    "surrogate: u detached": (
        "return -_dot(distance.grad(fake - teacher), fake - target)",
        "return -_dot(distance.grad((fake - teacher).detach()), fake - target)",
    ),
    "surrogate: residual detached": (
        "return -_dot(distance.grad(fake - teacher), fake - target)",
        "return -_dot(distance.grad(fake - teacher), (fake - target).detach())",
    ),
    "surrogate: teacher and fake swapped": ("distance.grad(fake - teacher)", "distance.grad(teacher - fake)"),
    "surrogate: residual against the teacher": (
        "fake - teacher), fake - target)",
        "fake - teacher), teacher - target)",
    ),
    "l2: factor dropped": ("return 2 * y", "return y"),
    "power: factor dropped": ("return self.alpha * y ** (self.alpha - 1)", "return y ** (self.alpha - 1)"),
    "power: exponent off": ("return self.alpha * y ** (self.alpha - 1)", "return self.alpha * y**self.alpha"),
    "exp: beta dropped, as in Table 4": (
        "growth = self.beta * torch.exp(self.beta * super().value(y))",
        "growth = torch.exp(self.beta * super().value(y))",
    ),
    "l1: factor doubled": ("        return y.sign()", "        return 2 * y.sign()"),
    "huber: linear beyond delta": ("return y.clamp(-self.delta, self.delta)", "return y.clamp(-self.delta)"),
    "pseudo-huber: Table 4's factor 2": ("return y / _expand(self", "return 2 * y / _expand(self"),
    "pseudo-huber: root without c": ("_dot(y, y) + max(self.c**2, torch.finfo(y.dtype).tiny)", "_dot(y, y)"),
    "generator: networks swapped": (
        "loss(factor * d_fake, factor * d_teacher, factor * x0)",
        "loss(factor * d_teacher, factor * d_fake, factor * x0)",
    ),
    "generator: xt's gradient stopped": (
        "    xt = add_noise(x0, sigma, noise)\n    factor",
        "    xt = add_noise(x0, sigma, noise).detach()\n    factor",
    ),
    "generator: x0's gradient stopped": (
        "loss(factor * d_fake, factor * d_teacher, factor * x0)",
        "loss(factor * d_fake, factor * d_teacher, factor * x0.detach())",
    ),
    "generator: weight ignored": ("return _weighted(loss(factor", "return (lambda v, w: v)(loss(factor"),
    "spaces: score is one power off": ('"noise": 1, "score": 2', '"noise": 1, "score": 1'),
    "fake: gradient reaches the generator": ("    x0 = x0.detach()  # sg", "    x0 = x0  # sg"),
    "denoising: factor": ("_dot(denoised - x0, denoised - x0)", "_dot(denoised - x0, denoised)"),
    "density: without log q": ("return loss.detach() * log_q + loss", "return loss"),
    "density: log q's sign": ("log_q = -_dot", "log_q = _dot"),
    "tweedie: sigma not squared": ("/ _expand_sigma(sigma, xt) ** 2", "/ _expand_sigma(sigma, xt)"),
    "noise: added with the wrong sign": ("return x0 + _expand_sigma", "return x0 - _expand_sigma"),
    "sid: alpha's sign": ("teacher - target + alpha * y", "teacher - target - alpha * y"),
    "diff-instruct: y live": ("(fake - teacher).detach(), target)", "fake - teacher, target)"),
    "constants: p_SIM": ("mean=-3.5, std=2.5", "mean=-3.5, std=2.0"),
    "constants: Karras' share": ("t_max=0.8", "t_max=1.0"),
    "Karras: counted from the upper end": ("(1 - t) * (bottom", "t * (bottom"),
    "weights: w_SiD": ("** -2 / error", "** -1 / error"),
}


OF_PARTS = (
    "test_latents or test_heun or test_generator or preconditioning or test_labels or dropout or pinned"
)
OF_TEXT = "moves_its_own or accumulation or algorithm_2 or captions_are or promises or bf16 or test_guidance"
SUITES = {  # the tests that must notice: what breaks
    "test_core.py": {name: ("sim_core.py", *lines) for name, lines in MUTATIONS.items()},
    "test_steps_2d.py": PLANE,
    "test_toy.py": PLANE_PARTS,
    "test_steps_images.py": IMAGES,
    "test_distill.py -k promises or is_trained or average or log_has or chosen": IMAGE_RUNS,
    f"test_networks.py test_sample.py -k {OF_PARTS}": IMAGE_PARTS,
    f"test_distill_pixart.py test_pixart.py -k {OF_TEXT}": TEXT,
}
BROKEN = [(tests, name) for tests, mutations in SUITES.items() for name in mutations]


# Imports cost more than most of these tests: one process does them, and a fork of it runs each test.
FORKS = """
import importlib, os, signal, sys
for name in sys.argv[1].split():
    try:
        importlib.import_module(name)
    except ImportError:  # edm/requirements.txt is not installed
        pass
import pytest
for line in sys.stdin:
    if not (child := os.fork()):
        folder, tests = line.rstrip().split(" ", 1)
        files, _, names = tests.partition(" -k ")
        os.chdir(folder)
        sys.path.insert(0, folder)
        signal.alarm(120)
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
        for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
        (folder / file).write_text(source.replace(old, new) if old else source)
        files, _, names = tests.partition(" -k ")
        files = " ".join(f"tests/{name}" for name in files.split())
        print(folder, files, *(["-k", names] if names else []), file=forks.stdin, flush=True)
        return int(forks.stdout.readline()), (folder / "out").read_text()

    yield run
    forks.stdin.close()
    forks.wait()


@pytest.mark.slow
@pytest.mark.parametrize("tests", SUITES)
def test_the_program_as_it_is_passes(run, tests):
    code, out = run(tests)
    assert code == 0, out[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("tests, name", BROKEN)
def test_a_broken_program_is_caught(run, tests, name):
    code, out = run(tests, *SUITES[tests][name])
    assert code == 1 and "1 failed" in out, f"{name} went unnoticed:\n{out[-2000:]}"
