"""Every option of every command with wrong values, and what else all commands share."""

from pathlib import Path

import pytest

import verify_identity
from edm import (
    benchmark,
    checkpoints,
    compare_digits,
    distill,
    distill_pixart,
    evaluate,
    preference_study,
    prompts,
    sample,
    sample_pixart,
    train_teacher,
)
from edm.config import (
    DISTILLATIONS,
    TEACHERS,
    TEXT_DISTILLATIONS,
    Distillation,
    TeacherTraining,
    TextDistillation,
    command_line,
)
from toy import command, compare_2d, train_2d

ROOT = Path(__file__).parents[1]


def by_settings(module, cls=None, presets=None):
    return lambda argv: command_line(module.main, cls or module.Settings, "", argv, presets)


COMMANDS = {  # name -> argv -> exit code; what it needs besides
    "train_2d": (train_2d.cli, ""),
    "compare_2d": (compare_2d.cli, ""),
    "verify_identity": (verify_identity.main, ""),
    "distill": (by_settings(distill, Distillation, DISTILLATIONS), ""),
    "distill_pixart": (by_settings(distill_pixart, TextDistillation, TEXT_DISTILLATIONS), ""),
    "train_teacher": (by_settings(train_teacher, TeacherTraining, TEACHERS), ""),
    "compare_digits": (compare_digits.cli, ""),
    "evaluate": (by_settings(evaluate), "--student none"),
    "sample": (by_settings(sample), "--network none --out new"),
    "sample_pixart": (by_settings(sample_pixart), "--student none --out new"),
    "benchmark": (by_settings(benchmark), ""),
    "checkpoints convert": (checkpoints.main, "none new"),
    "prompts fetch": (prompts.main, "new.jsonl"),
    "prompts encode": (prompts.main, "none new --text-encoder none"),
    "preference_study build": (preference_study.main, "none none none new"),
    "preference_study tally": (preference_study.main, "none none"),
}
NUMBERS = ["x", "", "nan", "1e400", "-inf", "0x10", "-1e30", "9" * 5000]
BOUNDED = ["seed", "threads", "batch", "samples", "jobs", "seeds"]  # which refuse 2^64 as well


class Seen(Exception):
    """The parser of a command, without running it."""


def actions(name, monkeypatch):
    """The options of a command."""
    found = []
    add = command.Parser.add_argument
    with monkeypatch.context() as patch:
        patch.setattr(
            command.Parser, "add_argument", lambda self, *a, **k: found.append((self, add(self, *a, **k)))
        )
        with pytest.raises(SystemExit):
            COMMANDS[name][0]([*name.split()[1:], "--help"])
    sub = name.split()[-1]
    return [a for parser, a in found if a.option_strings and (" " not in name or parser.prog.endswith(sub))]


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_values_are_refused_in_one_line(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    call, needed = COMMANDS[name]
    tried = 0
    for action in actions(name, monkeypatch):
        if action.nargs == 0 or action.dest == "help":
            continue
        wrong = NUMBERS if action.type in (int, float) else ["", *(["nonsense"] if action.choices else [])]
        wrong = [*wrong, str(2**64)] if action.dest in BOUNDED else wrong
        if action.const == "" or action.type is Path:
            continue
        for value in wrong:
            flag = action.option_strings[-1]
            argv = [*name.split()[1:], *needed.split(), f"{flag}={value}"]
            try:
                code = call(argv)
            except SystemExit as stop:
                code = stop.code
            err, tried = capsys.readouterr().err, tried + 1
            assert code == 2 and err.count("\n") == 1 and len(err) < 500, (argv, code, err)
    assert not [*tmp_path.iterdir()]
    assert tried or name == "preference_study tally"
