"""Whole runs of edm/distill.py in this process: what they leave, stopped, broken, scored, refused."""

import json
import math
import re
import resource
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import sim_core as sim
from edm import distill, evaluate
from edm.algorithm2 import Distiller
from edm.config import DISTILLATIONS, PRESETS, TEACHERS, Distillation
from edm.images import checkpoints
from edm.images.data import load_images
from edm.images.networks import EDMPrecond, Generator
from edm.training import plots
from edm.training.run import Run
from edm.training.trainee import make_accelerator
from tests import small
from tests.by_hand import flat, relative
from tests.small import (
    SCORED,
    TINY,
    UNET,
    assert_refused,
    assert_rows_close,
    config,
    quick,
    record,
    run,
    same,
    signal_at,
    task_of,
    teacher_task,
)
from toy.folder import Folder

folder, here, pixels = small.folder, small.here, small.pixels  # fixtures


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick(patch.setattr)
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


def test_a_teacher_is_trained_if_none_is_given(here, monkeypatch, tmp_path, capsys):
    trained = dict(steps=3, batch=8, lr=0.01, every=16)
    monkeypatch.setitem(PRESETS["digits"], "network", UNET)
    monkeypatch.setitem(TEACHERS, "digits", trained)
    monkeypatch.setattr(distill, "compare", lambda *args: {})
    assert run(out=tmp_path / "run", teacher=None, data="digits") == 0
    torch.manual_seed(0)
    net = EDMPrecond(**UNET).to(memory_format=torch.channels_last)
    task = teacher_task(net, load_images("digits"), **trained)
    for n in range(3):
        task.step(n)
    found = checkpoints.load(tmp_path / "run/teacher/teacher.safetensors")[0]
    assert torch.equal(flat(found), flat(task.ema.network)) and not torch.equal(flat(found), flat(net))
    (tmp_path / "run/teacher/metrics.json").write_text("{}")
    assert run("--resume", out=tmp_path / "run", teacher=None, data="digits") == 2
    assert "metrics.json: damaged" in capsys.readouterr().err
    Folder(tmp_path / "run", {}).save(5, {"history": []})  # of an older version
    assert run("--resume", out=tmp_path / "run", teacher=None, data="digits") == 2
    assert "run/checkpoints: damaged, or of another kind" in capsys.readouterr().err


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
def test_a_signal_saves_and_it_resumes_to_the_same_bits(number, whole, here, capsys, tmp_path):
    handler = signal.getsignal(number)
    with signal_at(2, number):
        assert run(out=tmp_path, steps=6) == 130 and signal.getsignal(number) is handler
    assert f"stopped by a signal and saved; --resume --out {tmp_path} goes on" in capsys.readouterr().out
    assert not (tmp_path / "generator.safetensors").exists()
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
# --evaluate-every.


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
    assert sum(math.isfinite(float(row["fd"])) for row in record(tmp_path / "a")[0]) == 3


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one(here, tmp_path, capsys):
    for name, *more in (("eager",), ("compiled", "--compile")):
        assert run(*more, out=tmp_path / name, steps=3) == 0
    assert "torch.compile does not work" not in capsys.readouterr().out
    (rows, weights), (expected, others) = (record(tmp_path / name) for name in ("compiled", "eager"))
    assert_rows_close(rows, expected, rel=1e-3)
    assert 0 < relative(weights[0], others[0]) < 1e-3  # the averages; equal to the bit: not compiled


def test_a_stopped_run_keeps_its_best_and_takes_other_samples(pixels, tmp_path, capsys):
    assert run(out=tmp_path / "whole", **SCORED) == 0
    with signal_at(4):
        assert run(out=tmp_path / "cut", **SCORED) == 130
    assert run("--resume", out=tmp_path / "cut", **SCORED) == 0
    assert same(record(tmp_path / "cut"), record(tmp_path / "whole"))
    best = [checkpoints.load(tmp_path / name / "generator-best.safetensors") for name in ("cut", "whole")]
    assert torch.equal(*(flat(net) for net, _ in best))
    assert best[0][1] | {"teacher": 0} == best[1][1] | {"teacher": 0}
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


# ----------------------------------------------------------------------------------------------
# What is refused.


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
    "--c 1 --delta 1": "distance 'pseudo_huber' does not take c and delta",
    "--method diff_instruct --alpha 1": "--method diff_instruct does not take alpha",
    "--method diff_instruct --space noise": "--method diff_instruct needs --space denoised",
    "--out teacher.safetensors": "cannot use teacher.safetensors as a run's folder",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_inputs_are_refused_in_one_line_and_leave_no_trace(words, here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out, err = assert_refused(run, words, here, capsys)
    assert WRONG[words] in err and not out
