"""A run's folder: who may use it, what it is a run of, checkpoints that survive anything, the log."""

import contextlib
import csv
import fcntl
import json
import math
import os
import pickle
import platform
import signal
import subprocess
from pathlib import Path

import torch

from edm.config import UserError, settings
from edm.files import digest, replacing, write_json


def versions():
    """What besides the settings decides the numbers: software, and the commit where git knows it."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}


def check_settings(cfg):
    """Whether cfg.out holds a run of these settings.  Raises UserError if it holds one of others."""
    path, mine = Path(cfg.out) / "config.json", json.loads(json.dumps(settings(cfg)))
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())
        other = [f"{k} {found.get(k)!r}, not {v!r}" for k, v in mine.items() if found.get(k) != v]
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged; choose another --out") from None
    if other:
        raise UserError(f"{cfg.out} holds a run of other settings ({'; '.join(other)})")
    return True


class Run:
    """The folder of one run.  Only the first process writes; every process may read.

    config.json         the settings that decide what it trains
    checkpoints/        STEP-HASH.pt, the newest `keep`: all that is needed to go on
    log.csv             one row per look; the same in tensorboard/, where TensorBoard is installed
    """

    def __init__(self, cfg, first=True):
        """Take the folder.  UserError if it is in use, holds another run, or one that is not resumed."""
        self.path, self.keep, self.first = Path(cfg.out), cfg.keep, first
        self.checkpoints, self.history = self.path / "checkpoints", []
        if not first:
            return
        try:
            self._claim(cfg)
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in [*self.path.glob("tmp-*"), *self.checkpoints.glob("tmp-*")]:
                leftover.unlink()  # a killed process was writing it
        except OSError as error:
            raise UserError(f"cannot use {cfg.out} as a run's folder: {error}") from None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.path / "tensorboard")
        except ImportError:
            self.board = None

    def _lock(self):
        self.lock = open(self.path / ".lock", "a")  # noqa: SIM115, kept open: let go of with the process
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by another process") from None

    def _claim(self, cfg):
        path = self.path / "config.json"
        self.path.mkdir(parents=True, exist_ok=True)
        others = sorted(p.name for p in self.path.iterdir() if p.name not in (".lock", "tmp-config.json"))
        if others and not path.exists():
            raise UserError(f"{self.path} has {', '.join(others[:3])} but no config.json: not a run's folder")
        self._lock()
        if check_settings(cfg) and not cfg.resume:
            raise UserError(f"{self.path} holds this run already; --resume goes on with it")
        write_json(path, settings(cfg))

    # -- checkpoints --

    def files(self):
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("[0-9]*-*.pt"))

    def save(self, step, state):
        """Write a checkpoint, then drop the oldest.  A crash at any instant leaves the earlier ones."""
        staged = self.checkpoints / "tmp-staged.pt"
        with replacing(staged) as temporary:
            try:
                torch.save(state | {"step": step, "history": self.history}, temporary)
            except RuntimeError as error:  # torch's name for a full disk
                raise OSError(f"cannot write to {self.checkpoints}: {error}") from None
        os.replace(staged, self.checkpoints / f"{step:09d}-{digest(staged)}.pt")
        for old in self.files()[: -self.keep]:
            old.unlink()

    def load(self, say=print):
        """The newest checkpoint whose hash is right, or None if there is none at all."""
        files = self.files()
        for path in reversed(files):
            if digest(path) == path.stem.split("-")[1]:
                with contextlib.suppress(RuntimeError, pickle.UnpicklingError, EOFError, KeyError):
                    state = torch.load(path, map_location="cpu", weights_only=True)
                    self.history = state["history"]
                    return state
            say(f"checkpoint {path.name} is damaged; trying the one before it")
        if files:
            raise UserError(f"every checkpoint in {self.checkpoints} is damaged")
        return None

    # -- the log --

    def log(self, row):
        self.history.append(row)
        if not self.first:
            return
        with replacing(self.path / "log.csv") as path, open(path, "w", newline="") as file:
            columns = dict.fromkeys(name for entry in self.history for name in entry)
            writer = csv.DictWriter(file, columns, restval="nan")
            writer.writeheader()
            for entry in self.history:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()})
        for name, value in row.items() if self.board else ():
            if not math.isnan(value):
                self.board.add_scalar(name, value, row["images"])


@contextlib.contextmanager
def stop_on_signal():
    """Yields a list that Ctrl-C or SIGTERM appends to, so that training ends between two steps."""
    received = []

    def handler(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it
        received.append(number)

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's
        before = {}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
