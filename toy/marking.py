"""Marks an answer to an exercise in one line, against an exact oracle: `check(answer)`.

An answer is a function; its name says which exercise it answers.  What it returns in the test bed, and
how that changes with the generator's parameters, is compared with the oracle of `toy/exercises.py`.
Where it is wrong, the known mistakes are tried: the one whose numbers the answer has is what is said.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch


class Wrong(Exception):
    """Why an answer cannot be compared, or is no answer, in words."""


@dataclass(frozen=True, eq=False)
class Exercise:
    """probe(answer) calls it -> {what: tensor}, the first of which is its value; truth() -> the same, from
    the oracle.  mistakes: words -> an answer that makes this mistake.  praise: what a right one has shown.
    last: of an answer that agrees (or of which nothing is known), a longer trial -> words, or raises `Wrong`.
    """

    probe: Callable
    truth: Callable
    praise: str
    mistakes: dict = field(default_factory=dict)
    tolerance: float = 1e-7
    last: Callable | None = None


def off(found, truth):
    """Relative error; of a truth that is 0, absolute.  Infinite where anything is not finite."""
    error = ((found - truth).norm() / (truth.norm() or 1.0)).item()
    return error if math.isfinite(error) else math.inf


def wanted(result, *shape, dtype=torch.float64):
    """The result, if it is a tensor of this shape and dtype.  Raises `Wrong`, in words, if not."""
    if result is None or result is ...:
        raise Wrong(f"it returns {result}: not filled in yet, or no `return`")
    if not torch.is_tensor(result):
        raise Wrong(f"it returns a {type(result).__name__}; a tensor is wanted")
    if result.shape != shape:
        more, fewer = result.ndim > len(shape), result.ndim < len(shape)
        hint = " (a sum over coordinates, or a mean, is missing?)" if more else ""
        hint = " (too much is summed? One entry a sample is wanted)" if fewer else hint
        raise Wrong(f"it returns shape {tuple(result.shape)}, {tuple(shape)} is wanted{hint}")
    if result.dtype != dtype:
        raise Wrong(f"it returns {result.dtype}, the inputs are {dtype}: something is converted on the way")
    if not result.isfinite().all():
        raise Wrong("it returns numbers that are not finite")
    return result


def factor(found, other):
    """The number k of found = k other, if there is one."""
    a, b = (torch.cat([tensor.flatten() for tensor in each.values()]) for each in (found, other))
    k = ((a @ b) / (b @ b)).item() if b.norm() else math.nan
    return k if math.isfinite(k) and abs(k) > 1e-6 and off(a, k * b) < 1e-6 else None


def spoken(k):
    return "the sign is flipped" if abs(k + 1) < 1e-6 else f"it is {k:.4g} times the right one"


def spoken_list(names):
    return f"the {' and the '.join(names)} {'is' if len(names) == 1 else 'are'}"


@cache
def right_result(exercise):
    return exercise.truth()


@cache
def known(exercise):
    """words -> what the mistake gives, computed once."""
    return {words: exercise.probe(wrong) for words, wrong in exercise.mistakes.items()}


def diagnose(exercise, found, truth):
    """The known mistake, or two at once, that gives these numbers; None if there is none."""
    for words, result in known(exercise).items():
        if all(off(found[what], result[what]) < max(1e-6, exercise.tolerance) for what in found):
            return words
    if (k := factor(found, truth)) is not None:
        return spoken(k)
    for words, result in known(exercise).items():
        if (k := factor(found, result)) is not None:
            return f"two things: {spoken(k)}; and {words}"
    return None


def compare(exercise, answer, *tools):
    """What is to be said of an answer -> (is it right?, words)."""
    found, truth = exercise.probe(answer), right_result(exercise)
    errors = {what: off(found[what], truth[what]) for what in truth}
    wrong = [what for what, error in errors.items() if error > exercise.tolerance]
    if not wrong:
        return True, exercise.last(answer, *tools) if exercise.last else exercise.praise
    words = diagnose(exercise, found, truth)
    if words is None and exercise.last:
        return True, exercise.last(answer, *tools)  # another way than the oracle's: its samples decide
    right, scope = [what for what in errors if what not in wrong], ""
    if right and next(iter(errors)) in right:  # the value: what is missing is in its gradient
        scope = f"{spoken_list(right)} right, {spoken_list(wrong)} not: "
    if words is None:
        by = ", ".join(f"the {what} by {errors[what]:.2g}" for what in wrong)
        words = f"no mistake that is known here; relative error of {by}"
    return False, scope + words


def open_hole(error):
    """The function whose body is still missing, of a NotImplementedError."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_name


def mark(exercises, answer, *tools):
    """-> (is it right?, one line)."""
    name = getattr(answer, "__name__", None)
    if name not in exercises or not callable(answer):
        given = name or f"a {type(answer).__name__}"
        return False, f"{given}: no exercise of this name; there are {', '.join(exercises)}"
    try:
        right, words = compare(exercises[name], answer, *tools)
    except NotImplementedError as error:
        hole = open_hole(error)
        words = "not filled in yet" if hole == name else f"it needs {hole}, which is not filled in yet"
        return False, f"{name}: {words}"
    except Wrong as error:
        right, words = False, str(error)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        reason += "; sigma[:, None] is (B, 1)" if "must match the size of tensor" in reason else ""
        right, words = False, f"it raises {type(error).__name__}: {reason}"
    return right, f"{name}: {'right. ' if right else 'not yet: '}{words}"
