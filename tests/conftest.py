"""The tests of edm/ need edm/requirements.txt; without it they are left out, and the summary says so."""

from importlib.util import find_spec

NEEDED = ("accelerate", "PIL", "safetensors", "torchmetrics")
IMAGE_TESTS = [
    f"test_{name}.py" for name in ("checkpoints", "data", "distill", "evaluate", "networks", "sample")
]
collect_ignore = [] if all(map(find_spec, NEEDED)) else IMAGE_TESTS


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line(
            f"SKIPPED {', '.join(IMAGE_TESTS)}: edm/requirements.txt is not installed"
        )
