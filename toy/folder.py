"""A run's folder: who may use it, what it is a run of, and checkpoints that survive anything."""

import contextlib
import json
import os
import pickle
from pathlib import Path

import torch

from toy.files import UserError, digest, lock, remove, replacing, write_json

LOCK = ".lock"


def holds(path: str | Path, settings: dict) -> bool:
    """Whether the folder holds a run of these settings.  Raises UserError if it holds one of others."""
    path = Path(path) / "config.json"
    if not path.exists():
        return False
    mine = json.loads(json.dumps(settings))
    try:
        found = json.loads(path.read_text("utf-8"))
        other = [f"{k} {found.get(k)!r:.99}, not {v!r}" for k, v in mine.items() if found.get(k) != v]
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged; choose another --out") from None
    if other:
        more = ", ..." * (len(other) > 4)
        raise UserError(f"{path.parent} holds a run of other settings ({'; '.join(other[:4])}{more})")
    return True


class Folder:
    """The folder of one run.

    config.json     the settings that decide what it computes
    checkpoints/    STEP-DIGEST.pt, the newest `keep`: all that is needed to go on
    """

    def __init__(self, path: str | Path, settings: dict, keep=2):
        self.path, self.settings, self.keep = Path(path), settings, keep
        self.checkpoints = self.path / "checkpoints"

    def claim(self, resume: bool, again=False) -> None:
        """Take the folder, and remove what a killed process was writing.

        UserError if it is in use, holds another run, this run and neither resume nor again, or other files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            ours = (LOCK, "tmp-config.json")
            others = sorted(p.name for p in self.path.iterdir() if p.name not in ours)
            if others and not (self.path / "config.json").exists():
                found = ", ".join(others[:3])
                raise UserError(f"{self.path} has {found} but no config.json: not a run's folder")
            self.lock = lock(self.path / LOCK)
            if holds(self.path, self.settings) and not (resume or again):
                raise UserError(f"{self.path} holds this run already; --resume goes on with it")
            for leftover in [*self.path.glob("tmp-*"), *self.checkpoints.glob("tmp-*")]:
                remove(leftover)
            write_json(self.path / "config.json", self.settings)
            if not resume:
                remove(self.checkpoints)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {self.path} as a run's folder: {error}") from None

    def files(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("[0-9]*-*.pt"))

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint, then drop the oldest.  A crash at any instant leaves the earlier ones."""
        staged = self.checkpoints / "tmp-staged.pt"
        with replacing(staged) as temporary:
            torch.save(state | {"step": step}, temporary)
        os.replace(staged, self.checkpoints / f"{step:09d}-{digest(staged)}.pt")
        for old in self.files()[: -self.keep]:
            old.unlink()

    def load(self, say=print) -> dict | None:
        """The newest checkpoint whose digest is right, or None if there is none at all."""
        files = self.files()
        for path in reversed(files):
            if digest(path) == path.stem.split("-")[1]:
                with contextlib.suppress(RuntimeError, pickle.UnpicklingError, EOFError):
                    return torch.load(path, map_location="cpu", weights_only=True)
            say(f"checkpoint {path.name} is damaged; trying the one before it")
        if files:
            raise UserError(f"every checkpoint in {self.checkpoints} is damaged")
        return None
