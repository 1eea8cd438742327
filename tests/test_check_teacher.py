"""Teachers in closed form, wired rightly and wrongly: right ones pass, wrong ones are named."""

import math
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from edm import check_teacher
from edm.images import checkpoints
from edm.images.networks import EDMPrecond
from edm.quality import checks, wiring

ROOT = Path(__file__).parents[1]
NOISE, VELOCITY, IMAGE, SCORE, V = list(wiring.OUTPUTS)[:5]
EDM = "EDM's F with sigma_data 0.5"
PLAIN, FLOW, VP, SCALED = wiring.tables(0.5)[1]
T, STEP = "t = sigma / (1 + sigma)", "the step in [0, 1]"
ROWS = {  # what a network predicts, is given and is told
    "noise": (NOISE, VP, STEP),
    "velocity": (VELOCITY, FLOW, T),
    "v": (V, VP, STEP),
    "image": (IMAGE, PLAIN, "sigma"),
    "score": (SCORE, PLAIN, "sigma"),
    "edm": (EDM, SCALED, "log(sigma) / 4"),
}
SHAPE = (1, 4, 4)
OUTPUTS, _ = wiring.tables(0.5)


# --- Data of a few Gaussians, the exact denoiser, and exact networks of every kind.
@cache
def gaussians(std=0.2):
    rng = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(5, math.prod(SHAPE), generator=rng, dtype=torch.float64)
    which = torch.randint(5, (1500,), generator=rng)
    x0 = means[which] + std * torch.randn(1500, len(means[0]), generator=rng, dtype=torch.float64)
    return means, which, x0.reshape(-1, *SHAPE).float()


def expand(values, x):
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def exact(x, sigma, classes=None, std=0.2):
    """E[x0 | xt], (B, *SHAPE), of all or of one Gaussian each."""
    means, s = gaussians()[0], sigma.double().reshape(-1, 1)
    flat, variance = x.double().flatten(1), std**2 + s**2
    which = (-(torch.cdist(flat, means) ** 2) / (2 * variance)).softmax(1) if classes is None else classes
    return ((std**2 * flat + s**2 * (which.double() @ means)) / variance).reshape(x.shape)


def network(output, given, told):
    """F(y, time) of these rows, of any time, also of one that it was never told: then of the nearest."""
    fine = torch.logspace(-6, 6, 12_001, dtype=torch.float64)
    steps, order = wiring.TIMES[told](fine).sort()

    def F(y, time):
        sigma = fine[order][torch.searchsorted(steps, time.double().contiguous()).clamp(max=len(fine) - 1)]
        x = y.double() / expand(wiring.terms(given, sigma)[0], y.double())
        p, q = (expand(v, x) for v in wiring.terms(OUTPUTS[output], sigma))
        return (exact(x, sigma) - p * x) / q

    return F


def wire(F, output, given, told):
    formula = (OUTPUTS | wiring.SLIPS)[output]

    def denoiser(xt, sigma):
        sigma, x = sigma.double(), xt.double()
        p, q = (expand(v, x) for v in wiring.terms(formula, sigma))
        time = wiring.TIMES[told] if isinstance(told, str) else told
        return (p * x + q * F(x * expand(wiring.terms(given, sigma)[0], x), time(sigma))).to(xt.dtype)

    return denoiser


def verdicts(denoiser, x0=None, seconds=math.inf, **more):
    x0 = gaussians()[2] if x0 is None else x0
    teacher = check_teacher.Teacher(denoiser, tuple(x0.shape[1:]), x0=x0, **more)
    check_teacher.verify(teacher)
    return {verdict.name: verdict for verdict in checks.check(teacher, 64, seconds)[0]}


def wrong(found):
    return {name: verdict.words for name, verdict in found.items() if verdict.state == "WRONG"}


# --- Right ones.
@pytest.mark.parametrize("kind", ROWS)
def test_right_teachers_pass(kind):
    found = verdicts(wire(network(*ROWS[kind]), *ROWS[kind]), sigma_data=0.5)
    assert not wrong(found) and found["sigma"].words.endswith("told 1 sigma")
    assert {n for n, v in found.items() if v.state == "not checked"} == {"labels", "guidance"}


def test_gaussian_data_of_which_the_linear_denoiser_is_best():
    x0 = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    right = lambda x, s: x / (1 + s[:, None] ** 2)
    assert not wrong(verdicts(right, x0)) and not wrong(verdicts(right, x0[:32]))


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_an_undertrained_teacher_passes(noise):
    """F off by a smooth error: a random linear map of what it is given."""
    rng = torch.Generator().manual_seed(3)
    A = noise * torch.randn(16, 16, generator=rng, dtype=torch.float64) / 4

    for kind in ("noise", "velocity", "edm"):
        F = network(*ROWS[kind])
        off = lambda y, time, F=F: F(y, time) + (y.flatten(1) @ A).reshape(y.shape)
        assert not wrong(verdicts(wire(off, *ROWS[kind]))), kind


