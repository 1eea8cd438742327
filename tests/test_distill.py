"""Distillation of images: who moves, what a run leaves, over processes; killed runs; wrong inputs."""

import csv
import gc
import hashlib
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from PIL import Image

import sim_core as sim
from edm import benchmark, distill, evaluate, sample, train_teacher
from edm.algorithm2 import Distiller
from edm.config import (
    DISTILLATIONS,
    PRESETS,
    TEACHERS,
    Distillation,
    TeacherTraining,
    Training,
    check,
    command_line,
    parse,
)
from edm.images import checkpoints
from edm.images.data import Images, load_images, to_uint8
from edm.images.networks import EDMPrecond, Generator
from edm.quality import judge
from edm.training import plots
from edm.training.loop import Diverged, Recent
from edm.training.run import Run
from edm.training.trainee import Batches, compiled, make_accelerator
from tests.snapshots import write_snapshot
from toy.files import UserError
from toy.folder import Folder

ROOT = Path(__file__).parents[1]
UNET = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=8, channel_mult=(1,), num_blocks=1,
            attn_resolutions=(), dropout=0.0, channel_mult_emb=2)  # fmt: skip
OTHER = dict(img_resolution=16, img_channels=3, label_dim=4, augment_dim=9)  # than a preset's
TINY = dict(preset="digits", device="cpu", threads=1, data=None, steps=4, batch=8, every=16, samples=20,
            lr=1e-3, fake_lr=2e-3, warmup=0, lr_end=0.0, ema_halflife=4000)  # fmt: skip


def config(**changes):
    return Distillation(**TINY | changes)


def network(seed=0, **changes):
    """A small EDMPrecond in which every branch counts."""
    torch.manual_seed(seed)
    made = EDMPrecond(**UNET | changes).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return made.requires_grad_(False)


def task_of(dtype=torch.float64, **changes):
    """A Distiller of three different networks.  task.gradients: those of its last updates, flat."""
    cfg = config(**changes)
    task = distill.build(cfg, make_accelerator(cfg), network().to(dtype))
    torch.manual_seed(1)
    for trainee in (task.fake, task.generator):
        for p in trainee.network.parameters():
            p.data += 0.05 * torch.randn_like(p)
    task.gradients = {}
    for name in ("fake", "generator"):
        watch(task, name)
    return task


def watch(task, name):
    trainee = getattr(task, name)
    norm = trainee.norm

    def watched():
        task.gradients[name] = torch.cat([p.grad.flatten() for p in trainee.network.parameters()])
        return norm()

    trainee.norm = watched


def gradients(**changes):
    task = task_of(**changes)
    task.step(3)
    return task.gradients


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Watch:
    """moved(): the names of the networks that changed since the last call."""

    def __init__(self, task):
        self.networks = dict(fake=task.fake.network, generator=task.generator.network, teacher=task.teacher,
                             ema=task.ema.network)  # fmt: skip
        self.moved()

    def moved(self):
        now = {name: flat(net) for name, net in self.networks.items()}
        before, self.now = getattr(self, "now", now), now
        return {name for name in now if not torch.equal(now[name], before[name])}


@pytest.fixture(autouse=True)
def fresh():
    """accelerate remembers the precision of the first Accelerator."""
    AcceleratorState._reset_state()


# ----------------------------------------------------------------------------------------------
# Who moves when.


def test_everything_starts_as_the_teacher():
    cfg = config()
    task = distill.build(cfg, make_accelerator(cfg), network())
    for made in (task.fake.network, task.generator.network, task.ema.network, task.teacher):
        assert torch.equal(flat(made), flat(network()))


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_each_update_moves_its_own_network(micro_batch):
    task = task_of(micro_batch=micro_batch)
    draw, watch = task.draw(0, 0), Watch(task)
    images = task.images(draw, keep_graph=True)
    task.update_fake(draw, images, 0)
    assert watch.moved() == {"fake"}
    task.update_generator(draw, None, 0)
    assert watch.moved() == {"generator"}
    for net in watch.networks.values():
        assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in task.fake.network.parameters())
    assert not any(p.requires_grad for net in (task.teacher, task.ema.network) for p in net.parameters())


# ----------------------------------------------------------------------------------------------
# The gradients of a step.


def test_micro_batch_must_divide_the_share():
    with pytest.raises(UserError, match="--micro-batch 3 does not divide 8"):
        task_of(micro_batch=3)
    assert Batches(SimpleNamespace(num_processes=2, process_index=1), config().batch, 100).micro == 4


