"""Command lines of toy and edm: options with their ranges, one line for every wrong input, signals."""

import argparse
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import sim_core as sim
from toy.files import UserError, check_apart, check_ours, check_writable, printable


class Range(NamedTuple):
    """Where a number may lie, and the words for one that is too low; else it is "at most ..."."""

    low: float
    high: float
    words: str
    strict: str = ""  # "low", "high": the bounds that are not in it

    def __contains__(self, value):
        above = value > self.low if "low" in self.strict else value >= self.low
        return above and (value < self.high if "high" in self.strict else value <= self.high)


RANGES = {
    "count": Range(1, 10**15, "at least 1"),
    "some": Range(0, 10**15, "0 or more"),
    "many": Range(1, 10**6, "at least 1"),  # of what is held in memory at once
    "seeds": Range(1, 1000, "at least 1"),  # of a study, whose plan is held in memory
    "threads": Range(0, 1024, "0 or more"),
    "seed": Range(0, 2**63 - 9, "0 or more"),  # what torch takes, and those beside it
    "positive": Range(0, math.inf, "positive", "low high"),
    "share": Range(0, 1, "in [0, 1]"),
    "below one": Range(0, 1, "in [0, 1)", "high"),
}


def at_least(low: int) -> Range:
    return RANGES["many"]._replace(low=low, words=f"at least {low}")


def option(default: Any, help: str, choices: Iterable[str] | None = None, **more) -> Any:
    """A field of a settings dataclass.  more: within, of RANGES; the rest as for argparse's add_argument."""
    more |= {"help": help} | ({"choices": tuple(choices)} if choices else {})
    return dataclasses.field(default=default, metadata=more)


def refuse(flag: str, values: Any, within: str | Range | None = None) -> None:
    """Raise UserError for an empty text, an endless number, or one out of its range."""
    within = RANGES.get(within, within)
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, str) and not value:
            raise UserError(f"{flag} is empty")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} must be {within.words if within else 'a finite number'}, got {value}")
        if within and value is not None and value not in within:
            words = f"at most {within.high:,}" if value > within.high else within.words
            raise UserError(f"{flag} must be {words}, got {value}")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_ranges(cfg: Any) -> None:
    """Refuse settings out of their ranges, each by its option's name.  Raises UserError."""
    for f in dataclasses.fields(cfg):
        if not f.metadata.get("const") == getattr(cfg, f.name) == "":  # an option without its value
            refuse(flag_of(f.name), getattr(cfg, f.name), f.metadata.get("within"))


def sigma_sampler(cfg: Any, named: dict[str, Callable], which="") -> Callable:
    """draw(n, ...) of noise levels: those of `named` that --[fake-]sigma-distribution says, or in their place
    the log-normal of --[fake-]sigma-mean and -std.  which: "" or "fake_".  UserError for half of it."""
    name, mean, std = (getattr(cfg, f"{which}sigma_{part}") for part in ("distribution", "mean", "std"))
    if (mean is None) != (std is None):
        raise UserError(f"{flag_of(which)}sigma-mean and {flag_of(which)}sigma-std go together")
    return named[name] if mean is None else partial(sim.lognormal_sigma, mean=mean, std=std)


def surrogate(cfg: Any) -> Callable:
    """--method and its parameters: a loss of (fake, teacher, target), for density of networks.  UserError
    for what does not go together."""
    given = {k: getattr(cfg, k) for k in ("c", "delta", "alpha", "beta") if getattr(cfg, k) is not None}
    if cfg.method in ("sid", "diff_instruct"):
        if unfit := set(given) - ({"alpha"} if cfg.method == "sid" else set()):
            raise UserError(f"--method {cfg.method} does not take {', '.join(sorted(unfit))}")
        if cfg.method == "diff_instruct" and cfg.space != "denoised":
            raise UserError("--method diff_instruct needs --space denoised, where the target is x0")
        return partial(sim.sid_loss, **given) if cfg.method == "sid" else sim.diff_instruct_loss
    density = partial(sim.density_loss, space=cfg.space)
    loss = {"sim": sim.sim_loss, "full": sim.full_loss, "density": density}[cfg.method]
    try:
        return partial(loss, distance=sim.make_distance(cfg.distance, **given))
    except ValueError as error:
        raise UserError(str(error)) from None


class Parser(argparse.ArgumentParser):
    """argparse with ranges, and errors of one line."""

    def __init__(self, description: str | None = None, **more):
        self.within = {}
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a notebook's has not
                stream.reconfigure(errors="replace")  # not every terminal has every letter
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more
        )

    def add_argument(self, *flags, within: str | Range | None = None, **more) -> argparse.Action:
        action = super().add_argument(*flags, **more)
        self.within[action] = within
        return action

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        for action, within in self.within.items():
            value = getattr(found, action.dest, None)
            if not (value == "" == action.const):  # an option without its value
                refuse((action.option_strings or [action.dest])[-1], value, within)
        return found, rest

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {message if len(message) < 300 else message[:300] + ' ...'}\n")


def add_options(parser: Parser, cls: type) -> None:
    """The fields of a settings dataclass, in their order."""
    for f in dataclasses.fields(cls):
        about = dict(f.metadata)
        if f.type is bool:
            about["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            about["type"] = f.type
            about["help"] += "" if f.default is None else " (default %(default)s)"
        parser.add_argument(flag_of(f.name), default=f.default, **about)


def parse_report(
    description: str | None, argv: Sequence[str] | None, picture: str, mark: str, **help
) -> argparse.Namespace:
    """The command line of a check that leaves a picture in --out and, with --json, its numbers -> Namespace.

    mark: a text that its JSON has, and no other file's.  What cannot be written is refused before the work.
    help: of seed and quick.
    """
    parser, path = Parser(description), dict(type=Path)
    add = parser.add_argument
    add("--seed", type=int, default=0, within="seed", help=f"{help['seed']} (default 0)")
    threads = "CPU threads (default 1: tensors this small gain nothing from more)"
    add("--threads", type=int, default=1, within="threads", help=threads)
    add("--quick", action="store_true", help=help["quick"])
    add("--json", **path, metavar="FILE", help="write every number here too")
    add("--out", default=Path("out"), **path, metavar="DIR", help="folder of the figure (default out)")
    args = parser.parse_args(argv)
    check_apart(args.json, args.out / picture)
    check_writable(args.out / picture)
    if args.json:
        check_ours(args.json, f'"{mark}"')
        args.json.parent.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def run(work: Callable, interrupted="interrupted") -> int:
    """work() -> the exit code: what it returns, 2 and one line for a wrong input, 130 for Ctrl-C."""
    name = os.path.basename(sys.argv[0])
    try:
        if "matplotlib" in sys.modules:  # whatever somebody's matplotlibrc says
            sys.modules["matplotlib"].rcdefaults()
        return work() or 0
    except (UserError, OSError) as error:  # OSError: the disk is full, or gone
        print(f"{name}: error: {printable(error)}", file=sys.stderr)  # a path can have any character
        return getattr(error, "code", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        print(f"{name}: error: out of memory: lower --batch, --samples or another size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C, SIGTERM or SIGHUP appends to, so that training ends between two steps."""
    received = []

    def handler(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it
        received.append(number)

    numbers, hangup = {signal.SIGINT, signal.SIGTERM}, getattr(signal, "SIGHUP", signal.SIGTERM)
    if signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup has it, which outlives its terminal
        numbers.add(hangup)
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread: signals are somebody else's
        before = {}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
