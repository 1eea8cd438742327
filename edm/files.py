"""Files that are whole or absent, and errors of one line that name theirs."""

import errno
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from edm.config import UserError


@contextmanager
def replacing(path):
    """Yield a neighbour to write to, then rename it: neither a reader nor a crash meets half a file."""
    path = Path(path)
    temporary = path.with_name("tmp-" + path.name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the contents
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path):
    """Turn every error into a UserError of one line that names the file."""
    try:
        yield
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif not isinstance(error, UserError):
            line = " ".join(reason.split())[:100]
            reason = f"damaged, or of another kind ({type(error).__name__}: {line})"
        text = f"{path}: {reason}"
        raise UserError("".join(c if c.isprintable() else "?" for c in text)) from None


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def check_writable(path):
    """Raise UserError unless a file can be written there, with the folders it lacks.  Leaves nothing."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
