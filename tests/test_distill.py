"""Distillation of images: who moves when, the gradients of a step, a run's folder, the settings."""

import gc
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import sim_core as sim
from edm import benchmark, distill, evaluate, sample, train_teacher
from edm.config import DISTILLATIONS, PRESETS, TEACHERS, Distillation, TeacherTraining, Training, check, parse
from edm.images.data import Images
from edm.training.loop import Diverged, Recent
from edm.training.run import Run
from edm.training.trainee import Batches, compiled, make_accelerator
from tests.by_hand import flat, relative
from tests.common import ROOT
from tests.small import assert_each_update_moves_its_own, config, gradients, network, task_of, teacher_task
from toy.files import UserError


def test_everything_starts_as_the_teacher():
    cfg = config()
    task = distill.build(cfg, make_accelerator(cfg), network())
    for made in (task.fake.network, task.generator.network, task.ema.network, task.teacher):
        assert torch.equal(flat(made), flat(network()))


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_each_update_moves_its_own_network(micro_batch):
    task = task_of(micro_batch=micro_batch)
    draw = task.draw(0, 0)
    assert_each_update_moves_its_own(task, task.images(draw, keep_graph=True), draw)


def test_teachers_average_is_its_own_network_in_bf16_too():  # accelerate patches the network that it prepares
    data = Images(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.arange(30) % 10, "black")
    net = network().requires_grad_(True)
    task = teacher_task(net, data, precision="bf16", lr=0.1, batch=8, steps=4)
    x, sigma = torch.ones(1, 1, 8, 8), torch.ones(1)
    assert torch.equal(task.ema.network.float()(x, sigma), (first := task.ema.network(x, sigma)))
    task.teacher.network.requires_grad_(False).model.map_layer0.weight.add_(1.0)
    assert torch.equal(task.ema.network(x, sigma), first)


# ----------------------------------------------------------------------------------------------
# The gradients of a step, and what is written of it.


def test_micro_batch_must_divide_the_share():
    with pytest.raises(UserError, match="--micro-batch 3 does not divide 8"):
        task_of(micro_batch=3)
    assert Batches(SimpleNamespace(num_processes=2, process_index=1), config().batch, 100).micro == 4


def test_a_batch_must_divide_over_the_processes(monkeypatch):
    two = SimpleNamespace(num_processes=2, process_index=0)
    monkeypatch.setattr("edm.training.trainee.Accelerator", lambda **options: two)
    with pytest.raises(UserError, match="--batch 9 does not divide over 2 processes"):
        make_accelerator(config(batch=9))


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


def test_the_log_has_means_over_steps_and_names_the_first_that_is_not_finite():
    recent = Recent(make_accelerator(config()))
    for value in (1.0, 3.0, 8.0):
        recent.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert recent.collect(7) == {"a": 4.0, "b": -4.0}
    for value in (1.0, math.nan, math.inf):
        recent.add({"a": torch.tensor(value)})
    with pytest.raises(Diverged, match=r"no longer finite at step 8 \(a nan\)"):
        recent.collect(9)


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
    for damaged in ("", "{", "[]", "[" * 10**6):
        (tmp_path / "config.json").write_text(damaged)
        assert "config.json is damaged" in refused(out=tmp_path, resume=True)
    (tmp_path / "config.json").write_text(json.dumps({"seed": "a" * 10**6}))
    assert len(refused(out=tmp_path, resume=True)) < 500


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
# The settings.


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
