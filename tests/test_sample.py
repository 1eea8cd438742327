"""Latents, Heun's sampler against closed forms, and edm/sample.py through its command line."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edm import sample
from edm.images import checkpoints
from edm.images.data import one_hot, to_uint8
from edm.images.networks import EDMPrecond
from edm.images.sampler import fixed_latents, heun, latents
from edm.training import plots
from tests.common import ROOT, reference, spawn, start, words_of
from toy.files import UserError

# ----------------------------------------------------------------------------------------------
# Latents.


def test_latents_are_those_of_each_seeds_own_generator():
    z, labels = latents([5, 0, 123456], (3, 4, 4), 10)
    for i, seed in enumerate([5, 0, 123456]):
        rng = torch.Generator().manual_seed(seed)
        assert torch.equal(z[i], torch.randn(3, 4, 4, generator=rng))
        assert labels[i] == torch.randint(10, (1,), generator=rng)
    assert z.dtype == torch.float32 and labels.dtype == torch.int64


def test_latents_are_normal_and_classes_uniform():
    z, labels = latents(range(4000), (1, 2, 2), 4)
    assert abs(z.mean()) < 0.03 and abs(z.var() - 1) < 0.05
    assert labels.bincount().tolist() == pytest.approx([1000] * 4, rel=0.1)


def test_latents_without_classes_are_the_same():
    z, labels = latents(range(3), (1, 2, 2))
    assert labels is None and torch.equal(z, latents(range(3), (1, 2, 2), 7)[0])


def test_fixed_latents_have_a_column_per_class():
    z, cond = fixed_latents(tiny(), "cpu", rows=2)
    assert torch.equal(z, latents(range(20), (1, 8, 8))[0])
    assert cond["class_labels"].argmax(1).tolist() == 2 * list(range(10))
    assert fixed_latents(tiny(label_dim=0), "cpu")[1] == {}


# ----------------------------------------------------------------------------------------------
# Heun's sampler, on Gaussian data N(m, s^2), for which all is known:
#     D(x; sigma) = (s^2 x + sigma^2 m) / (s^2 + sigma^2),   x(sigma) - m ~ sqrt(s^2 + sigma^2).


class Gaussian:
    def __init__(self, mean=0.3, std=0.5):
        self.mean, self.std, self.levels, self.kinds = mean, std, [], set()

    def __call__(self, x, sigma):
        assert sigma.shape == x.shape[:1] and sigma.unique().numel() == 1
        self.levels.append(sigma[0].item())
        self.kinds |= {x.dtype, sigma.dtype}
        variance = sigma.double().reshape(-1, 1, 1, 1) ** 2
        return (self.std**2 * x + variance * self.mean) / (self.std**2 + variance)

    def solution(self, z, sigma_max=80.0):
        return self.mean + (sigma_max * z.double() - self.mean) * self.std / np.hypot(self.std, sigma_max)


def error(steps, **how):
    law, z = Gaussian(), latents(range(8), (1, 4, 4))[0]
    return (heun(law, z, steps, **how) - law.solution(z, how.get("sigma_max", 80.0))).abs().max().item()


def test_heun_solves_the_gaussian_flow_to_second_order():
    errors = [error(steps) for steps in (20, 40, 80, 160)]
    rates = [np.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert rates == pytest.approx([2] * 3, abs=0.3) and errors[-1] < 1e-3
    assert error(80, rho=3.0, sigma_max=10.0, sigma_min=0.01) < 1e-3


def test_heun_evaluates_at_karras_levels_in_float32():
    law = Gaussian()
    x = heun(law, latents(range(2), (1, 2, 2))[0])  # 18 steps, EDM's choice
    i = np.arange(18) / 17
    ladder = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    each_twice_but_the_first = np.repeat(ladder, 2)[1:]
    assert len(law.levels) == 35 and law.levels == pytest.approx(each_twice_but_the_first, rel=1e-6)
    assert law.kinds == {torch.float32} and x.dtype == torch.float64


def test_one_step_of_heun_is_eulers_and_ends_at_the_denoised():
    law, z = Gaussian(), latents(range(3), (1, 2, 2))[0]
    assert torch.allclose(heun(law, z, 1), law(80 * z, torch.full((3,), 80.0)).double(), atol=1e-6)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        heun(law, z, 0)


def test_heun_passes_conditions_on():
    seen = []
    heun(lambda x, sigma, **cond: seen.append(cond) or x, torch.zeros(1, 1, 2, 2), 2, class_labels="c")
    assert seen == [{"class_labels": "c"}] * 3


# ----------------------------------------------------------------------------------------------
# Samples in batches.


def tiny(**how):
    """A network with weights of some size everywhere, so that its input and label matter."""
    torch.manual_seed(0)
    network = EDMPrecond(**dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=16,
                                channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)) | how)  # fmt: skip
    for weight in network.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


def drawn(network, about, seeds, batch, label=None, steps=3):
    sampler, _ = sample.make_sampler(network, about, steps)
    parts = list(sample.sample_batches(sampler, network, seeds, batch, label))
    assert [len(p[0]) for p in parts[:-1]] == [batch] * (len(parts) - 1)
    assert [seed for p in parts for seed in p[0]] == list(seeds)
    images = torch.cat([p[1] for p in parts])
    return images, None if parts[0][2] is None else torch.cat([p[2] for p in parts])


@pytest.mark.parametrize("about", [{"sigma_init": 1.5}, {}], ids=["one step", "heun"])
def test_images_are_those_of_the_network_called_directly(about):
    network, seeds = tiny(), list(range(40, 51))
    z, labels = latents(seeds, network.shape, 10)
    cond, sigma = one_hot(labels, 10), torch.full((11,), 1.5)
    x = network(1.5 * z, sigma, cond) if about else heun(network, z, 3, class_labels=cond)
    images, found = drawn(network, about, seeds, 4)
    assert torch.equal(found, labels) and images.dtype == torch.uint8 and images.shape == (11, 1, 8, 8)
    # a handful may fall on the other side of a whole number
    assert (images.int() - to_uint8(x).int()).abs().max() <= 1
    assert (images != to_uint8(x)).float().mean() < 0.01


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("about", [{"sigma_init": 2.5}, {}], ids=["one step", "heun"])
def test_float_images_depend_on_neither_batch_nor_company(about, autocast, monkeypatch):
    monkeypatch.setattr("edm.images.sampler.to_uint8", lambda x: x)  # the bits before they are rounded off
    network, seeds = tiny(img_channels=3), list(range(9))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        images, _ = drawn(network, about, seeds, 64)
        assert images.flatten(1).std(0).min() > 0.01  # so the following could fail
        for batch in (1, 5):
            assert torch.equal(drawn(network, about, seeds, batch)[0], images)
        assert torch.equal(drawn(network, about, seeds[8:2:-3], 4)[0], images[[8, 5]])


@pytest.mark.parametrize("resolution, size", [(8, 64), (32, 8)])
def test_the_network_sees_batches_of_one_size(resolution, size):
    network, sizes = tiny(img_resolution=resolution), set()
    sampler = lambda z, class_labels: sizes.add((len(z), len(class_labels))) or z
    assert [len(p[1]) for p in sample.sample_batches(sampler, network, range(21), 10)] == [10, 10, 1]
    assert sizes == {(size, size)}


def test_a_label_replaces_the_seeds_own():
    network, about, seeds = tiny(), {"sigma_init": 2.5}, list(range(12))
    images, labels = drawn(network, about, seeds, 5)
    threes, all_three = drawn(network, about, seeds, 5, label=3)
    assert all_three.tolist() == [3] * 12 and labels.unique().numel() > 2
    same = (images == threes).flatten(1).all(1)
    assert same.tolist() == (labels == 3).tolist()


def test_an_unconditional_network():
    images, labels = drawn(tiny(label_dim=0), {"sigma_init": 2.5}, range(3), 2)
    assert labels is None and images.shape == (3, 1, 8, 8)


def test_evaluations_per_image():
    network, calls = tiny(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    teacher = [({}, steps, 2 * steps - 1) for steps in (1, 2, 5, 18)]
    for about, steps, expected in (*teacher, ({"sigma_init": 2.5}, 18, 1)):
        sampler, evaluations = sample.make_sampler(network, about, steps)
        calls.clear()
        list(sample.sample_batches(sampler, network, [0], 1))
        assert evaluations == expected == len(calls)


@pytest.mark.parametrize("sigma_init", [0, -1, float("nan"), float("inf"), "2.5", None, True])
def test_impossible_sigma_init(sigma_init):
    with pytest.raises(UserError, match="sigma_init must be a positive number"):
        sample.make_sampler(tiny(), {"sigma_init": sigma_init})


def test_nan_is_an_error_that_names_the_seeds():
    batches = sample.sample_batches(lambda z, class_labels: z * float("nan"), tiny(), range(7, 20), 10)
    with pytest.raises(UserError, match="seeds 7 to 16: the images contain NaN"):
        next(batches)


# ----------------------------------------------------------------------------------------------
# The command line.


@pytest.fixture
def files(here):
    checkpoints.save("generator.safetensors", tiny(), sigma_init=2.5)
    checkpoints.save("teacher.safetensors", tiny())
    checkpoints.save("plain.safetensors", tiny(label_dim=0), sigma_init=2.5)
    checkpoints.save("colour.safetensors", tiny(img_channels=3), sigma_init=2.5)
    checkpoints.save("two.safetensors", tiny(img_channels=2), sigma_init=2.5)
    Path("text.txt").write_text("no network", encoding="utf-8")
    Path("full").mkdir()
    Path("full/file").touch()
    Path("empty").mkdir()
    Path("there.npz").touch()
    Path("dir.png").mkdir()
    return here


SETTINGS = dict(network="generator.safetensors", out="out.npz", seeds="0-4", device="cpu")


def run(**changes):
    return start(sample.main, sample.Settings, SETTINGS | changes)


def expected(network, seeds, **how):
    return drawn(checkpoints.load(network)[0], {"sigma_init": 2.5}, seeds, 64, **how)


@pytest.mark.parametrize("network", ["generator", "plain", "colour"])
def test_npz(files, network):
    assert run(network=f"{network}.safetensors", seeds="3-12,100,0", batch=3) == 0
    seeds = [*range(3, 13), 100, 0]
    images, labels = expected(f"{network}.safetensors", seeds)
    with np.load("out.npz") as found:
        assert np.array_equal(found["images"], images.permute(0, 2, 3, 1)) and found["images"].dtype == "u1"
        assert found["seeds"].tolist() == seeds and found["seeds"].dtype == np.int64
        assert set(found) == {"images", "seeds"} | ({"labels"} if labels is not None else set())
        assert labels is None or np.array_equal(found["labels"], labels)
    assert not list(files.glob("tmp-*"))


@pytest.mark.parametrize("network", ["generator", "colour"])
@pytest.mark.parametrize("out", ["empty", "new/folder"])
def test_folder_of_pngs_named_as_edm_does(files, network, out):
    assert run(network=f"{network}.safetensors", seeds="998-1001,1234567", out=out) == 0
    names = ["000000/000998", "000000/000999", "001000/001000", "001000/001001", "1234000/1234567"]
    assert sorted(str(p.relative_to(out)) for p in Path(out).rglob("*.png")) == [f"{n}.png" for n in names]
    images, _ = expected(f"{network}.safetensors", [998, 999, 1000, 1001, 1234567])
    for name, image in zip(names, images):
        assert np.array_equal(np.asarray(Image.open(f"{out}/{name}.png")), image.permute(1, 2, 0).squeeze())


def test_grid(files):
    assert run(out="deeper/grid.PNG", network="colour.safetensors", seeds="0-10") == 0
    images, _ = expected("colour.safetensors", range(11))
    found, wanted = Image.open("deeper/grid.PNG"), plots.grid(images, columns=4)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_labels_and_teacher(files, capsys):
    assert run(labels=3) == run(labels=3, network="teacher.safetensors", steps=2, out="teacher.npz") == 0
    assert "; 3 evaluations per image" in capsys.readouterr().out
    with np.load("out.npz") as one, np.load("teacher.npz") as many:
        assert one["labels"].tolist() == many["labels"].tolist() == [3] * 5
        assert np.array_equal(one["images"][:, None, :, :, 0],
                              expected("generator.safetensors", range(5), label=3)[0])  # fmt: skip
        assert (one["images"] != many["images"]).any()


def test_teacher_takes_18_steps_by_default(files, capsys):
    assert run(network="teacher.safetensors", seeds=0) == 0
    rate, wrote = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\S+ images/s, warming up included; 35 evaluations per image", rate)
    assert wrote == "wrote 1 image to out.npz"


def test_summary_leaves_the_first_batch_out(files, capsys):
    assert run(batch=2) == 0
    assert re.fullmatch(r"\S+ images/s after a first batch of 2 in \S+ s; 1 evaluation per image\n"
                        r"wrote 5 images to out.npz\n", capsys.readouterr().out)  # fmt: skip
    assert sample.speed([(10, 5.0), (10, 1.0), (5, 0.5)]) == "10 images/s after a first batch of 10 in 5.0 s"
    assert sample.speed([(10, 5.0)]) == "2 images/s, warming up included"


def test_bf16_is_another_precision(files):
    assert run() == run(precision="bf16", out="b.npz") == 0
    with np.load("out.npz") as a, np.load("b.npz") as b:
        gap = np.abs(a["images"].astype(int) - b["images"])
        assert gap.any() and gap.mean() < 5


def test_released_pickle(files):
    assert run(network=reference("edm/tiny_cond_vp.pkl"), steps=2) == 0


def test_released_student(files, capsys):
    """Of other authors: the original code's images, one-step only where --sigma-init says so."""
    path, vectors = reference("edm/sid_student.pkl"), reference("edm/sid_student.npz")
    network, _ = checkpoints.load(path)
    with np.load(vectors) as file:
        z, labels, want = (torch.from_numpy(file[name]) for name in ("z", "class_labels", "images"))
    made = network(2.5 * z, torch.full((6,), 2.5), labels)
    assert (made - want).abs().max() < 1e-5
    assert run(network=path, sigma_init=2.5, seeds="0-5") == 0
    assert capsys.readouterr().out.count("1 evaluation per image") == 1
    z, classes = latents(range(6), (3, 16, 16), 10)
    by_hand = to_uint8(network(2.5 * z, torch.full((6,), 2.5), one_hot(classes, 10))).permute(0, 2, 3, 1)
    with np.load("out.npz") as found:
        assert np.abs(found["images"].astype(int) - by_hand.numpy()).max() <= 1
        assert np.array_equal(found["labels"], classes)
    assert run(network=path, seeds="0-5", steps=2, out="teacher.npz") == 0
    out, err = capsys.readouterr()
    assert "3 evaluations per image" in out
    assert f"{path} names no sigma_init: sampled as a teacher, in many steps; if it is a one-step" in err


