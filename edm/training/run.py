"""A run's folder as the image and text commands use it: toy/folder.py's, with a log."""

import math
from typing import Any

from edm.config import Training, settings
from toy.files import write_rows
from toy.folder import Folder


class Run(Folder):
    """The folder of one run.  Only the first process writes; every process may read.

    log.csv     one row per look; the same in tensorboard/, where TensorBoard is installed
    """

    def __init__(self, cfg: Training, first=True):
        """Take the folder.  UserError if it is in use, holds another run, or one that is not resumed."""
        super().__init__(cfg.out, settings(cfg), cfg.keep)
        self.first, self.history = first, []
        if not first:
            return
        self.claim(cfg.resume)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.path / "tensorboard")
        except ImportError:
            self.board = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        super().save(step, state | {"history": self.history})

    def load(self, say=print) -> dict[str, Any] | None:
        state = super().load(say)
        self.history = state["history"] if state else []
        return state

    def log(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if not self.first:
            return
        write_rows(self.path / "log.csv", self.history, digits=6)
        for name, value in row.items() if self.board else ():
            if not math.isnan(value):
                self.board.add_scalar(name, value, row["images"])
