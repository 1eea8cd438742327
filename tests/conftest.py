"""The tests of edm/ need edm/requirements.txt; without it they are left out, and the summary says so."""

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers of two threads would fight
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, where commands would be deaf to it
    signal.signal(signal.SIGHUP, lambda *_: None)

from importlib.util import find_spec

import pytest

NEEDED = ("accelerate", "diffusers", "PIL", "safetensors", "torchmetrics", "transformers")
OF_IMAGES = """checkpoints data distill distill_runs distill_processes evaluate networks preference_study
sample pth pixart pixart_files prompts released_text sample_pixart distill_pixart text_metrics
steps_images released device shared_forward default_dtype hostile check_teacher flow sd3 preference_page
data_faults edm_pickle captions metrics pixart_names"""
IMAGE_TESTS = [f"test_{name}.py" for name in OF_IMAGES.split()]
collect_ignore = [] if all(map(find_spec, NEEDED)) else IMAGE_TESTS


def pytest_addoption(parser):
    words = (
        "with -m slow: all mutants, instants of death, released kinds and hostile files, not a share; hours"
    )
    parser.addoption("--thorough", action="store_true", help=words)
    parser.addoption("--device", default="cpu", help="of tests/test_anywhere.py, such as cuda (default cpu)")
    types = ["float64", "float32", "float16", "bfloat16"]
    parser.addoption("--dtype", default="float64", choices=types, help="likewise (default %(default)s)")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def dtype(request):
    return request.config.getoption("--dtype")


@pytest.fixture
def thorough(request):
    return request.config.getoption("--thorough")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test's own folder, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def fresh():
    """accelerate remembers the precision of the first Accelerator: no test inherits or leaves one."""

    def forget():
        if state := sys.modules.get("accelerate.state"):
            state.AcceleratorState._reset_state()

    forget()
    yield
    forget()  # the next module's fixtures come before the next test's


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line(
            f"SKIPPED {', '.join(IMAGE_TESTS)}: edm/requirements.txt is not installed"
        )