def test_draws_depend_on_seed_step_and_update_alone():
    task = task_of()

    def drawn(*numbers):
        parts = task.draw(*numbers)
        labels = [cond["class_labels"] for cond in parts.pop("cond")]
        return {
            k: torch.cat(v) for k, v in (parts | {"labels": labels}).items() if isinstance(v, (list, tuple))
        }

    whole = drawn(3, 0)
    assert all(torch.equal(whole[k], v) for k, v in drawn(3, 0).items())
    assert {k: len(v) for k, v in whole.items()} == dict.fromkeys(whole, 8) and len(whole) == 6
    assert not torch.equal(whole["noise"], whole["fake_noise"])
    for other in ((4, 0), (3, 1)):
        assert not any(torch.equal(whole[k], v) for k, v in drawn(*other).items())
    shares = []
    for rank in (0, 1):
        task.batches = Batches(SimpleNamespace(num_processes=2, process_index=rank), config().batch, 2)
        shares.append(drawn(3, 0))
    assert all(torch.equal(whole[k], torch.cat([s[k] for s in shares])) for k in whole)
    task = task_of(seed=1)
    assert not any(torch.equal(whole[k], v) for k, v in drawn(3, 0).items())


def test_bf16_gradients_are_close_to_float32s():
    exact = gradients(dtype=torch.float32)
    AcceleratorState._reset_state()
    cast = gradients(dtype=torch.float32, precision="bf16")
    for name, g in exact.items():
        assert g.dtype == cast[name].dtype == torch.float32
        assert relative(cast[name], g) > 1e-5 and torch.cosine_similarity(cast[name], g, 0) > 0.99, name


def test_compile_falls_back_with_a_message(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    task_of(torch.float32, compile=True).step(0)
    assert "torch.compile does not work here (RuntimeError)" in capsys.readouterr().out


def test_compile_compiles_every_network(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    done, say = [], lambda line: pytest.fail(line)
    compiled([SimpleNamespace(compile=lambda i=i: done.append(i)) for i in range(3)], "cpu", say)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("space", sim.SPACES)
def test_log_has_the_distance_by_sigma(space):
    """Of denoised images, whatever the loss looks at."""
    task = task_of(micro_batch=4, space=space)
    sigma, zero = torch.tensor([0.05, 0.3, 0.4, 5.0]), torch.zeros(4, 1, 8, 8)
    teacher = torch.ones(4, 1, 8, 8) * torch.tensor([1, 2, 4, 8]).view(4, 1, 1, 1)
    task._count([sim.to_space(denoised, zero, sigma, space) for denoised in (zero, teacher, zero)], sigma)
    gaps = task.gap_by_sigma()
    assert list(gaps) == ["gap_0_0.1", "gap_0.1_0.5", "gap_0.5_2", "gap_2_inf"]
    assert list(gaps.values()) == pytest.approx([8, 24, math.nan, 64], nan_ok=True)
    assert all(math.isnan(v) for v in task.gap_by_sigma().values())


# ----------------------------------------------------------------------------------------------
# The teacher's training.


def teacher_task(**changes):
    cfg = TeacherTraining(**dict(device="cpu", threads=1, batch=8, steps=4) | changes)
    images = torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    data = Images(images, torch.arange(30) % 10, "noise")
    accelerator, net = make_accelerator(cfg), network().requires_grad_(True)
    examples = train_teacher.image_examples(cfg, accelerator.device, net, data)
    task = train_teacher.TeacherTask(cfg, accelerator, net, examples)
    task.gradients = {}
    watch(task, "teacher")
    return task, data


def test_teachers_average_is_its_own_network_in_bf16_too():  # accelerate patches the network that it prepares
    task, _ = teacher_task(precision="bf16", lr=0.1)
    x, sigma = torch.ones(1, 1, 8, 8), torch.ones(1)
    assert torch.equal(task.ema.network.float()(x, sigma), (first := task.ema.network(x, sigma)))
    task.teacher.network.requires_grad_(False).model.map_layer0.weight.add_(1.0)
    assert torch.equal(task.ema.network(x, sigma), first)


# ----------------------------------------------------------------------------------------------
# A run's folder.


def test_checkpoints_are_kept_named_by_their_hash_and_survive_damage(tmp_path):
    run, lines = Run(config(out=tmp_path, keep=2)), []
    assert run.load() is None
    for step in (1, 2, 3):
        run.history.append({"step": step})
        run.save(step, {"x": torch.full((3,), step)})
    files = sorted(run.checkpoints.iterdir())
    digests = [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files]
    assert [f.name for f in files] == [f"{step:09d}-{d}.pt" for step, d in zip((2, 3), digests)]

    def loaded():
        other = Run(config(out=tmp_path), first=False)
        state = other.load(lines.append)
        return state["step"], state["x"].tolist(), other.history

    assert loaded() == (3, [3, 3, 3], [{"step": 1}, {"step": 2}, {"step": 3}]) and not lines
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:100], b""):
        files[1].write_bytes(damaged)
        assert loaded() == (2, [2, 2, 2], [{"step": 1}, {"step": 2}])
        assert lines == [f"checkpoint {files[1].name} is damaged; trying the one before it"]
        lines.clear()
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        loaded()


def refused(**changes):
    """Why the folder is."""
    with pytest.raises(UserError) as error:
        Run(config(**changes))
    reason = str(error.value)
    del error
    gc.collect()  # lets go of the folder
    return reason