# --- Wrong ones.
PAIRS = [(a, b) for a in ROWS for b in ROWS if a != b]


@pytest.mark.parametrize("predicted, read", PAIRS)
def test_what_is_predicted_and_what_it_is_read_as(predicted, read):
    output, given, told = ROWS[predicted]
    found = verdicts(wire(network(output, given, told), ROWS[read][0], given, told), None, 0, sigma_data=0.5)
    assert f"the network predicts {output} and is read as {ROWS[read][0]};" in found["wiring"].words
    assert found["wiring"].state == "WRONG" and found["sigma"].state == "not checked"


@pytest.mark.parametrize("slip", wiring.SLIPS)
def test_slips_of_the_formula(slip):
    kind = next(kind for kind in ("velocity", "noise", "score") if kind in slip)
    output, given, told = ROWS[kind]
    found = verdicts(wire(network(output, given, told), slip, given, told))
    assert f"predicts {output} and is read as {slip};" in wrong(found)["wiring"]


@pytest.mark.parametrize(
    "kind, given", [("noise", PLAIN), ("velocity", PLAIN), ("velocity", VP), ("edm", PLAIN)]
)
def test_a_scale_of_x_that_is_forgotten(kind, given):
    output, right, told = ROWS[kind]
    found = verdicts(wire(network(output, right, told), output, given, told), sigma_data=0.5)
    assert f"it is given {given} where it expects {right};" in wrong(found)["wiring"]


@pytest.mark.parametrize(
    "kind, told, words",
    [
        ("velocity", "1 - t", "its time runs backwards"),
        ("velocity", "sigma", f"tell it {T}"),
        pytest.param("velocity", "sigma^2", f"tell it {T}", marks=pytest.mark.slow),
        ("velocity", "1000 t", "[0, 1] where 0 to 1000 is expected, or the reverse"),
        ("noise", T, f"tell it {STEP}"),
        pytest.param("noise", "1 - the step in [0, 1]", "its time runs backwards", marks=pytest.mark.slow),
        ("velocity", lambda sigma: 0.5 + 0 * sigma, "a constant?"),
        ("velocity", lambda sigma: sigma / (1 + sigma) / 1000, "[0, 1] where 0 to 1000 is expected"),
        pytest.param("image", lambda sigma: sigma / 3, "tell it 3 sigma", marks=pytest.mark.slow),
    ],
)
def test_a_time_that_it_does_not_expect(kind, told, words):
    output, given, right = ROWS[kind]
    found = verdicts(wire(network(output, given, right), output, given, told))
    assert found["sigma"].state == "WRONG" and words in found["sigma"].advice
    assert found["wiring"].state != "WRONG"


@pytest.mark.slow
def test_a_time_that_cannot_be_told():
    """log(sigma) / 4 is negative, and no sigma that it is told is."""
    output, given, _ = ROWS["edm"]
    found = verdicts(wire(network(*ROWS["edm"]), output, given, "sigma"), sigma_data=0.5)
    assert "nothing tried makes it right" in " ".join(wrong(found).values())


@pytest.mark.slow
def test_a_whole_convention_for_another():
    found = wrong(verdicts(wire(network(*ROWS["velocity"]), *ROWS["noise"])))
    assert f"predicts {VELOCITY} and is read as {NOISE}; it is given {VP} where" in found["wiring"]
    assert found["sigma"].startswith(f"it is told {STEP} where it expects {T};")


def test_a_small_gain_is_hedged():
    own = wiring.Wiring(torch.full((8,), 0.5))
    for gain, start in ((0.8, "perhaps: the network"), (0.7, "the network")):
        found = wiring.Wiring(gain * own.errors, (NOISE, V), time=("sigma", T), bound=gain * own.errors)
        for _, words, _ in checks.named(own, found, OUTPUTS):
            assert words.startswith(start) or words.startswith(start.replace("the network", "it is told"))


def test_a_mix_that_no_row_has():
    found = wrong(verdicts(lambda x, s: 2 * exact(x, s).float(), seconds=0))
    assert "and not D" in found["wiring"]


@pytest.mark.parametrize(
    "c, m, words",
    [(0.5, 0.5, "in [0, 1], the network's in [-1, 1]"),
     (127.5, 127.5, "in [0, 255], the network's in [-1, 1]"),
     (2, -1, "in [-1, 1], the network's in [0, 1]"), (1 / 0.18215, 0, "5.49 times as large")],
)  # fmt: skip
def test_data_in_other_units(c, m, words):
    x0 = c * gaussians()[2] + m
    right = wire(network(*ROWS["edm"]), *ROWS["edm"])
    found = verdicts(right, x0, sigma_data=0.5)
    assert words in wrong(found)["wiring"] and ("sigma_data" in wrong(found)) == (c > 2.5)


