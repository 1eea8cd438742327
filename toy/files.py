"""Files that are whole or absent, locks, and errors of one line that name theirs.  Toy's and edm's alike."""

import csv
import errno
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036, pip cannot say it
    sys.exit(f"needs Python 3.11 or newer, and this is {platform.python_version()}")

import filelock
import torch


class UserError(Exception):
    """Something the user can put right: one line, exit code 2."""

    code = 2


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a new neighbour to write to, file or folder, then rename it: nobody, even after a crash, meets
    half of it.  OSError of one line, naming the path, whatever the writer's library raises for a full disk.
    """
    path = Path(path)
    temporary = path.with_name("tmp-" + path.name)
    while os.path.lexists(temporary):  # somebody's, or a killed process's: outside a run's folder, who knows
        temporary = temporary.with_name("tmp-" + temporary.name)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FileExistsError(errno.EEXIST, "a device, or the like")
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # else a power cut may keep the new name and lose the contents
        os.replace(temporary, path)
    except Exception as error:
        if not (isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise OSError(f"{path}: cannot be written ({reason})") from None
    finally:
        remove(temporary)


def printable(text: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(text))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn every error into a UserError of one line that names the file.  A pipe could wait for ever."""
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise UserError("a device, or the like")
        yield
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif not isinstance(error, UserError):
            line = " ".join(reason.split())[:100]
            reason = f"damaged, or of another kind ({type(error).__name__}: {line})"
        raise UserError(printable(f"{path}: {reason}")) from None


def write_json(path: str | Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def signature(record: dict) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]


def write_record(path: str | Path, record: dict) -> None:
    """A dictionary that knows whether it was changed."""
    write_json(path, record | {"digest": signature(record)})


def read_record(path: str | Path, whole: str | Path | None = None) -> dict:
    """What `write_record` wrote.  UserError if damaged; whole: what to remove then, if not path alone."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        sound = record.pop("digest", None) in (None, signature(record))  # older ones have none
    except (ValueError, AttributeError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged; remove {whole or 'it'}, and its run will be repeated")
    return record


def write_rows(path: str | Path, rows: Sequence[dict], digits: int | None = None) -> None:
    """A table, of a dictionary per row; what a row lacks is nan."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="nan")
        writer.writeheader()
        for row in rows:
            short = digits and {k: f"{v:.{digits}g}" for k, v in row.items() if isinstance(v, float)}
            writer.writerow(row | (short or {}))


def check_writable(path: str | Path) -> None:
    """Raise UserError unless a file can be written there, with the folders it lacks.  Leaves nothing."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    try:
        if Path(path).exists() and not Path(path).is_file():  # a folder, a device
            raise FileExistsError(errno.EEXIST, "there is something else of this name")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_new(path: str | Path, folder=False) -> None:
    """Raise UserError if it exists: nothing is overwritten; or cannot be made.  folder: an empty one may be
    there."""
    path = Path(path)
    empty = folder and path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not empty:
        raise UserError(f"{path}: exists already, and nothing is overwritten; choose another name")
    check_writable(path / "a" if empty else path)


def check_ours(path: str | Path, mark: str) -> None:
    """Raise UserError unless a file can be written there, over one of ours at most: those have this mark."""
    check_writable(path)
    if Path(path).exists():
        with open(path, "rb") as file:
            if mark.encode() not in file.read(2**20):
                raise UserError(f"{path} is something else, and is not written over; choose another name")


def check_apart(*paths) -> None:
    """Raise UserError if one of them is another, or lies in it; None is no path."""
    for a, b in itertools.permutations(filter(None, paths), 2):
        if Path(a).resolve().is_relative_to(Path(b).resolve()):
            raise UserError(f"{a}: what is written to {b} takes this place; choose another name")


def digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def lock(path: str | Path, what: str | Path | None = None) -> filelock.BaseFileLock:
    """Take a lock file -> what holds it as long as it lives.  UserError, naming what, if another has it."""
    what = what or Path(path).parent
    os.stat(Path(path).absolute().parent)  # which filelock would make
    held = filelock.FileLock(path, is_singleton=True)  # twice in one process is no contest
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{what} is in use by another process") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError)):
            raise
        print(f"no locks on this file system: start nothing else on {what}", file=sys.stderr)
    return held


def versions() -> dict[str, str | None]:
    """What besides the settings decides the numbers: software, and the commit where git knows it."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}
