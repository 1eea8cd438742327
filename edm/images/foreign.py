"""Foreign files: what reading one may cost, and what is said of it."""

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from toy.files import UserError, printable

MAX_JSON = 2**24  # bytes: settings, an index of weights, the answers of one participant


class Budget:
    """What a reader may spend, of anything: above what honest files need, far below what a bomb asks for."""

    def __init__(self, left: int, words: str):
        self.left, self.words = left, words

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise UserError(self.words)


def expanding(stored: int) -> Budget:
    """The budget of bytes that may come out of so many.  Deflate alone makes 1032 of one."""
    return Budget(2**28 + 100 * stored, "expands to more than a hundred times its bytes, and 256 MB")


def read_json(path: str | Path) -> Any:
    with open(path, "rb") as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise UserError(f"larger than the {MAX_JSON:,} bytes that such a file may have")
    return loads(text.decode("utf-8-sig"))


def loads(text: str) -> Any:
    """JSON without NaN; diffusers' own schedulers have -Infinity."""
    return json.loads(text, parse_constant=number)


def number(word: str) -> float:
    if word == "NaN":
        raise UserError("NaN in it is no number")
    return float(word)


@cache
def tell(line: str, stream="stderr") -> None:
    """Print it once: a command may load a file more than once."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=getattr(sys, stream))