def right(x, sigma):
    return exact(x, sigma).to(x.dtype)


def thrown(x, sigma):
    raise TypeError("no such shape")


BREAKS = {  # name of the check, words: denoiser
    ("shape", "float16"): lambda x, s: right(x, s).half(),
    ("shape", "(3, 2, 4, 4) for (3, 1, 4, 4)"): lambda x, s: right(x, s).repeat(1, 2, 1, 1),
    ("shape", "NoneType"): lambda x, s: None,
    ("shape", "no such shape"): thrown,
    ("batch", "among others"): lambda x, s: right(x, s) - 0.3 * right(x, s).mean(0),
    ("batch", "differs from itself"): lambda x, s: right(x, s[:1].expand(len(x))),
    ("repeat", "two calls"): lambda x, s: torch.nn.functional.dropout(right(x, s), 0.1),
    ("finite", "not at 19.5"): lambda x, s: right(x, s) + 0 * (x.half() * expand(s, x).half() ** 3).float(),
    ("gradient", "none reaches x"): lambda x, s: right(x.detach(), s),
    ("gradient", "apart"): lambda x, s: x - (x - right(x, s)).detach(),
    ("gradient", "none"): lambda x, s: (right(x, s) * 1000).round() / 1000,
    ("gradient", "numpy"): lambda x, s: torch.from_numpy(right(x, s).numpy()),
    ("sigma -> 0", "D - x is"): lambda x, s: right(x, s) + (s < 0.01)[:, None, None, None].float(),
    ("sigma -> oo", "varies"): lambda x, s: torch.where((s > 50)[:, None, None, None], x, right(x, s)),
    ("error", "of the best linear"): lambda x, s: right(x, s).flip(2),
}


@pytest.mark.parametrize("name, words", BREAKS)
def test_what_else_goes_wrong(name, words):
    found = verdicts(BREAKS[name, words], seconds=0)
    assert words in wrong(found)[name] and (name == "error" or next(iter(wrong(found))) == name)
    assert len(wrong(found)) == 1 or name in ("error", "repeat", "sigma -> 0")


def test_a_sigma_data_of_other_data():
    assert list(wrong(verdicts(right, sigma_data=2.0))) == ["sigma_data"]


# --- Labels.
def conditional(x, sigma, labels, shift=0):
    return exact(x, sigma, labels.roll(shift, 1)).to(x.dtype)


@pytest.mark.parametrize(
    "denoiser, words",
    [(conditional, None), (partial(conditional, shift=1), "of their error"),
     (lambda x, sigma, labels: right(x, sigma), "by 0 of")],
)  # fmt: skip
def test_labels(denoiser, words):
    labels = torch.nn.functional.one_hot(gaussians()[1], 5).float()
    found = verdicts(denoiser, cond={"labels": labels}, seconds=0)
    assert (words is None and not wrong(found)) or words in wrong(found)["labels"]


# --- The command.
def call(tmp_path, *argv):
    return check_teacher.main([*map(str, argv), "--out", str(tmp_path / "check.png")])


def written(tmp_path, change=("", ""), name="mine.py"):
    text = (ROOT / "edm/example_teacher.py").read_text()
    assert change[0] in text
    (tmp_path / name).write_text(text.replace(*change))
    return tmp_path / name


def test_the_example_passes_twice_alike(tmp_path, capsys):
    outputs = []
    for _ in range(2):
        assert call(tmp_path, ROOT / "edm/example_teacher.py") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "WRONG" not in outputs[0]
    assert max(map(len, outputs[0].splitlines())) <= 110
    with Image.open(tmp_path / "check.png") as picture:
        assert picture.size == (770, 506) and len(picture.convert("RGB").getcolors(2**20)) > 50


def test_a_wrong_file_is_named_and_ends_with_1(tmp_path, capsys):
    right = "xt / (1 + s) - t * network"
    assert call(tmp_path, written(tmp_path, (right, "xt - s * network"))) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"WRONG wiring the network predicts {VELOCITY} and is read as {NOISE}" in out
    assert "-> D = (x - sigma * F) / (1 + sigma)" in out and "wrote" in out


def test_without_data_what_is_possible(tmp_path, capsys):
    assert call(tmp_path, written(tmp_path, ("def data(", "def no_data("))) == 0
    out = capsys.readouterr().out
    assert out.count("not checked") == 6 and "needs data" in out and "wrote" not in out


