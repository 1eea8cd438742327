"""Every option of every command with wrong values, and what else all commands share."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest

import verify_identity
from edm import (
    benchmark,
    check_teacher,
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
from toy import benchmark as benchmark_2d
from toy import command, compare_2d, explore, f_divergences, files, train_2d

ROOT = Path(__file__).parents[1]


def by_settings(module, cls=None, presets=None):
    return lambda argv: command_line(module.main, cls or module.Settings, "", argv, presets)


COMMANDS = {  # name -> argv -> exit code; what it needs besides
    "train_2d": (train_2d.cli, ""),
    "compare_2d": (compare_2d.cli, ""),
    "explore": (explore.cli, "none"),
    "benchmark_2d": (benchmark_2d.cli, ""),
    "verify_identity": (verify_identity.main, ""),
    "f_divergences": (f_divergences.main, ""),
    "distill": (by_settings(distill, Distillation, DISTILLATIONS), ""),
    "distill_pixart": (by_settings(distill_pixart, TextDistillation, TEXT_DISTILLATIONS), ""),
    "train_teacher": (by_settings(train_teacher, TeacherTraining, TEACHERS), ""),
    "compare_digits": (compare_digits.cli, ""),
    "evaluate": (by_settings(evaluate), "--student none"),
    "sample": (by_settings(sample), "--network none --out new"),
    "sample_pixart": (by_settings(sample_pixart), "--student none --out new"),
    "benchmark": (by_settings(benchmark), ""),
    "check_teacher": (check_teacher.main, "none"),
    "checkpoints convert": (checkpoints.main, "none new"),
    "prompts fetch": (prompts.main, "new.jsonl"),
    "prompts encode": (prompts.main, "none new --text-encoder none"),
    "preference_study build": (preference_study.main, "none none none new"),
    "preference_study tally": (preference_study.main, "none none"),
}
NUMBERS = ["x", "", "nan", "1e400", "-inf", "0x10", "-1e30", "9" * 5000, "9" * 400]
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


def test_what_ends_a_command(capsys, monkeypatch):
    def failing(error):
        def work():
            raise error

        return work

    for error, code, words in (
        (files.UserError("bad\n\x1b"), 2, "error: bad??\n"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            2,
            "out of memory",
        ),
    ):
        assert command.run(failing(error)) == code
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="ours"):
        command.run(failing(RuntimeError("ours")))
    assert command.run(lambda: None) == 0 and command.run(lambda: 1) == 1


def test_figures_do_not_depend_on_somebodys_matplotlibrc(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    assert command.run(lambda: matplotlib.rcParams["text.usetex"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_heard_once_and_given_back(number):
    before = signal.getsignal(number)
    with command.stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop == [number]
        with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C means it
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(number) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command.stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_whatever_writes_raises_one_kind_of_error_and_leaves_nothing(tmp_path):
    import safetensors

    for error in (
        OSError(28, "No space left"),
        RuntimeError("unexpected pos"),
        safetensors.SafetensorError("full"),
    ):
        with (
            pytest.raises(OSError, match=r"file: cannot be written \("),
            files.replacing(tmp_path / "file") as temporary,
        ):
            temporary.write_text("half")
            raise error
    with pytest.raises(files.UserError, match="zero: a device"), files.naming("/dev/zero"):
        raise AssertionError("read")
    (tmp_path / "tmp-file").write_text("somebody's")
    with files.replacing(tmp_path / "file") as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("a")
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert found == ["file", "file/part", "tmp-file"]


@pytest.mark.parametrize("argv", [
    "benchmark --variant float32 --gradients mine.png", "check_teacher none --out mine.png",
    "benchmark --variant plain --gradients new", "benchmark --gradients new",
    "verify_identity --quick --json mine.png", "verify_identity --json new/../out/verify_identity.png",
    "f_divergences --json out/f_divergences.png", "f_divergences --json mine.png/a",
    "sample_pixart --student none --out new --export new/export",
    "sample_pixart --student none --out new/a.png --export new/../new/a.png",
    "preference_study tally none none --out new --figure a/../new",
    "evaluate --student none --data digits --out /proc/new", "sample --network none --out /proc/new",
    "sample_pixart --student none --export /proc/a/new", "sample --network none --out mine.png/a.png",
])  # fmt: skip
def test_what_cannot_be_written_or_is_not_ours_is_refused_before_the_work(
    argv, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("mine.png").write_bytes(b"mine")
    name, *argv = argv.split()
    words = "new", "mine.png", "out/", "--gradients"
    call = next(call for command, (call, _) in COMMANDS.items() if command.split()[0] == name)
    assert call(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and any(word in err for word in words), err
    assert [*tmp_path.iterdir()] == [Path("mine.png").absolute()] and Path("mine.png").read_bytes() == b"mine"


def test_a_lock_is_one_process_s(tmp_path, monkeypatch, capsys):
    code = "import sys, time; from toy.files import lock; held = lock(sys.argv[1]); print('has', flush=True)"
    code, file = f"{code}; time.sleep(60)", str(tmp_path / "a")
    other = subprocess.Popen([sys.executable, "-c", code, file], stdout=-1, text=True, cwd=ROOT)
    assert other.stdout.readline() == "has\n"
    with pytest.raises(files.UserError, match="in use by another process"):
        files.lock(file)
    other.kill()
    other.wait()
    files.lock(file).release()

    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    files.lock(file)
    assert "no locks on this file system" in capsys.readouterr().err


WHOLE = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_PORT="1", MASTER_ADDR="h")


@pytest.mark.parametrize("given", [
    {"WORLD_SIZE": "x"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "-1"}, {"LOCAL_RANK": "0"},
    WHOLE | {"RANK": "x"}, WHOLE | {"RANK": "2"}, WHOLE | {"MASTER_PORT": ""},
    WHOLE | {"MASTER_ADDR": ""}])  # fmt: skip
def test_half_of_torchrun_s_variables(given, monkeypatch):
    from edm.device import processes

    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    assert processes() == 1
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(files.UserError, match=r"there are {'.*start with torchrun"):
        processes()
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert processes() == 2


def test_accelerate_s_variables_decide_nothing(monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    from edm.training.trainee import make_accelerator
    from tests.small import config

    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    accelerator = make_accelerator(config())
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.state.deepspeed_plugin is None
    AcceleratorState._reset_state(True)
    assert (
        "GRADIENT_ACCUMULATION_STEPS, ACCELERATE_USE_DEEPSPEED, OMPI_COMM_WORLD_SIZE\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words", ["toy/compare_2d.py --help", "edm/evaluate.py --help", "edm/checkpoints.py show é"]
)
def test_a_terminal_without_letters(words):
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, env=os.environ | plain, capture_output=True
    )
    assert done.returncode == (0 if "--help" in words else 2) and b"Traceback" not in done.stderr, done.stderr
    assert b"Fr?chet" in done.stdout or "evaluate" not in words