def test_folder_in_use(tmp_path):
    Run(config(out=tmp_path))
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 1); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], stdin=-1, stdout=-1)
    other.stdout.readline()
    assert refused(out=tmp_path, resume=True) == f"{tmp_path} is in use by another process"
    other.kill()
    other.communicate()
    Run(config(out=tmp_path, resume=True))


def test_folder_of_another_run(tmp_path):
    Run(config(out=tmp_path))
    assert "holds this run already; --resume" in refused(out=tmp_path)
    message = refused(out=tmp_path, resume=True, seed=1, lr=0.5, keep=7)
    assert message == f"{tmp_path} holds a run of other settings (seed 0, not 1; lr 0.001, not 0.5)"
    Run(config(out=tmp_path, resume=True, keep=7, threads=2, micro_batch=4, compile=True))  # decide no result
    gc.collect()
    Run(config(out=tmp_path, resume=True, samples=99, data="digits", evaluate_every=8))  # nothing trained
    for damaged in ("", "{", "[]"):
        (tmp_path / "config.json").write_text(damaged)
        assert "config.json is damaged" in refused(out=tmp_path, resume=True)


def test_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("!")
    (tmp_path / "tmp-mine").write_text("!")
    assert "has thesis.tex, tmp-mine but no config.json: not a run" in refused(out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex", "tmp-mine"]
    assert "thesis.tex as a run's folder" in refused(out=tmp_path / "thesis.tex")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in ("tmp-config.json", "tmp-log.csv", "checkpoints/tmp-tmp-staged.pt", "checkpoints/tmp-a.pt"):
        (tmp_path / name).write_text("half")
        Run(config(out=tmp_path, resume=True))
        assert (tmp_path / "config.json").exists() and not [*tmp_path.rglob("tmp-*")]


# ----------------------------------------------------------------------------------------------
# Whole runs, in this process.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks on disk, right and wrong."""
    path = tmp_path_factory.mktemp("networks")
    checkpoints.save(path / "teacher.safetensors", network())
    checkpoints.save(path / "generator.safetensors", network(), sigma_init=2.5)
    checkpoints.save(path / "large.safetensors", network(img_resolution=16))
    write_snapshot(path / "augmented.pkl", augmented := network(**OTHER), augmented.config)
    checkpoints.save(path / "bare.safetensors", network(**OTHER).without_augmentation())
    checkpoints.save(path / "unlabelled.safetensors", network(label_dim=0))
    for name, count, labels in (("few", 4, 4), ("mute", 20, 0)):  # data sets: too small, without labels
        (path / name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8), 12 * i).save(path / name / f"{i}.png")
        labelled = [[f"{i}.png", i % 10] for i in range(labels)] or None
        (path / name / "dataset.json").write_text(json.dumps({"labels": labelled}))
    (path / "cut.safetensors").write_bytes((path / "teacher.safetensors").read_bytes()[:-100])
    (path / "evil.pkl").write_bytes(b"\x80\x02cos\nsystem\nX\x0a\0\0\0touch evil\x85R.")
    return path


@pytest.fixture
def here(folder, monkeypatch):
    quick(monkeypatch.setattr)
    monkeypatch.chdir(folder)
    return folder


def run(*more, **changes):
    """edm/distill.py's exit code."""
    settings = TINY | dict(teacher="teacher.safetensors") | changes
    settings = {k: v for k, v in settings.items() if v is not None}
    words = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    presets = {name: preset | {"data": None} for name, preset in DISTILLATIONS.items()}
    try:
        return command_line(distill.main, Distillation, "", [*words, *more], presets)
    except SystemExit as stop:
        return stop.code
    finally:
        gc.collect()  # lets go of the run's folder


def record(out):
    """What must not depend on interruptions: the log but for time and memory, and all weights."""
    rows = list(csv.DictReader((Path(out) / "log.csv").read_text().splitlines()))
    for row in rows:
        del row["seconds"], row["peak_memory_gb"]
    state = Folder(out, {}).load()
    weights = [flat(checkpoints.load(Path(out) / "generator.safetensors")[0])]
    for name in ("fake", "generator"):
        weights.append(torch.cat([v.flatten() for v in state[name]["network"].values()]))
    return rows, weights


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick(patch.setattr)
        AcceleratorState._reset_state()
        assert run(out="whole", steps=6) == 0
    return folder / "whole"


