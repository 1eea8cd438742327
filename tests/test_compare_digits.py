"""The study on digits: its scores are distill.py's own, it resumes, and says what is wrong."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from edm import compare_digits, distill
from edm.config import DISTILLATIONS, PRESETS, settings
from edm.quality.arms import ARMS
from edm.quality.study_report import figure_of, final, table

ROOT = Path(__file__).parents[1]
TINY = "--seeds 2 --steps 6 --teacher-steps 5 --samples 100 --jobs 1".split()
FEW = ["--arms", "default", "sid-karras-w", *TINY]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A small network, no warm-up, and runs in this process, which accelerate is made to forget."""

    def here(jobs, name, todo):
        for work, *rest in todo:
            AcceleratorState._reset_state()
            work(*rest)

    network = PRESETS["digits"]["network"] | dict(model_channels=8, num_blocks=1)
    monkeypatch.setitem(PRESETS["digits"], "network", network)
    monkeypatch.setitem(DISTILLATIONS, "digits", DISTILLATIONS["digits"] | dict(warmup=1))
    monkeypatch.setattr(compare_digits, "work_off", here)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def study(*words):
    return compare_digits.cli([*FEW, "--out", "study", *words])


def rows():
    with open("study/study.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_arms_are_figure_2_and_differ_in_what_they_name():
    students, teachers = compare_digits.plan(compare_digits.parse_args([]))
    assert len(students) == 39 and [teachers[seed].seed for seed in range(3)] == [0, 1, 2]
    usual = settings(students["default", 0])
    for (arm, seed), cfg in students.items():
        assert cfg.teacher == f"{teachers[seed].out}/teacher.safetensors" and cfg.seed == seed
        changed = {k for k, v in settings(cfg).items() if v != usual[k]} - {"seed", "teacher"}
        takes_no_c = {"c"} if "sid-" in arm or arm == "full-l2" else set()
        assert changed == set(ARMS[arm]) | takes_no_c
        assert (cfg.method == "sid") == arm.startswith("sid-") and (cfg.weighting == "sid") == arm.endswith(
            "-w"
        )
        assert (cfg.sigma_distribution == "karras") == ("karras" in arm)
    corners = {(cfg.method, cfg.sigma_distribution, cfg.weighting) for cfg in students.values()}
    assert corners == {("sim", "edm", "one"), ("full", "edm", "one")} | {
        (method, levels, weight)
        for method in ("sim", "sid")
        for levels in ("sim", "karras")
        for weight in ("one", "sid")
    }


def test_the_names_of_the_arms_say_what_they_set():
    words = ["--task", "text", "--seeds", "1", "--arms", "means", "widths", "start", "b3"]
    students, _ = compare_digits.plan(compare_digits.parse_args(words))
    assert len(students) == 12 + 24 + 6 + 7
    usual = students["preset", 0]
    for (arm, _), cfg in students.items():
        named = re.fullmatch(r"(both|theta)([+-]\d)-([\d.]+)", arm)
        drawn = (float(named[2]), float(named[3])) if named else (None, None)
        assert (cfg.sigma_mean, cfg.sigma_std) == drawn
        assert (cfg.fake_sigma_mean, cfg.fake_sigma_std) == (
            drawn if arm.startswith("both") else (None, None)
        )
        begins = float(arm[6:]) if arm.startswith("start-") else usual.sigma_init
        assert cfg.sigma_init == begins
        b3 = arm.startswith("b3-")
        assert (cfg.sigma_distribution != usual.sigma_distribution) == b3
        assert (cfg.fake_sigma_distribution != usual.fake_sigma_distribution) == (b3 and arm != "b3-theta")
        assert (cfg.weighting == "noise") == (arm == "b3-noise-both")
        weight = {"b3-denoised": "one", "b3-noise": "noise", "b3-noise-both": "noise"}
        assert cfg.fake_weighting == weight.get(arm, usual.fake_weighting)


def test_a_score_is_what_distill_measures(capsys, monkeypatch):
    monkeypatch.setattr(compare_digits, "LOOKS", 2)
    assert study() == 0
    found = {(row["arm"], row["seed"], row["step"]): row for row in rows()}
    assert len(found) == 2 * (1 + 2 * 3)  # one for a teacher, three for a student: 0, 3, 6
    students, _ = compare_digits.plan(compare_digits.parse_args([*FEW, "--out", "study"]))
    AcceleratorState._reset_state()
    alone = dataclasses.replace(students["sid-karras-w", 1], out="alone", every=10**9)
    assert distill.main(alone) == 0
    metrics = json.loads(Path("alone/metrics.json").read_text("utf-8"))
    for name in ("fd", "precision", "recall"):
        assert float(found["sid-karras-w", "1", "6"][name]) == pytest.approx(metrics[f"student_{name}"])
        assert float(found["teacher", "1", "5"][name]) == pytest.approx(metrics[f"teacher_{name}"])
    assert (
        json.loads(Path("study/teacher-1/scores.json").read_text("utf-8"))["floor_fd"] == metrics["floor_fd"]
    )
    assert found["default", "0", "0"]["fd"] != found["default", "0", "6"]["fd"]
    text = Path("study/study.md").read_text("utf-8")
    assert "| sid-karras-w |" in text and "4 of 4 runs" in capsys.readouterr().out
    assert Path("study/study.png").stat().st_size > 5000 and Path("study/runs/default-0/looks.npz").exists()


def test_what_is_recorded_is_not_repeated_and_other_settings_are_refused(capsys):
    assert study("--seeds", "1", "--arms", "default") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("study/runs").rglob("*")}
    assert study("--seeds", "1", "--arms", "default") == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("study/runs").rglob("*")}
    capsys.readouterr()
    assert study("--seeds", "1", "--arms", "default", "--steps", "7") == 2
    err = capsys.readouterr().err
    assert "holds a run of other settings" in err and err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in Path("study/runs").rglob("*")}
    scores, looks = Path("study/runs/default-0/scores.json"), Path("study/runs/default-0/looks.npz")
    looks.write_bytes(looks.read_bytes()[:-9])
    assert study("--seeds", "1", "--arms", "default", "--jobs", "0") == 2
    assert "looks.npz: damaged" in capsys.readouterr().err
    changed = scores.read_text("utf-8").replace('"fd": ', '"fd": 1', 1)
    for damaged in ("{", "[]", "[" * 10**6, changed):
        scores.write_text(damaged, "utf-8")
        assert study("--seeds", "1", "--arms", "default") == 2
        assert "is damaged; remove study/runs/default-0" in capsys.readouterr().err


