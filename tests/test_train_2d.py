"""The training loop: who moves when, what a checkpoint holds, and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toy import train_2d
from toy.config import Config, check, parse_args, resolve
from toy.files import UserError
from toy.folder import Folder
from toy.mixtures import make_target

ROOT = Path(__file__).parents[1]
TINY = dict(steps=12, teacher_steps=5, warmup=3, batch=16, width=8, samples=400)


def config(tmp_path, **changes):
    return resolve(Config(**TINY | {"out": str(tmp_path / "run")} | changes))


def command(tmp_path, *args, **popen):
    tiny = [word for k, v in TINY.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    args = [
        sys.executable,
        str(ROOT / "toy/train_2d.py"),
        *tiny,
        "--out",
        str(tmp_path / "run"),
        *map(str, args),
    ]
    return subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, **popen
    )


def state_of(folder):
    return Folder(folder, {}).load()


def finished(process, timeout=180):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# --- who moves -----------------------------------------------------------------------------------


def test_looking_does_not_change_the_training(tmp_path, monkeypatch):
    weights = []
    for logs in (2, 12):
        monkeypatch.setattr(train_2d, "LOGS", logs)
        cfg = config(tmp_path, out=str(tmp_path / str(logs)))
        train_2d.main(cfg)
        weights.append(state_of(tmp_path / str(logs))["generator"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# --- checkpoints ---------------------------------------------------------------------------------


def final_state(folder):
    state = state_of(folder)
    return {k: v for part in ("generator", "fake", "ema") for k, v in state[part].items()}, state


def assert_same_run(a, b):
    (weights_a, state_a), (weights_b, state_b) = final_state(a), final_state(b)
    assert state_a["step"] == state_b["step"] and torch.equal(state_a["rng"], state_b["rng"])
    assert all(torch.equal(weights_a[k], weights_b[k]) for k in weights_a)


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole, broken = (config(tmp_path, out=str(tmp_path / name)) for name in ("whole", "broken"))
    train_2d.main(whole)

    class Stop:  # asked before every update of the warm-up, and every step
        calls = 0

        def __bool__(self):
            self.calls += 1
            return self.calls > TINY["warmup"] + 5

    distill = train_2d.distill
    monkeypatch.setattr(train_2d, "distill", lambda *a: distill(*a[:-1], Stop()))
    assert train_2d.main(broken)["status"] == "interrupted"
    assert (tmp_path / "broken/final.png").exists() and (tmp_path / "broken/convergence.gif").exists()
    monkeypatch.setattr(train_2d, "distill", distill)
    metrics = train_2d.main(resolve(Config(**TINY, out=broken.out, resume=True)))
    assert metrics["status"] == "finished" and metrics["steps"] == TINY["steps"]
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
def test_a_killed_process_resumes_to_the_same_bits(tmp_path, number):
    many = ["--steps", "400"]
    process = command(tmp_path, *many)
    log = tmp_path / "run/log.csv"
    while not log.exists() or len(log.read_text().splitlines()) < 8:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    code, _, _ = finished(process)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    if number == signal.SIGINT:  # a picture of what there was, and numbers that say what they are
        assert json.loads((tmp_path / "run/metrics.json").read_text())["status"] == "interrupted"
        assert (tmp_path / "run/final.png").exists() and (tmp_path / "run/convergence.gif").exists()
    assert state_of(tmp_path / "run")["step"] < 400
    assert finished(command(tmp_path, *many, "--resume"))[0] == 0
    (tmp_path / "fresh").mkdir()
    assert finished(command(tmp_path / "fresh", *many))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "fresh/run")


# --- the command line ----------------------------------------------------------------------------


def test_a_run_leaves_everything_it_promises(tmp_path):
    code, out, err = finished(command(tmp_path))
    assert code == 0, err
    run = tmp_path / "run"
    files = ".lock checkpoints config.json convergence.gif final.png log.csv metrics.json samples.npz"
    assert sorted(p.name for p in run.iterdir()) == files.split()
    samples = np.load(run / "samples.npz")
    for name in ("generator", "teacher", "data"):
        assert samples[name].shape == (400, 2) and samples[name].dtype == np.float32
    metrics = json.loads((run / "metrics.json").read_text())
    promised = "energy_distance energy_distance_floor teacher_energy_distance high_quality modes_covered"
    assert {*promised.split(), "mode_weight_error", "train_seconds", "seed", "versions"} <= set(metrics)
    assert metrics["status"] == "finished" and metrics["steps"] == TINY["steps"]
    header, *rows = (line.split(",") for line in (run / "log.csv").read_text().splitlines())
    promised = "step surrogate fake_loss generator_gradient fake_gradient energy_distance divergence_0.5"
    assert {*promised.split(), "fake_error_0.5", "gap_0.5", "sample_mean_x", "sample_std_y"} <= set(header)
    assert [row[0] for row in rows] == [str(i) for i in range(TINY["steps"] + 1)]
    assert Image.open(run / "convergence.gif").n_frames == len(rows)
    assert json.loads((run / "config.json").read_text())["batch"] == TINY["batch"]
    assert "modes covered" in out and "step/s" in err

    # samples.npz is one evaluation of the saved average on the seed's latents
    state = state_of(run)
    cfg = resolve(Config(**TINY))
    network = train_2d.Generator(train_2d.make_denoiser(cfg, make_target("ring")), cfg.sigma_init)
    network.load_state_dict(
        {k.removeprefix("module."): v for k, v in state["ema"].items() if k != "n_averaged"}
    )
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(cfg.seed + 2))
    with torch.no_grad():
        assert np.abs(network(z).numpy() - samples["generator"]).max() < 1e-6


BAD = [
    (["--target", "mnist"], "mnist"),
    (["--distance", "lpips"], "lpips"),
    (["--distance", "power", "--alpha", "3"], "alpha.*3"),
    (["--c", "0"], "c must.*0"),
    (["--distance", "l2", "--c", "1"], "l2.*c"),
    (["--method", "sid", "--c", "1"], "sid.*c"),
    (["--sigma-init", "-1"], "sigma-init.*-1"),
    (["--steps", "-5"], "steps.*-5"),
    (["--steps", "many"], "many"),
    (["--batch", "0"], "batch.*0"),
    (["--ema", "1"], "ema.*1"),
    (["--lr", "nan"], "lr.*nan"),
    (["--device", "abacus"], "abacus"),
    (["--device", "meta"], "--device meta: torch cannot use it here"),
    (["--device", "mps"], "--device mps: torch cannot use it here"),
    (["--nonsense"], "nonsense"),
    (["--method", "density", "--weighting", "sid"], "density"),
    (["--method", "diff_instruct", "--space", "score"], "--space denoised"),
    (["--seed", str(2**64)], "seed must be at most 9,223"),
    (["--alpha", "nan"], "alpha must be a finite number"),
    (["--out", ""], "out is empty"),
]


@pytest.mark.parametrize("args, message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        sys.exit(train_2d.cli(["--out", str(tmp_path / "run"), *args]))
    err = capsys.readouterr().err
    assert error.value.code == 2 and len(err.strip().splitlines()) == 1 and re.search(message, err)
    assert not list(tmp_path.glob("run/*")), "nothing was written"


def test_nothing_is_overwritten(tmp_path):
    assert finished(command(tmp_path))[0] == 0
    contents = lambda: {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    before = contents()
    for args, message in (
        (["--steps", "13"], "steps 12, not 13"),
        (["--width", "9", "--resume"], "width 8, not 9"),
        (["--seed", "1"], "seed 0, not 1"),
    ):
        code, _, err = finished(command(tmp_path, *args))
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert contents() == before


@pytest.mark.parametrize("damage", ["missing", "newest", "all"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(tmp_path, damage, capsys):
    """A single flipped bit, which torch does not notice; without any checkpoint a run begins anew."""
    cfg = config(tmp_path)
    train_2d.main(cfg)
    usual, files = state_of(cfg.out), Folder(cfg.out, {}).files()
    assert [int(path.name.split("-")[0]) for path in files] == [11, 12]
    for path in {"missing": files, "newest": files[1:], "all": files}[damage]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink() if damage == "missing" else path.write_bytes(content)
    again = resolve(Config(**TINY, out=cfg.out, resume=True))
    if damage == "all":
        with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
            train_2d.main(again)
    else:
        train_2d.main(again)
        assert ("000000012" in capsys.readouterr().out) == (damage == "newest")
        pairs = zip(usual["ema"].values(), state_of(cfg.out)["ema"].values())
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_folder_with_files_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/final.png").write_text("mine")
    with pytest.raises(UserError, match=r"final\.png but no config\.json"):
        train_2d.main(config(tmp_path))
    assert (tmp_path / "run/final.png").read_text() == "mine"


def test_two_runs_in_one_folder(tmp_path):
    first = command(tmp_path, "--steps", "400")
    while not (tmp_path / "run/log.csv").exists():
        time.sleep(0.02)
    code, _, err = finished(command(tmp_path, "--steps", "400"))
    assert code == 2 and "is in use by another process" in err and err.count("\n") == 1
    assert finished(first)[0] == 0


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(state, path):
        path.write_text("half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    tiny = [word for k, v in TINY.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    assert train_2d.cli([*tiny, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "tmp-staged.pt: cannot be written (No space left" in err
    left = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    assert left == [".lock", "checkpoints", "config.json", "log.csv"], "no half a file is left"


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot use"):
        train_2d.main(config(tmp_path, out=str(tmp_path / "file" / "run")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("not json")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        train_2d.main(config(tmp_path, out=str(tmp_path / "other")))
    assert (tmp_path / "file").read_text() == "mine" and (
        tmp_path / "other/config.json"
    ).read_text() == "not json"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot use"):
        train_2d.main(config(tmp_path))


def test_divergence_stops_with_the_last_good_state(tmp_path):
    metrics = train_2d.main(config(tmp_path, lr=1e30, schedule="constant", steps=40))
    assert metrics["status"] == "diverged" and metrics["steps"] < 40
    assert np.isfinite(np.load(tmp_path / "run/samples.npz")["generator"]).all()


def test_presets_hold_the_papers_numbers():
    cfg, _ = parse_args("", ["--preset", "listing1"])
    assert (cfg.batch, cfg.lr, cfg.fake_lr, cfg.beta2, cfg.fake_updates, cfg.network) == (
        2000,
        1e-3,
        1e-3,
        0.999,
        2,
        "vp",
    )
    cfg, _ = parse_args("", ["--preset", "algorithm2", "--lr", "0.5"])
    assert (cfg.sigma_distribution, cfg.fake_sigma_distribution, cfg.weighting) == ("sim", "edm", "one")
    assert (cfg.batch, cfg.sigma_init, cfg.beta2, cfg.lr) == (256, 2.5, 0.999, 0.5), "flags override presets"


def test_names_of_runs_tell_them_apart():
    name = lambda *args: resolve(*parse_args("", args)).out
    assert resolve(Config(target="grid")).width == 128 and resolve(Config(target="grid", width=9)).width == 9
    assert name() == "out/toy/ring" and name("--target", "grid") == "out/toy/grid"
    assert name("--preset", "listing1") == "out/toy/ring-listing1"
    assert name("--seed", "3", "--c", "0.2") == "out/toy/ring-seed_3-c_0.2"
    assert name("--threads", "1") == "out/toy/ring", "what does not change the result is not in the name"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_args("about", ["--help"])
    text = capsys.readouterr().out
    assert "about" in text and all(
        f"--{name.replace('_', '-')}" in text for name in Config.__dataclass_fields__
    )


def test_check_accepts_the_presets():
    for preset in ("default", "listing1", "algorithm2"):
        check(resolve(*parse_args("", ["--preset", preset])))


def test_show_without_a_display_is_refused(tmp_path):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    code, _, err = finished(command(tmp_path, "--show", env=environment))
    assert code == 2 and "--show" in err and len(err.strip().splitlines()) == 1


def test_warnings_in_plain_words(tmp_path):
    """Histories of a healthy run, of a lagging online network, of lost modes and of flying samples."""

    class Bar(list):
        def write(self, text, file):
            self.append(text)

    def row(step, fake_error=0.01, gap=0.02, modes=8, energy=0.01):
        values = {"step": step, "modes": 8, "modes_covered": modes, "energy_distance": energy}
        errors = {"fake_error": fake_error, "gap": gap}
        return values | {f"{k}_{s:g}": v for k, v in errors.items() for s in (0.1, 0.2, 0.5, 1.0)}

    log = train_2d.Log.__new__(train_2d.Log)
    start = row(0, fake_error=0.01, gap=5.0, modes=0, energy=0.4)
    for later, expected in (
        ({}, None),
        ({"fake_error": 0.14, "gap": 0.01}, "lags"),
        ({"modes": 6}, "2 of 8 modes are missing"),
        ({"energy": 1.0}, "leaving the target"),
    ):
        log.cfg, log.progress, log.warned = config(tmp_path, steps=100), Bar(), set()
        history = [start]
        for step in (10, 40, 70, 100):
            history.append(row(step, **later))
            log.warn(history)
        assert len(log.progress) == (expected is not None), "once, and only if something is wrong"
        assert expected is None or (expected in log.progress[0] and "lower --lr" in log.progress[0])