def test_a_run_leaves_what_it_promises(whole):
    names = "checkpoints config.json curves.png generator.safetensors log.csv metrics.json"
    pictures = {f"{kind}-{step:07d}.png" for kind in ("panel", "samples") for step in (0, 2, 4, 6)}
    assert {p.name for p in whole.iterdir()} - {".lock", "tensorboard"} == pictures | set(names.split())
    rows, _ = record(whole)
    assert [(row["step"], row["images"]) for row in rows] == [(str(n), str(8 * n)) for n in range(1, 7)]
    assert all(math.isfinite(float(v)) for row in rows for k, v in row.items() if "gap" not in k)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["status"] == "finished" and "student_fd" not in metrics
    denoiser, about = checkpoints.load(whole / "generator.safetensors")
    state = Folder(whole, {}).load()
    average = Generator(denoiser).state_dict()
    assert all(torch.equal(average[k], v) for k, v in state["ema"].items()) and about["sigma_init"] == 2.5
    assert about["teacher"] == str(whole.parent / "teacher.safetensors")
    cfg = Distillation(**DISTILLATIONS["digits"] | TINY | dict(steps=6))
    task = distill.build(
        cfg, make_accelerator(cfg), checkpoints.load(whole.parent / "teacher.safetensors")[0]
    )
    for n, row in enumerate(rows):  # test_steps_images.py knows the numbers of a step
        found = {name: value.item() for name, value in task.step(n).items()}
        assert {name: float(row[name]) for name in found} == pytest.approx(found, rel=1e-5)
    assert torch.equal(flat(task.ema.network.denoiser), flat(denoiser))


def test_a_teacher_is_trained_if_none_is_given(here, monkeypatch, tmp_path):
    trained = dict(steps=3, batch=8, lr=0.01, every=16)
    monkeypatch.setitem(PRESETS["digits"], "network", UNET)
    monkeypatch.setitem(TEACHERS, "digits", trained)
    monkeypatch.setattr(distill, "compare", lambda *args: {})
    assert run(out=tmp_path / "run", teacher=None, data="digits") == 0
    cfg, data = TeacherTraining(device="cpu", threads=1, **trained), load_images("digits")
    torch.manual_seed(0)
    accelerator, net = make_accelerator(cfg), EDMPrecond(**UNET).to(memory_format=torch.channels_last)
    examples = train_teacher.image_examples(cfg, accelerator.device, net, data)
    task = train_teacher.TeacherTask(cfg, accelerator, net, examples)
    for n in range(3):
        task.step(n)
    found = checkpoints.load(tmp_path / "run/teacher/teacher.safetensors")[0]
    assert torch.equal(flat(found), flat(task.ema.network)) and not torch.equal(flat(found), flat(net))


def test_what_is_looked_at_is_the_average(here, tmp_path):
    task, z = task_of(torch.float32), torch.randn(4, 1, 8, 8)
    cond = {"class_labels": torch.eye(10)[:4]}
    task.ema.network.requires_grad_(True)
    for p in task.ema.network.parameters():
        p.data *= 0.9
    pictures = plots.Pictures(Run(config(out=tmp_path)), task, z, cond)
    x0 = task.ema.network(z, **cond)
    assert torch.equal(pictures.samples(), x0)
    found = pictures.look()
    assert [found["sample_mean"], found["sample_std"]] == pytest.approx([x0.mean().item(), x0.std().item()])