def test_a_run_that_diverges_is_infinitely_far(monkeypatch):
    monkeypatch.setitem(ARMS, "sid-karras-w", dict(lr=1e30, lr_end=1.0))
    assert study("--seeds", "1") == 0
    status = {row["arm"]: row["status"] for row in rows()}
    assert status == {"teacher": "finished", "default": "finished", "sid-karras-w": "diverged"}
    assert "| sid-karras-w | inf | inf | 0.00 | 0.00 |" in Path("study/study.md").read_text("utf-8")
    before = Path("study/runs/sid-karras-w-0/scores.json").stat().st_mtime_ns
    assert study("--seeds", "1") == 0
    assert before == Path("study/runs/sid-karras-w-0/scores.json").stat().st_mtime_ns


def made(arm, seed, step, fd, status="finished"):
    return dict(arm=arm, seed=seed, status=status, step=step, fd=fd, precision=fd / 10, recall=0.5)


def test_medians_are_of_the_last_scores_and_curves_of_all():
    runs = [made("a", seed, step, step + seed) for seed in range(3) for step in (0, 4)]
    runs += [made("a", 3, 0, 1.0, "diverged"), *(made("teacher", seed, 9, 2.0) for seed in range(4))]
    found = final(runs)
    assert found["a"]["fd"] == [4, 5, 6, math.inf] and found["a"]["precision"] == [0.4, 0.5, 0.6, 0.0]
    args = compare_digits.parse_args([])
    assert "| a | 4.00, 5.00, 6.00, inf | 5.50 | 0.45 | 0.50 |" in table(found, 1.0, args, 1000)
    figure = figure_of(runs, 1.0, {}, {"one": ["a"], "other": ["b"]})
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert curves["a"] == [[0, 1], [4, 5]] and {y for _, y in curves["teacher, 35 evaluations"]} == {2}
    assert "a" not in [line.get_label() for line in figure.axes[1].get_lines()]


