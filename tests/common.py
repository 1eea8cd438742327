"""What many tests need: reference files, and commands, in this process or in others."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edm.config import command_line

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def reference(name):
    """A file that is not part of the repository; without it the test is skipped."""
    if not (REFERENCE / name).exists():
        pytest.skip(f"needs the reference files: no {REFERENCE / name}")
    return REFERENCE / name


def words_of(settings):
    """Of a command line: True is an option by itself, None is left out."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items() if value is not None]
    return [str(word) for pair in pairs for word in pair if word is not True]


def start(main, cls, settings, *more, presets=None):
    """The exit code of a command."""
    try:
        return command_line(main, cls, "", [*words_of(settings), *more], presets)
    except SystemExit as stop:
        return stop.code
    finally:
        gc.collect()  # lets go of a run's folder


def spawn(*words, processes=1, **how):
    """Python with these words, in so many processes -> how it ended and what it said."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, **how)