def test_the_log_has_means_over_steps_and_names_the_first_that_is_not_finite():
    recent = Recent(make_accelerator(config()))
    for value in (1.0, 3.0, 8.0):
        recent.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert recent.collect(7) == {"a": 4.0, "b": -4.0}
    for value in (1.0, math.nan, math.inf):
        recent.add({"a": torch.tensor(value)})
    with pytest.raises(Diverged, match=r"no longer finite at step 8 \(a nan\)"):
        recent.collect(9)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_augmented_teacher_distils_as_without_its_layer(precision, here, capsys, tmp_path, monkeypatch):
    """Nothing that is trained may hold the layer.  Of another size than the preset's, too, and resumed."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    one, other = teachers = "augmented.pkl", "bare.safetensors"
    for steps, name in ((2, one), (4, one), (4, other)):
        AcceleratorState._reset_state()
        left = iter([False] * 2 + [True] * 2)  # of a signal
        monkeypatch.setattr(
            "edm.training.loop.agree", lambda *_, left=left, steps=steps: steps == 2 and next(left)
        )
        code = run("--resume", teacher=name, out=tmp_path / name, precision=precision)
        assert code == (130 if steps == 2 else 0)
    printed, warned = capsys.readouterr()
    assert warned.count("on this CPU bf16 is slower than float32") == 3 * (precision == "bf16")
    words = (
        "network counts, not that of preset digits: it has img_resolution 16, not 8, img_channels 3, not 1, "
    )
    assert words in printed and "going on from step 2" in printed
    assert same(*(record(tmp_path / name) for name in teachers))
    generator, teacher = (
        checkpoints.load(file)[0] for file in (tmp_path / one / "generator.safetensors", one)
    )
    assert {*teacher.state_dict()} - {*generator.state_dict()} == {"model.map_augment.weight"}
    assert generator.config["augment_dim"] == 0 and teacher.config["augment_dim"] == 9


def test_a_parameter_without_gradient_is_named_in_one_line(here, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(EDMPrecond, "without_augmentation", lambda self: self)
    assert run(teacher="augmented.pkl", out=tmp_path / "run") == 2
    words = "error: the loss does not depend on model.map_augment.weight, a parameter to be trained"
    assert capsys.readouterr().err.splitlines()[-1].endswith(words)


def test_a_finished_run_resumes_to_itself(whole, here):
    before = record(whole)
    assert run("--resume", out="whole", steps=6) == 0 and same(record(whole), before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_it_resumes_to_the_same_bits(number, whole, here, monkeypatch, capsys, tmp_path):
    step, handler = Distiller.step, signal.getsignal(number)

    def stopped(self, n):
        if n == 2:
            os.kill(os.getpid(), number)
        return step(self, n)

    monkeypatch.setattr(Distiller, "step", stopped)
    assert run(out=tmp_path, steps=6) == 130 and signal.getsignal(number) is handler
    assert f"stopped by a signal and saved; --resume --out {tmp_path} goes on" in capsys.readouterr().out
    assert not (tmp_path / "generator.safetensors").exists()
    monkeypatch.setattr(Distiller, "step", step)
    assert run("--resume", out=tmp_path, steps=6) == 0 and "going on from step 3" in capsys.readouterr().out
    assert same(record(tmp_path), record(whole))


def test_a_full_disk_leaves_the_earlier_checkpoint(here, monkeypatch, capsys, tmp_path):
    save, limits = Run.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_full_disk(self, step, state):
        if step > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(self, step, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Run, "save", save_on_full_disk)
    assert run(out=tmp_path) == 2
    assert re.search(
        r"\n[^\n]*: error: .*tmp-staged.pt: cannot be written \(.*\)\n\Z", capsys.readouterr().err
    )
    assert Run(config(out=tmp_path), first=False).load()["step"] == 2
    assert not [*tmp_path.rglob("tmp-*")]


@pytest.mark.parametrize("update", ["online", "generator"])
def test_nan_among_the_levels_is_named_where_the_log_is(update, here, monkeypatch, capsys, tmp_path):
    draw, calls = Distiller.draw_sigma, iter(range(100))

    def broken(self, *args):
        sigma, last = draw(self, *args), 4 if update == "online" else 5
        return sigma.index_fill(0, torch.tensor([0]), math.nan) if next(calls) == last else sigma

    monkeypatch.setattr(Distiller, "draw_sigma", broken)
    monkeypatch.setattr(sim, "_check", lambda *_: None)  # as on an accelerator, where a look costs a stall
    assert run(out=tmp_path) == 1
    assert re.search(r"no longer finite at step \d .*sigma_min nan", capsys.readouterr().err)


@pytest.mark.parametrize("changes", [
    dict(lr=1e30), dict(fake_lr=1e30), dict(lr=1e30, every=8), dict(lr=1e38, steps=1)], ids=str)  # fmt: skip
def test_divergence_stops_and_keeps_a_good_checkpoint(changes, here, capsys, tmp_path):
    assert run(out=tmp_path, **dict(steps=60) | changes) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"stopped: (.*) step (\d+)(.*); lower --lr; the last good checkpoint is kept", line)
    assert int(found[2]) < 10
    if found[1] == "no longer finite at":  # else the pictures show it first
        for name in ("fake_gradient", "generator_gradient", "sigma_min", "sigma_max"):
            assert re.search(rf"\b{name} ([\d.e+-]+|inf|nan)\b", found[3])
    else:
        assert found[1] == "the images contain NaN after" and ("every" in changes or "steps" in changes)
    assert not (tmp_path / "generator.safetensors").exists()
    state = Run(config(out=tmp_path), first=False).load()
    assert state is None or all(v.isfinite().all() for v in state["generator"]["network"].values())


# ----------------------------------------------------------------------------------------------
# --evaluate-every.  The features are 64 pixels: no classifier to train.


class Pixels(torch.nn.Module):
    num_features = 64

    def forward(self, images):
        return images.flatten(1).float() / 255

    def probabilities(self, images):
        return self(images)[:, :10].softmax(1)


SCORED = dict(data="digits", samples=64, evaluate_every=16, steps=6, seed=3)


@pytest.fixture
def pixels(here, monkeypatch):
    monkeypatch.setattr(judge, "classifier_features", lambda data, cache: Pixels())


def fds(out):
    return [float(row["fd"]) for row in csv.DictReader((Path(out) / "log.csv").read_text().splitlines())]


def same_best(*folders):
    """Weights and notes, but for the teacher's path."""
    (a, about), (b, its) = (checkpoints.load(Path(f) / "generator-best.safetensors") for f in folders)
    return torch.equal(flat(a), flat(b)) and about | {"teacher": 0} == its | {"teacher": 0}


def score(path):
    """evaluate.py's distance of a generator."""
    given = dict(student=str(path), data="digits", samples=64, device="cpu")
    return evaluate.compare(evaluate.Settings(**given))["student"]["fd"]