def test_a_file_that_names_its_kind_is_no_matter_for_doubt(files, capsys):
    checkpoints.save("ours.safetensors", tiny(), kind="teacher")
    assert run(network="ours.safetensors", steps=2, seeds=0) == 0 and "sigma" not in capsys.readouterr().err
    assert run(network="ours.safetensors", sigma_init=2.5, seeds=0, out="b.npz") == 0
    assert run(sigma_init=2.5, seeds=0, out="c.npz") == 0  # what its file says, too
    with np.load("b.npz") as found:
        assert np.array_equal(found["images"].transpose(0, 3, 1, 2), expected("ours.safetensors", [0])[0])


WRONG = {  # what is changed -> what is said
    "seed": (dict(seeds="0-3,x"), "--seeds: 'x' is neither a seed nor a range"),
    "no seed": (dict(seeds=""), "--seeds is empty"),
    "negative": (dict(seeds="0--3"), "--seeds: '0--3' is neither"),
    "other digits": (dict(seeds="٣"), "--seeds: '٣' is neither"),
    "empty range": (dict(seeds="5-4"), "--seeds: the range 5-4 is empty"),
    "twice": (dict(seeds="0-9,4"), "--seeds 0-9,4: a seed occurs twice"),
    "too many": (dict(seeds="0-999999999999"), "more than 10,000,000 images"),
    "batch": (dict(batch=0), "--batch must be at least 1, got 0"),
    "steps": (dict(network="teacher.safetensors", steps=0), "--steps must be at least 1, got 0"),
    "steps of one": (dict(steps=5), "generator.safetensors: a one-step generator, so --steps does not"),
    "another sigma_init": (dict(sigma_init=2), "generator.safetensors: notes sigma_init 2.5, but"),
    "negative sigma_init": (dict(sigma_init=0), "--sigma-init must be positive, got 0.0"),
    "steps and sigma_init": (dict(network="teacher.safetensors", sigma_init=2.5, steps=5), "a one-step gen"),
    "label": (dict(labels=10), "--labels must be from 0 to 9 for generator.safetensors, got 10"),
    "negative label": (dict(labels=-1), "--labels must be from 0 to 9"),
    "no classes": (dict(network="plain.safetensors", labels=0), "plain.safetensors: has no classes"),
    "no network": (dict(network="text.txt"), "text.txt: neither"),
    "missing": (dict(network="missing.safetensors"), "missing.safetensors: No such file"),
    "channels": (dict(network="two.safetensors", out="new"), "new: a PNG has 1 or 3 channels, but two"),
    "file exists": (dict(out="there.npz"), "there.npz: exists already"),
    "folder in use": (dict(out="full"), "full: exists already"),
    "folder for a picture": (dict(out="dir.png"), "dir.png: exists already"),
    "file for a folder": (dict(out="text.txt"), "text.txt: exists already"),
    "file in between": (dict(out="text.txt/a/b.png"), "text.txt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_end_with_code_2_and_one_line(files, capsys, case):
    changes, message = WRONG[case]
    before = sorted(files.rglob("*"))
    assert run(**changes) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(files.rglob("*")) == before and Path("there.npz").stat().st_size == 0


def test_seeds_are_counted_over_all_ranges(monkeypatch):
    monkeypatch.setattr("edm.images.sampler.MAX_SEEDS", 10)
    assert sample.parse_seeds("0-4, 7-10,5") == [0, 1, 2, 3, 4, 7, 8, 9, 10, 5]
    with pytest.raises(UserError, match="more than 10 images"):
        sample.parse_seeds("0-4,7-10,5,6")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(files, capsys):
    assert run(device="cuda") == 2 and "--device cuda: no CUDA device here" in capsys.readouterr().err


def test_several_processes_want_a_folder(files, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, str(2 - ("RANK" in name)))
    assert run() == 2 and "out.npz: 2 processes write into a folder only" in capsys.readouterr().err


def test_as_a_script_and_never_overwriting(files, capsys):
    done = spawn(ROOT / "edm/sample.py", *words_of(SETTINGS))
    assert done.returncode == 0 and done.stdout.endswith("wrote 5 images to out.npz\n"), done.stderr
    before = Path("out.npz").read_bytes()
    assert run() == 2 and "out.npz: exists already, and nothing is overwritten" in capsys.readouterr().err
    assert Path("out.npz").read_bytes() == before


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(files):
    for processes, out in ((1, "one"), (2, "two")):
        settings = SETTINGS | dict(out=out, seeds="0-20")
        done = spawn(ROOT / "edm/sample.py", *words_of(settings), processes=processes)
        assert done.returncode == 0 and done.stdout.count("wrote 21 images") == 1, done.stderr
    one, two = ({p.name: p.read_bytes() for p in Path(out).rglob("*.png")} for out in ("one", "two"))
    assert one == two and len(one) == 21
