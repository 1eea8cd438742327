"""Runs killed at their file events, of every kind of training: all end in the bits of the run left alone.

A process that has imported everything forks one child for each run; the child counts what Python does to
files below the run's folder, and kills itself before the one with its number.
"""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EVENTS = {"open", "fsync", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
EVERY = {"plane": 10, "images": 31, "text": 31}  # of which events one is tried, if not all (--thorough)


def plane():
    from tests import test_train_2d as t

    def run(out):
        given = t.TINY | dict(steps=4, samples=50, no_pictures=True)
        t.train_2d.main(t.resolve(t.Config(**given, out=out, resume=True)))
        return 0

    def record(out):
        rows = list(csv.DictReader((Path(out) / "log.csv").read_text().splitlines()))
        weights = list(t.state_of(out)["generator"].values())
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], weights

    return run, record


def images():
    from edm.config import PRESETS, TEACHERS
    from tests import small as t

    t.quick()
    PRESETS["digits"]["network"] = t.UNET
    TEACHERS["digits"] = dict(steps=6, batch=8, lr=1e-3, every=16)
    t.distill.compare = lambda *args: {}
    t.judge.classifier_features = lambda data, cache: t.Pixels()
    given = dict(teacher=None, data="digits", steps=6, evaluate_every=16)
    return lambda out: t.run("--resume", out=out, **given), t.record


def text():
    from edm.config import TEACHERS
    from tests import small_text as t

    t.small.quick()
    t.digits.TRANSFORMER = t.SMALL
    TEACHERS["pixart-digits"] = dict(steps=4, batch=8, lr=1e-3, every=16, vae_steps=2)
    t.captions.Reader = t.captions.compare = lambda *given: {}
    return lambda out: t.run("--resume", out=out, teacher=None, steps=4), t.record


def serve(kind):
    """For each line "folder number" of stdin: a run into the folder, killed before that event -> its end."""
    run, _ = {"plane": plane, "images": images, "text": text}[kind]()
    fsync = os.fsync
    os.fsync = lambda file: (sys.audit("fsync"), fsync(file))
    for line in sys.stdin:
        out, at = line.split()
        if not (child := os.fork()):
            os._exit(counted(run, out, int(at)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def counted(run, out, at):
    """Runs, and leaves the number of events beside the folder."""
    seen = []

    def hook(event, args):
        writing = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
        if event in EVENTS and writing and (event == "fsync" or str(args[0]).startswith(out + "/")):
            seen.append(event)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)

    said = os.open(out + ".said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.addaudithook(hook)
    code = run(out)
    Path(out + ".events").write_text(str(len(seen)), encoding="utf-8")
    sys.stdout.flush()
    return code


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_killed_at_file_events_runs_end_in_the_same_bits(kind, thorough, tmp_path):
    if kind != "plane":
        pytest.importorskip("diffusers", reason="edm/requirements.txt is not installed")
    code = f"from tests.test_killed import serve; serve({kind!r})"
    server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True)

    def start(name, at=0):
        server.stdin.write(f"{tmp_path / name} {at}\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    assert start("whole") == 0, (tmp_path / "whole.said").read_text()
    record = {"plane": plane, "images": images, "text": text}[kind]()[1]
    rows, weights = record(tmp_path / "whole")
    events = int((tmp_path / "whole.events").read_text())
    for at in range(1, events + 1, 1 if thorough else EVERY[kind]):
        assert start(f"at-{at}", at) == -signal.SIGKILL
        assert start(f"at-{at}") == 0, (at, (tmp_path / f"at-{at}.said").read_text())
        found = record(tmp_path / f"at-{at}")
        assert found[0] == rows and all(map(torch.equal, found[1], weights)), at
        assert not [*(tmp_path / f"at-{at}").rglob("tmp-*")], at
    server.stdin.close()
    assert server.wait(60) == 0
    print(f"{kind}: {events} events")