def test_scores_on_the_way_are_the_averages_and_change_no_bit_of_the_training(pixels, tmp_path):
    assert run(out=tmp_path / "plain", **SCORED | dict(evaluate_every=0)) == 0
    assert run(out=tmp_path / "scored", **SCORED) == 0
    plain, scored = record(tmp_path / "plain"), record(tmp_path / "scored")
    found = [float(row.pop("fd")) for row in scored[0]]
    assert same(plain, scored) and "fd" not in plain[0][0]
    assert [math.isfinite(v) for v in found] == [False, True] * 3
    metrics = json.loads((tmp_path / "scored/metrics.json").read_text())
    assert found[-1] == pytest.approx(metrics["student_fd"], rel=1e-5)
    best = min(found[1::2])
    assert (
        metrics["best_fd"] == pytest.approx(best, rel=1e-5) and found.index(best) == metrics["best_step"] - 1
    )
    path = tmp_path / "scored/generator-best.safetensors"
    assert (
        score(path) == pytest.approx(best, rel=1e-5) and checkpoints.load(path)[1]["fd"] == metrics["best_fd"]
    )
    assert [*(tmp_path / "plain").glob("*best*")] == []


def test_the_best_is_kept_when_it_is_not_the_last(pixels, tmp_path, monkeypatch):
    values, judged = iter([3.0, 1.0, 2.0]), []

    def judge(self, name, network, about):
        judged.append(flat(network).clone())
        return {"fd": next(values)}

    monkeypatch.setattr(distill.Judge, "__call__", judge)
    monkeypatch.setattr(distill, "compare", lambda *given: {})
    assert run(out=tmp_path / "a", **SCORED) == 0
    network, about = checkpoints.load(tmp_path / "a/generator-best.safetensors")
    assert torch.equal(flat(network), judged[1]) and not torch.equal(judged[1], judged[2])
    assert (about["fd"], about["steps"], about["sigma_init"]) == (1.0, 4, 2.5)
    assert len([v for v in fds(tmp_path / "a") if math.isfinite(v)]) == 3


def test_a_stopped_run_keeps_its_best_and_takes_other_samples(pixels, tmp_path, monkeypatch, capsys):
    assert run(out=tmp_path / "whole", **SCORED) == 0
    step = Distiller.step

    def stopped(self, n):
        if n == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, n)

    monkeypatch.setattr(Distiller, "step", stopped)
    assert run(out=tmp_path / "cut", **SCORED) == 130
    monkeypatch.setattr(Distiller, "step", step)
    assert run("--resume", out=tmp_path / "cut", **SCORED) == 0
    assert same(record(tmp_path / "cut"), record(tmp_path / "whole"))
    assert same_best(tmp_path / "cut", tmp_path / "whole")
    capsys.readouterr()
    before = record(tmp_path / "cut")
    assert run("--resume", out=tmp_path / "cut", **SCORED | dict(samples=32)) == 0
    assert "by other --data or --samples; the choice begins anew" in capsys.readouterr().out
    assert same(record(tmp_path / "cut"), before)
    assert json.loads((tmp_path / "cut/metrics.json").read_text())["samples"] == 32


def test_data_of_its_own_teacher_are_not_exchanged(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS["digits"], "network", UNET)
    monkeypatch.setitem(TEACHERS, "digits", dict(steps=2, batch=8, lr=1e-3, every=16))
    monkeypatch.setattr(distill, "compare", lambda *given: {})
    assert run(out=tmp_path / "run", teacher=None, data="digits", steps=1) == 0
    (tmp_path / "other").mkdir()
    for i in range(10):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"other/{i}.png")
    labels = {"labels": [[f"{i}.png", i] for i in range(10)]}
    (tmp_path / "other/dataset.json").write_text(json.dumps(labels))
    files = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    before = files()
    assert run("--resume", out=tmp_path / "run", teacher=None, data=str(tmp_path / "other"), steps=1) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"run/teacher holds a run of other settings (data 'digits', not '{tmp_path}/other')" in err
    assert files() == before
    assert run("--resume", out=tmp_path / "run", teacher=None, data="digits", steps=1, samples=30) == 0


