"""The study of choices: its rows are the runs' own numbers, it resumes, and says what is wrong."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from toy import compare_2d
from toy.study_report import FIGURE2, NUMBERS, band, figure_of, over_floor, summarise, table

ROOT = Path(__file__).parents[1]
TINY = "--quick --arms default l2 --seeds 2 --steps 4 --jobs 1".split()


@pytest.fixture(autouse=True)
def short_teachers(monkeypatch):
    """Workers are new processes, which see no patch: they are replaced by this one."""
    monkeypatch.setattr(compare_2d, "QUICK_COMMON", compare_2d.COMMON | dict(teacher_steps=5, samples=200))
    compare_2d.KEPT.clear()


def here(configs, jobs):
    for cfg in configs:
        if not compare_2d.record_of(cfg).exists():
            compare_2d.run_one(cfg)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("once") / "study"


@pytest.fixture
def study(once, tmp_path, monkeypatch):
    """A copy of a study that was made once."""
    monkeypatch.setattr(compare_2d, "train", here)
    if not once.exists():
        assert compare_2d.cli([*TINY, "--out", str(once)]) == 0
    return Path(shutil.copytree(once, tmp_path / "study"))


def rows(study):
    with open(study / "study.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_numbers_of_the_runs(study):
    records = [json.loads(path.read_text()) for path in (study / "runs").glob("*.json")]
    found = {(r["settings"]["distance"], r["settings"]["seed"]): r["metrics"] for r in records}
    names = {"default": "pseudo_huber", "l2": "l2"}
    assert len(rows(study)) == len(found) == 4
    for row in rows(study):
        metrics = found[names[row["arm"]], int(row["seed"])]
        assert float(row["energy_distance"]) == metrics["energy_distance"] and row["status"] == "finished"
        ratio = metrics["energy_distance"] / metrics["energy_distance_floor"]
        assert float(row["energy_over_floor"]) == pytest.approx(ratio)
        assert float(row["high_quality"]) == metrics["high_quality"]
    table = (study / "study.md").read_text()
    assert "| default |" in table and "| l2 |" in table and (study / "study.png").stat().st_size > 1000
    assert [p for p in (study / "runs").iterdir() if p.suffix != ".json"] == []


def test_arms_start_from_the_same_teacher(study):
    by_seed = {}
    for row in rows(study):
        by_seed.setdefault(row["seed"], set()).add(row["teacher_energy_distance"])
    assert all(len(found) == 1 for found in by_seed.values()) and by_seed["0"] != by_seed["1"]


def test_what_is_recorded_is_not_repeated(study):
    before = {path: path.stat().st_mtime_ns for path in (study / "runs").iterdir()}
    removed = min(before)
    content = compare_2d.read_record(removed)
    removed.unlink()
    assert compare_2d.cli([*TINY, "--out", str(study)]) == 0
    after = {path: path.stat().st_mtime_ns for path in (study / "runs").iterdir()}
    assert {p for p in before if before[p] != after[p]} == {removed}
    again = compare_2d.read_record(removed)
    for record in (content, again):  # the same numbers, but for time
        record["log"].pop("seconds"), record["metrics"].pop("train_seconds")
    assert again == content


def test_an_arm_that_fails_is_recorded_and_shown(tmp_path, monkeypatch):
    def broken(cfg, teach):
        raise ValueError("no such thing")

    monkeypatch.setattr(compare_2d, "train", here)
    monkeypatch.setattr(compare_2d.train_2d, "main", broken)
    assert compare_2d.cli([*TINY, "--out", str(tmp_path)]) == 0
    assert {(r["status"], r["error"]) for r in rows(tmp_path)} == {("failed", "ValueError: no such thing")}
    lines = [line for line in (tmp_path / "study.md").read_text().splitlines() if line.startswith("| l2")]
    assert lines[0].split("|")[-2].strip() == "2" and "-" in lines[0]


def test_medians_and_ranges_over_seeds():
    def row(energy, reached, status="finished"):
        numbers = dict(energy_over_floor=energy, high_quality=energy / 10, modes_covered=8, seconds=1.0)
        return dict(arm="a", target="ring", status=status, steps_to_twice_floor=reached) | numbers

    made = [row(3.0, 5), row(1.0, math.inf), row(2.5, 9)]
    found = summarise(made)["a", "ring"]
    assert found["energy_over_floor"] == (2.5, 1.0, 3.0) and found["modes_covered"] == (8, 8, 8)
    assert found["steps_to_twice_floor"] == (9, 5, math.inf) and (found["runs"], found["broken"]) == (3, 0)
    # one run that broke, however good its last numbers, is the worst of three
    found = summarise([*made[:2], row(0.5, 9, status="diverged")])["a", "ring"]
    assert found["energy_over_floor"] == (3.0, 1.0, math.inf) and found["broken"] == 1
    assert found["high_quality"] == (0.1, 0.0, 0.3) and found["modes_covered"] == (8, 0, 8)
    line = [t for t in table({("a", "ring"): found}, 7, {"c"}).splitlines() if t.startswith("| a ")]
    assert line == [
        "| a | 3 (1 to -) | 10.0% (0.0% to 30.0%) | 8 (0 to 8) | - (5 to -) | 1 (1 to -) | 3 | 1 |"
    ]


def test_the_kept_teacher_changes_no_number(study, tmp_path):
    """The second arm found its teacher ready; train_2d by itself trains one and ends in the same place."""
    args = compare_2d.parse_args([*TINY, "--out", str(study)])
    cfg = compare_2d.plan(args)["l2", "ring", 1]
    found = compare_2d.read_record(compare_2d.record_of(cfg))["metrics"]
    alone = compare_2d.train_2d.main(compare_2d.replace(cfg, out=str(tmp_path / "alone")))
    assert {k: v for k, v in found.items() if k != "train_seconds"} == {
        k: v for k, v in alone.items() if k != "train_seconds"
    }


def test_a_failing_arm_leaves_the_others_alone(study, monkeypatch):
    good, rest = compare_2d.train_2d.main, [row for row in rows(study) if row["arm"] == "default"]

    def broken(cfg, teach):
        return good(cfg, teach) if cfg.distance == "pseudo_huber" else 1 / 0

    monkeypatch.setattr(compare_2d.train_2d, "main", broken)
    for path in (study / "runs").glob("*.json"):
        if json.loads(path.read_text())["settings"]["distance"] == "l2":
            path.unlink()
    assert compare_2d.cli([*TINY, "--out", str(study)]) == 0
    found = rows(study)
    assert [row for row in found if row["arm"] == "default"] == rest
    assert [r["error"] for r in found if r["arm"] == "l2"] == ["ZeroDivisionError: division by zero"] * 2
    lines = {line.split(" | ")[0]: line for line in (study / "study.md").read_text().splitlines()}
    assert lines["| l2"].endswith("| 2 | 2 |") and lines["| default"].endswith("| 2 | 0 |")


def test_a_run_that_diverges_is_recorded_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_2d, "train", here)
    monkeypatch.setitem(compare_2d.ARMS, "l2", dict(lr=1e30, schedule="constant"))
    words = [*TINY, "--arms", "l2", "--steps", "40", "--out", str(tmp_path)]
    assert compare_2d.cli(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert [r["status"] for r in rows(tmp_path)] == ["diverged"] * 2 and len(before) == 2
    assert compare_2d.cli(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}


def test_figure_has_a_curve_for_each_arm_of_figure_2(study):
    args = compare_2d.parse_args([*TINY, "--arms", "sigma-sim", "sid-sigma-sim", "--out", str(study)])
    configs = compare_2d.plan(args)
    here(configs.values(), 1)
    records = {key: compare_2d.read_record(compare_2d.record_of(cfg)) for key, cfg in configs.items()}
    figure = figure_of(summarise([compare_2d.row_of(*item) for item in records.items()]), records,
                       compare_2d.GROUPS)  # fmt: skip
    labels = {text for ax in figure.axes for text in ax.get_legend_handles_labels()[1]}
    assert labels == {"SIM", "SiD"}
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    for label, arm in (("SIM", "sigma-sim"), ("SiD", "sid-sigma-sim")):
        logs = [over_floor(record) for (name, *_), record in records.items() if name == arm]
        assert curves[label] == pytest.approx([sum(pair) / 2 for pair in zip(*logs, strict=True)])


def test_a_log_that_ends_early_is_infinitely_far_after_it():
    def record(*energies):
        return dict(metrics=dict(energy_distance_floor=1.0), settings=dict(samples=2000),
                    log=dict(step=list(range(len(energies))), energy_distance=energies))  # fmt: skip

    steps, median, low, high = band([record(9, 4, 3), record(8, 2), record(9, 5, 1)])
    assert steps == [0, 1, 2] and median.tolist() == [9, 4, 3]
    assert low.tolist() == [8, 2, 1] and high.tolist() == [9, 5, math.inf]


def test_twice_the_floor_is_reached_at_the_first_such_look():
    log = dict(step=[0, 5, 9], energy_distance=[99.0, 4.1, 3.9], seconds=[1.0, 2.0, 6.0])
    metrics = dict.fromkeys(NUMBERS, 1.0) | dict(energy_distance=3.0)
    record = dict(status="finished", metrics=metrics, log=log, settings=dict(samples=4000))  # a log of 2,000
    row = compare_2d.row_of(("a", "ring", 0), record)
    assert (row["steps_to_twice_floor"], row["seconds"], row["energy_over_floor"]) == (9, 5.0, 3.0)
    log["energy_distance"][2] = 4.1
    assert compare_2d.row_of(("a", "ring", 0), record)["steps_to_twice_floor"] == math.inf


def test_the_arms_of_figure_2_exist():
    arms = {label: compare_2d.ARMS[arm] for panel in FIGURE2.values() for label, (arm, *_) in panel.items()}
    assert len({arm for panel in FIGURE2.values() for arm, *_ in panel.values()}) == 8
    assert all(("SiD" in label[:3]) == (arm.get("method") == "sid") for label, arm in arms.items())
    assert all(("w_SiD" in label) == (arm.get("weighting") == "sid") for label, arm in arms.items())


@pytest.mark.parametrize("words, message", [
    ("--arms l3", "invalid choice: 'l3'"),
    ("--targets moon", "invalid choice: 'moon'"),
    ("--seeds 0", "--seeds must be at least 1"),
    ("--seeds 1001", "--seeds must be at most 1,000"),
    ("--steps 0", "steps must be at least 1"),
    ("--jobs=-1", "--jobs must be 0 or more"),
    ("--jobs 0", "nothing is recorded"),
])  # fmt: skip
def test_wrong_inputs_are_one_line(words, message, tmp_path, capsys):
    try:
        code = compare_2d.cli(["--quick", "--out", str(tmp_path), *words.split()])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_stopped_and_a_killed_study_go_on(tmp_path):
    words = [sys.executable, str(ROOT / "toy/compare_2d.py"), *TINY, "--jobs", "2", "--out", str(tmp_path)]
    runs, first = tmp_path / "runs", {}
    for number in (signal.SIGINT, signal.SIGKILL):
        hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where pytest is deaf to it
        process = subprocess.Popen(words, stdout=-1, stderr=-1, text=True, preexec_fn=hears)
        deadline = time.time() + 600
        while len([*runs.glob("*.json")]) <= len(first) and time.time() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=300)
        if number == signal.SIGINT:
            assert process.returncode == 130 and "stopped; the same command goes on" in err
        before, first = first, {p: p.stat().st_mtime_ns for p in runs.glob("*.json")}
        assert len(first) > len(before) and before.items() <= first.items()
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "4 of 4 runs" in done.stdout, done.stderr
    assert all(p.stat().st_mtime_ns == at for p, at in first.items()) and len(rows(tmp_path)) == 4
