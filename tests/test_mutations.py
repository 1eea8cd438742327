"""Break the mathematics on purpose, one line at a time, and see the tests of the core fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def run_core_tests(folder, source):
    for name in ("pyproject.toml", "tests/test_core.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "sim_core.py").write_text(source)
    command = [sys.executable, *"-m pytest -n 0 -x -p no:cacheprovider tests/test_core.py".split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_core_as_it_is_passes(tmp_path):
    assert run_core_tests(tmp_path, (ROOT / "sim_core.py").read_text()).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_core_is_caught(tmp_path, name):
    source, (old, new) = (ROOT / "sim_core.py").read_text(), MUTATIONS[name]
    assert old in source, "the line has changed: update the mutation"
    result = run_core_tests(tmp_path, source.replace(old, new))
    assert result.returncode == 1, f"{name} went unnoticed:\n{result.stdout[-2000:]}"
    assert "1 failed" in result.stdout, result.stdout[-2000:]