def test_real_digits_and_a_file_of_ours(tmp_path, capsys):
    """An untrained U-Net denoises as well as a linear denoiser; the exact one of these digits is right."""
    torch.manual_seed(0)
    options = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=8, channel_mult=(1,))
    net = EDMPrecond(**options, num_blocks=1, attn_resolutions=())
    checkpoints.save(tmp_path / "t.safetensors", net)
    quick = ("--data", "digits", "--images", 8, "--seconds", 0.1)
    assert call(tmp_path, tmp_path / "t.safetensors", *quick) == 1
    out = capsys.readouterr().out
    assert "WRONG       labels      other ones change D by" in out
    (tmp_path / "oracle.py").write_text(ORACLE)
    assert call(tmp_path, tmp_path / "oracle.py", "--data", "digits", "--images", 16) == 0
    (tmp_path / "oracle.py").write_text(ORACLE.replace("return D", "return D / 2 + 0.5"))
    assert call(tmp_path, tmp_path / "oracle.py", *quick) == 1
    assert "and not D" in " ".join(capsys.readouterr().out.split())


ORACLE = """
import torch
from edm.images.data import load_images, to_network
shape, points = (1, 8, 8), to_network(load_images("digits").images).flatten(1)
def denoiser(xt, sigma):
    near = (-torch.cdist(xt.flatten(1), points) ** 2 / (2 * sigma[:, None] ** 2)).softmax(1)
    D = (near @ points).reshape(xt.shape)
    return D
"""


@pytest.mark.parametrize(
    "text, words",
    [
        ("shape = (1, 8", "SyntaxError"),
        ("shape = (1, 8, 8)", "needs a 'denoiser'"),
        ("def denoiser(xt, sigma): return xt", "needs a 'shape'"),
        ("shape, denoiser = (2,), 3", "TypeError: denoiser cannot be called"),
        ("import no_such_module", "no_such_module"),
        ("raise SystemExit(0)", "SystemExit"),
        ("shape, denoiser, sigma_min = (2,), print, -1", "must be positive"),
        ("shape, denoiser = (2,), print\ndef data(n): return 3", "8 samples at least"),
        (
            "import torch\nshape, denoiser = (2,), print\ndef data(n): return torch.ones(9, 2)",
            "all one number",
        ),
        ("shape, denoiser = (2,), print\ndef cond(n): return {'a': 3}", "dictionary of tensors"),
        (
            "import torch\nshape, denoiser = (2,), print\ndef data(n): return torch.randn(9, 2)\n"
            "def cond(n): return {'a': torch.ones(8)}",
            "as many rows",
        ),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, capsys, text, words):
    (tmp_path / "mine.py").write_text(text)
    assert call(tmp_path, tmp_path / "mine.py") == 2
    err = capsys.readouterr().err
    assert words in err and "mine.py: " in err and err.count("\n") == 1
    assert not (tmp_path / "check.png").exists()


def test_wrong_arguments_are_refused_in_one_line(tmp_path, capsys):
    example = str(ROOT / "edm/example_teacher.py")
    net = EDMPrecond(img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1)
    checkpoints.save(tmp_path / "g.safetensors", net, sigma_init=2.5)
    for argv, words in (
        (["none.py"], "none.py"),
        (["none"], "no such file or folder"),
        ([str(tmp_path / "g.safetensors")], "a one-step generator, not a teacher"),
        ([example, "--data", "none"], "none"),
        ([example, "--out", "a.jpg"], "must be a .png"),
        ([example, "--out", str(tmp_path / "no.png" / "a.png")], "a.png"),
        ([example, "--images", "0"], "--images must be at least 1"),
    ):
        (tmp_path / "no.png").touch()
        assert check_teacher.main(argv) == 2, argv
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "predicts, levels", [("noise", "from sigma 0.01 to 156.6"), ("velocity", "from sigma 0.002 to 80")]
)
def test_a_pipeline_is_checked_as_its_scheduler_says(tmp_path, capsys, predicts, levels):
    from diffusers import PixArtTransformer2DModel

    from edm.text import digits

    torch.manual_seed(0)
    digits.make_frozen(tmp_path / "frozen", 0, 1)
    small = digits.TRANSFORMER | dict(num_layers=1, num_attention_heads=1, cross_attention_dim=24)
    transformer = PixArtTransformer2DModel(**small)
    digits.save_pipeline(tmp_path / "pipe", tmp_path / "frozen", transformer, predicts)
    assert call(tmp_path, tmp_path / "pipe", "--data", "digits", "--images", 8, "--seconds", 0.1) in (0, 1)
    out = capsys.readouterr().out
    for words in ("(4, 8, 8), float32", "other ones change D by", "D is affine in the scale", levels):
        assert words in out
