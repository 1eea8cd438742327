"""Distillations in processes of their own: the commands themselves; two compute what one does."""

import json
import math
import re

import pytest
import torch

from edm.images import checkpoints
from tests import small, small_text
from tests.by_hand import flat, relative
from tests.common import ROOT, reference, spawn
from tests.small import ACCUMULATIONS, SCORED, assert_rows_close
from tests.small_text import GUIDED

folder, here, pixels = small.folder, small.here, small.pixels  # fixtures
fast, pipeline = small_text.fast, small_text.pipeline


TWO = """
import torch
from tests import small as t
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


TWO_OF_TEXT = """
import torch
from tests import small, small_text as t
found = {}
for sharding in ("ddp", "fsdp"):
    for micro_batch, share in small.ACCUMULATIONS:
        task = t.task_of(sys.argv[1], sharding=sharding, micro_batch=micro_batch, share=share, **t.GUIDED)
        assert task.accelerator.num_processes == 2 and task.batches.share == 4
        task.step(3)
        found[sharding, micro_batch, share] = task.gradients
torch.save(found, f"rank{task.accelerator.process_index}.pt")
small.quick()
t.captions.Reader = t.captions.compare = lambda *given: {}
for sharding in ("ddp", "fsdp"):
    assert t.run(out=sharding, teacher=sys.argv[1], sharding=sharding, steps=4, every=16) == 0
assert t.run("--resume", out="fsdp", teacher=sys.argv[1], sharding="fsdp", steps=4, every=16) == 0
"""


def in_processes(count, folder, code, *words):
    """Run the code, there -> what they printed."""
    (folder / "code.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code)
    done = spawn("code.py", *words, processes=count, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


GROUP = """
import atexit
from torch import distributed
from edm.config import TeacherTraining, command_line
atexit.register(lambda: print("at the end:", distributed.is_initialized()))
def main(cfg):
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
for _ in range(2):
    command_line(main, TeacherTraining, "", [])
    print("after a command:", distributed.is_initialized())
"""


def test_a_process_ends_its_group_when_it_exits_and_not_before(tmp_path):
    said = in_processes(1, tmp_path, GROUP)
    assert said == "after a command: True\n" * 2 + "at the end: False\n"


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder, pixels, tmp_path):
    said = in_processes(2, tmp_path, TWO, folder / "teacher.safetensors")
    assert said.count("finished after 3 steps") == 1
    (found, weights), (other, others) = (torch.load(tmp_path / f"rank{i}.pt") for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    for micro_batch, share in ACCUMULATIONS:
        for name, g in small.gradients(share=share).items():
            for mine in (found, other):
                assert relative(mine[micro_batch, share][name], g) < 1e-9, (micro_batch, share, name)
    assert small.run(out=tmp_path / "one", **SCORED | dict(steps=3, samples=65)) == 0
    (rows, mine), (expected, its) = small.record(tmp_path / "two"), small.record(tmp_path / "one")
    assert_rows_close(rows, expected, rel=1e-4)
    assert math.isfinite(float(rows[1]["fd"])) and "fd" in expected[1]
    assert relative(mine[0], its[0]) < 1e-4  # the averages; psi's biases of no effect drift with rounding


@pytest.mark.slow
def test_two_processes_compute_what_one_does_whole_or_sharded(pipeline, fast, tmp_path):
    assert "going on from step 4" in in_processes(2, tmp_path, TWO_OF_TEXT, pipeline)
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in (0, 1)]
    for (sharding, micro_batch, share), found in ranks[0].items():
        expected = small_text.gradients(pipeline, share=share, **GUIDED)
        for name, g in expected.items():
            for mine in (found, ranks[1][sharding, micro_batch, share]):
                assert relative(mine[name], g) < 1e-6, (sharding, micro_batch, share, name)
    assert small_text.run(out=tmp_path / "one", teacher=pipeline, steps=4) == 0
    expected, its = small_text.record(tmp_path / "one")
    for sharding in ("ddp", "fsdp"):
        rows, mine = small_text.record(tmp_path / sharding)
        assert_rows_close(rows, expected, rel=1e-2)
        assert relative(mine[0], its[0]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ours", "reference"])
def test_the_command_on_an_augmented_teacher(teacher, folder, tmp_path):
    """On one process and on two, whose numbers must agree."""
    path = folder / "augmented.pkl" if teacher == "ours" else reference("edm/snapshot_augmented.pkl")
    words = "--preset cifar10-cond --steps 3 --batch 8 --lr 1e-3 --fake-lr 1e-3 --device cpu --threads 1"
    script, ends = [ROOT / "edm/distill.py", *words.split(), "--teacher", path, "--out"], []
    for processes, out in [(1, "one"), (2, "two")]:
        done = spawn(*script, out, processes=processes, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("finished after 3 steps") == 1, done.stderr
        assert done.stdout.count("label_dim 4, not 10") == (teacher == "ours")
        ends.append(small.record(tmp_path / out)[1][0])
    one, two = (end - flat(checkpoints.load(path)[0].without_augmentation()) for end in ends)
    assert 5e-4 < one.abs().max() < 1e-2  # three steps of Adam
    assert relative(two, one) < 0.01


@pytest.mark.slow
def test_the_command_itself(folder, tmp_path):
    words = "--steps 3 --batch 8 --every 16 --samples 20 --device cpu --threads 1 --out run --teacher".split()
    words = [ROOT / "edm/distill.py", *words, folder / "teacher.safetensors"]
    done = spawn(*words, cwd=tmp_path)
    assert done.returncode == 0 and "finished after 3 steps" in done.stdout, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["student_evaluations"] == 1 and metrics["teacher_evaluations"] == 35
    assert metrics["student_fd"] > metrics["floor_fd"] > 0 and metrics["samples"] == 20
    done = spawn(*words, cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"distill.py: error: .*--resume goes on.*\n", done.stderr)


@pytest.mark.slow
def test_the_command_of_text_itself(pipeline, tmp_path):
    words = "--steps 3 --batch 8 --every 16 --samples 40 --device cpu --threads 1 --out run --teacher".split()
    done = spawn(ROOT / "edm/distill_pixart.py", *words, pipeline, cwd=tmp_path)
    assert done.returncode == 0 and "finished after 3 steps" in done.stdout, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 0 <= metrics["student_follows"] <= 1 and metrics["samples"] == 40
    assert metrics["student_fd"] > metrics["floor_fd"] > 0 and sum(metrics["teacher_class_histogram"]) == 40