@pytest.mark.parametrize("words, message", [
    ("--arms ddim", "invalid choice: 'ddim'"),
    ("--seeds 0", "--seeds must be at least 1"),
    ("--seeds 1001", "--seeds must be at most 1,000"),
    ("--jobs=-1", "--jobs must be 0 or more"),
    ("--samples 4", "--samples must be at least 5"),
    ("--steps 0", "--steps must be at least 1"),
    ("--teacher-steps 0", "--teacher-steps must be at least 1"),
    ("--jobs 0", "nothing is recorded"),
])  # fmt: skip
def test_wrong_inputs_are_one_line(words, message, capsys):
    try:
        code = study(*words.split())
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1 and not Path("study").exists()


def start(*words):
    """The study in a process of its own, which Ctrl-C reaches even where pytest itself is deaf to it."""
    command = [sys.executable, str(ROOT / "edm/compare_digits.py"), *words]
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, preexec_fn=hears)


def workers(process):
    """Its children, which its threads started."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [Path("/proc") / pid for thread in threads for pid in thread.read_text().split()]


def wait_for(condition):
    deadline = time.time() + 600
    while not condition() and time.time() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in Linux's /proc")
def test_a_stopped_and_killed_study_ends_as_if_left_alone(tmp_path):
    words = "--arms default no-share --seeds 1 --steps 72 --teacher-steps 9 --samples 20 --jobs 2"
    words = [*words.split(), "--out"]
    for number, step in ((signal.SIGINT, b'"12"'), (signal.SIGKILL, b'"60"')):
        process = start(*words, "stopped")
        scores = lambda step=step: [
            step in p.read_bytes() for p in Path("stopped").glob("runs/*/scores.json")
        ]
        wait_for(lambda scores=scores: any(scores()))
        alive = workers(process)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=300)
        if number == signal.SIGINT:
            assert process.returncode == 130 and "stopped; the same command goes on" in err
        wait_for(lambda alive=alive: not any(path.exists() for path in alive))
    for out in ("stopped", "alone"):
        process = start(*words, out)
        stdout, err = process.communicate(timeout=900)
        assert process.returncode == 0 and "2 of 2 runs" in stdout, err
    scores = {out: [json.loads(p.read_text())["scores"] for p in sorted(Path(out).glob("runs/*/scores.json"))]
              for out in ("stopped", "alone")}  # fmt: skip
    for runs in scores.values():
        for run in runs:
            for row in run.values():
                del row["seconds"], row["images_per_second"]
    assert scores["stopped"] == scores["alone"] and scores["alone"][0] != scores["alone"][1]


@pytest.mark.slow
def test_a_worker_that_fails_stops_the_study_with_its_reason(tmp_path):
    words = "--arms default --seeds 1 --steps 5 --teacher-steps 5 --samples 20 --jobs 1 --out study".split()
    process = start(*words)
    wait_for(lambda: Path("study/teacher-0/scores.json").exists())
    process.kill()
    process.communicate()
    Path("study/teacher-0/teacher.safetensors").write_bytes(b"no network")
    process = start(*words)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "teacher.safetensors" in err and "a run failed (2)" in err
    assert "Traceback" not in err
