"""Runs of a study in worker processes, which end with it."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from typing import NoReturn

from tqdm import tqdm

from toy import command
from toy.files import UserError


class Stopped(UserError):
    """A worker ended with an exit code, having said why if it could."""

    code = 1


def quietly(work: Callable, *args) -> NoReturn:
    """What a worker process does: the work without its progress bars.  Errors of the user's: one line."""

    def end_with_parent():  # a worker whose study was killed must not train on beside the next one
        multiprocessing.parent_process().join()
        os._exit(1)

    def silent():
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, as long as the process
        with redirect_stderr(nowhere), redirect_stdout(nowhere):
            work(*args)

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(command.run(silent))


def in_a_process(*work) -> int:
    """Each in a fresh one: accelerate's state lasts as long as its process.  Returns the exit code."""
    process = multiprocessing.get_context("spawn").Process(target=quietly, args=work)
    process.start()
    process.join()
    return process.exitcode


def work_off(jobs: int, name: str, todo: list[tuple]) -> None:
    """Do todo, a list of (function, *arguments), `jobs` at a time.  Raises Stopped where one fails."""
    bar = tqdm(total=len(todo), desc=name, unit="run", smoothing=0, disable=not todo)
    with bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(in_a_process, *work) for work in todo]):
                if code := future.result():
                    raise Stopped(f"a run failed ({code}); the same command goes on")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # SIGTERM: they save, and end
            raise
