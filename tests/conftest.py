"""The tests of edm/ need edm/requirements.txt; without it they are left out, and the summary says so."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers of two threads would fight

from importlib.util import find_spec

NEEDED = ("accelerate", "diffusers", "PIL", "safetensors", "torchmetrics", "transformers")
IMAGE_TESTS = [
    f"test_{name}.py"
    for name in (
        *("checkpoints", "data", "distill", "evaluate", "networks", "preference_study", "sample", "pth"),
        *("pixart", "pixart_files", "prompts", "released_text", "sample_pixart", "distill_pixart"),
        *("text_metrics", "steps_images", "released", "device", "shared_forward", "default_dtype"),
    )
]
collect_ignore = [] if all(map(find_spec, NEEDED)) else IMAGE_TESTS


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch's default device: cpu, cuda, mps (default cpu)")
    parser.addoption("--dtype", default="float32", help="torch's default type (default float32)")


def pytest_configure(config):
    import torch

    torch.set_default_dtype(getattr(torch, config.getoption("dtype")))
    if config.getoption("device") != "cpu":
        torch.set_default_device(config.getoption("device"))


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line(
            f"SKIPPED {', '.join(IMAGE_TESTS)}: edm/requirements.txt is not installed"
        )