def test_nothing_is_written_outside_out(folder, here, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    teacher, before = str(folder / "teacher.safetensors"), sorted(folder.iterdir())
    assert run(out=tmp_path / "run", teacher=teacher, data="digits", steps=1) == 0
    assert [*(tmp_path / "empty").iterdir()] == [] and sorted(folder.iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "run"]
    assert (tmp_path / "run/classifier-digits.safetensors").exists()


WRONG = {  # words on the command line -> in the message
    "--teacher none.pkl": "none.pkl: No such file",
    "--teacher cut.safetensors": "cut.safetensors: damaged",
    "--teacher evil.pkl": "evil.pkl: ",
    "--teacher large.safetensors --data digits": "digits: its images are of resolution 8, not 16",
    "--teacher generator.safetensors": "generator.safetensors is a one-step generator, not a teacher",
    "--preset cifar10-cond --teacher=": "preset cifar10-cond needs --teacher",
    "--data none": "none: ",
    "--data none --teacher=": "none: ",
    "--data few": "few: 4 images, but an evaluation needs at least 5",
    "--data mute": "mute: has no labels, which the classifier of an evaluation needs",
    "--data mute --teacher=": "mute: 0 classes, but the network takes 10",
    "--samples 4 --data digits": "--samples must be at least 5, got 4",
    "--evaluate-every 8": "--evaluate-every needs --data",
    "--device mps": "--device mps: no MPS device here",
    "--device meta": "invalid choice: 'meta'",
    "--preset imagenet": "invalid choice: 'imagenet'",
    "--learning-rate 1": "unrecognized arguments: --learning-rate",
    "--micro-batch 3": "--micro-batch 3 does not divide 8",
    "--device cuda": "--device cuda: no CUDA device here",
    "--precision fp16": "--precision fp16 is for GPUs with CUDA",
    "--lr=-1": "--lr must be positive, got -1.0",
    "--fake-lr nan": "--fake-lr must be positive, got nan",
    "--steps 0": "--steps must be at least 1, got 0",
    "--batch=-8": "--batch must be at least 1, got -8",
    "--seed=-1": "--seed must be 0 or more, got -1",
    "--alpha nan": "--alpha must be a finite number, got nan",
    "--beta1 1": "--beta1 must be in [0, 1), got 1.0",
    "--steps many": "invalid int value: 'many'",
    "--distance l2 --c 1": "distance 'l2' does not take c",
    "--c=-1": "c must be positive",
    "--method diff_instruct --alpha 1": "--method diff_instruct does not take alpha",
    "--method diff_instruct --space noise": "--method diff_instruct needs --space denoised",
    "--out teacher.safetensors": "cannot use teacher.safetensors as a run's folder",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_inputs_are_refused_in_one_line_and_leave_no_trace(words, here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = lambda: {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in here.rglob("*")}
    before = files()
    given, none = words.replace("--teacher=", ""), {"teacher": None} if "--teacher=" in words else {}
    assert run(*given.split(), out="new", **none) == 2
    out, err = capsys.readouterr()
    assert WRONG[words] in err and err.count("\n") == 1 and "error: " in err and not out
    assert files() == before


def test_a_batch_must_divide_over_the_processes(monkeypatch):
    two = SimpleNamespace(num_processes=2, process_index=0)
    monkeypatch.setattr("edm.training.trainee.Accelerator", lambda **options: two)
    with pytest.raises(UserError, match="--batch 9 does not divide over 2 processes"):
        make_accelerator(config(batch=9))


def test_table_5_and_the_settings_that_sid_publishes():
    paper = dict(beta1=0.0, beta2=0.999, sigma_init=2.5)
    paper |= dict(sigma_distribution="sim", fake_sigma_distribution="edm", weighting="one")
    sid = {"cifar10-uncond": (500, 256, 1e-5), "cifar10-cond": (800, 256, 1e-5)}  # M images, batch, rates
    for name, (images, batch, lr) in (
        sid | {"ffhq-64": (500, 512, 1e-5), "afhqv2-64": (500, 512, 5e-6)}
    ).items():
        cfg = Distillation(preset=name, **PRESETS[name]["distill"])
        assert {k: getattr(cfg, k) for k in paper} == paper
        assert (cfg.batch, cfg.lr, cfg.fake_lr) == (batch, lr, lr)
        assert (cfg.method, cfg.distance, cfg.space) == ("sim", "pseudo_huber", "denoised")
        assert cfg.steps == math.ceil(images * 10**6 / batch) and cfg.lr_end == 1 and cfg.fake_updates == 1
    assert [PRESETS[f"cifar10-{kind}"]["network"]["label_dim"] for kind in ("uncond", "cond")] == [0, 10]


SCRIPTS = {  # script -> its settings and presets
    "distill": (Distillation, DISTILLATIONS),
    "train_teacher": (TeacherTraining, TEACHERS),
    "sample": (sample.Settings, None),
    "evaluate": (evaluate.Settings, None),
    "benchmark": (benchmark.Settings, None),
}


def test_the_commands_of_the_pages_and_docstrings_are_valid():
    pages = (ROOT / "README.md").read_text() + (ROOT / "edm/README.md").read_text()
    text = pages + distill.__doc__ + train_teacher.__doc__
    text = text.replace("\\\n", " ").replace("--seed S", "--seed 0")
    found = re.findall(r"edm/(\w+)\.py((?: +(?:--[\w-]+|[\w./-]+))+)", text)
    commands = [(name, shlex.split(words)) for name, words in found if name in SCRIPTS]
    assert {name for name, _ in commands} == set(SCRIPTS)
    for name, words in commands:
        cls, presets = SCRIPTS[name]
        cfg = parse(cls, "", words, presets)
        if isinstance(cfg, Training):
            check(cfg)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "words", ["--method sid", "--method diff_instruct", *(f"--distance {d}" for d in sim.DISTANCES)]
)
def test_every_loss_can_be_chosen_with_every_preset(preset, words):
    cfg = parse(Distillation, "", ["--preset", preset, *words.split()], DISTILLATIONS)
    check(cfg)
    assert (cfg.c is None) == ("pseudo_huber" not in words)
    assert parse(Distillation, "", ["--c", "7"], DISTILLATIONS).c == 7.0


# ----------------------------------------------------------------------------------------------
# Processes: several, and killed ones.

START = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport test_distill as t\n"
TWO = """
import torch
found = {key: t.gradients(micro_batch=key[0], share=key[1]) for key in t.ACCUMULATIONS}
task = t.task_of(lr=1e-7, fake_lr=1e-7)
assert task.accelerator.num_processes == 2 and task.batches.share == 4
for n in range(3):
    task.step(n)
weights = [t.flat(made.network) for made in (task.fake, task.generator, task.ema)]
torch.save((found, weights), f"rank{task.accelerator.process_index}.pt")
t.quick()
t.judge.classifier_features = lambda data, cache: t.Pixels()
sys.exit(t.run(out="two", teacher=sys.argv[1], **t.SCORED | dict(steps=3, samples=65)))
"""
ACCUMULATIONS = [(0, True), (2, True), (1, False)]


def script(path, content):
    path.write_text(START + content)
    return str(path)


def quick(patch=setattr):
    """No figures: they take most of a tiny run's time.  What goes into them is looked at all the same."""
    patch(plots, "panel", lambda rows: [to_uint8(x) for _, x in rows] and Figure((1, 1)))
    patch(plots, "curves", lambda history: Figure((1, 1)))


def shrink():
    """The digits preset, with a small teacher, trained briefly."""
    quick()
    PRESETS["digits"]["network"] = UNET
    TEACHERS["digits"] = dict(steps=6, batch=8, lr=1e-3, every=16)
    distill.compare = lambda *args: {}


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder, pixels, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, script(tmp_path / "two.py", TWO), str(folder / "teacher.safetensors")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 3 steps") == 1
    (found, weights), (other, others) = (torch.load(tmp_path / f"rank{i}.pt") for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    for micro_batch, share in ACCUMULATIONS:
        for name, g in gradients(share=share).items():
            for mine in (found, other):
                assert relative(mine[micro_batch, share][name], g) < 1e-9, (micro_batch, share, name)
    assert run(out=tmp_path / "one", **SCORED | dict(steps=3, samples=65)) == 0
    (rows, mine), (expected, its) = record(tmp_path / "two"), record(tmp_path / "one")
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, by_one in zip(rows, expected):
        numbers, ones = ([float(v) for v in r.values()] for r in (row, by_one))
        assert numbers == pytest.approx(ones, rel=1e-4, nan_ok=True)
    assert math.isfinite(float(rows[1]["fd"])) and "fd" in expected[1]
    assert relative(mine[0], its[0]) < 1e-4  # the averages; psi's biases of no effect drift with rounding


REFERENCE = ROOT.parent / "shared" / "reference" / "edm" / "snapshot_augmented.pkl"


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ours", "reference"])
def test_the_command_on_an_augmented_teacher(teacher, folder, tmp_path):
    """On one process and on two, whose numbers must agree; compiled, which may round otherwise."""
    path = {"ours": folder / "augmented.pkl", "reference": REFERENCE}[teacher]
    if not path.exists():
        pytest.skip(f"needs the reference files in EDM's format: no {path}")
    words = "--preset cifar10-cond --steps 3 --batch 8 --lr 1e-3 --fake-lr 1e-3 --device cpu --threads 1"
    script, ends = [str(ROOT / "edm/distill.py"), *words.split(), "--teacher", str(path), "--out"], []
    ways = [([], "one"), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "two")]
    for launcher, *more in [*ways, *([([], "compiled", "--compile")] if teacher == "ours" else [])]:
        made = [sys.executable, *launcher, *script, *more]
        done = subprocess.run(made, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and done.stdout.count("finished after 3 steps") == 1, done.stderr
        assert done.stdout.count("label_dim 4, not 10") == (teacher == "ours")
        ends.append(record(tmp_path / more[0])[1][0])
    one, *others = (end - flat(checkpoints.load(path)[0].without_augmentation()) for end in ends)
    assert 5e-4 < one.abs().max() < 1e-2  # three steps of Adam
    assert all(relative(other, one) < limit for other, limit in zip(others, (0.01, 0.1)))


@pytest.mark.slow
def test_the_command_itself(folder, tmp_path):
    words = "--steps 3 --batch 8 --every 16 --samples 20 --device cpu --threads 1 --out run --teacher".split()
    words += [str(folder / "teacher.safetensors")]

    def command(*more):
        made = [sys.executable, str(ROOT / "edm/distill.py"), *words, *more]
        return subprocess.run(made, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    done = command()
    assert done.returncode == 0 and "finished after 3 steps" in done.stdout, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["student_evaluations"] == 1 and metrics["teacher_evaluations"] == 35
    assert metrics["student_fd"] > metrics["floor_fd"] > 0 and metrics["samples"] == 20
    done = command()
    assert done.returncode == 2 and re.fullmatch(r"distill.py: error: .*--resume goes on.*\n", done.stderr)
