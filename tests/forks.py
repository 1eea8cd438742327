"""Runs the tests that each line names, "folder files [-k names]", in a fork: imports cost more than they do.

The tests that noticed most in the least time come first, so that most breakages are seen at once.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, settings

HEAVY = """numpy torch torch._dynamo torch.distributed.fsdp torch.distributed.checkpoint.state_dict tqdm
matplotlib.pyplot PIL.Image scipy.linalg sklearn.datasets accelerate safetensors.torch torchmetrics
diffusers.models.autoencoders.autoencoder_kl diffusers.models.transformers.pixart_transformer_2d
transformers.models.t5.modeling_t5"""
OPTIONS = [
    "-q",
    "-x",
    "-o",
    "addopts=",
    "-m",
    "not slow and not gpu",
    "--assert=plain",
    "-p",
    "no:cacheprovider",
]


class Order:
    """A plugin that puts the tests in order, by what each of them took when last run and ever noticed."""

    def __init__(self, seconds=(), noticed=()):
        self.seconds, self.noticed = dict(seconds), dict(noticed)

    def pytest_collection_modifyitems(self, items):
        def price(item):
            return self.seconds.get(item.nodeid, 0) / (0.1 + self.noticed.get(item.nodeid, 0))

        items.sort(key=price)

    def pytest_runtest_logreport(self, report):
        before = 0 if report.when == "setup" else self.seconds[report.nodeid]
        self.seconds[report.nodeid] = before + report.duration
        self.noticed[report.nodeid] = self.noticed.get(report.nodeid, 0) + report.failed


def run(order, folder, tests):
    """-> exit code.  What the tests print goes to folder/out, what they teach to folder/order.json."""
    files, _, names = tests.partition(" -k ")
    os.chdir(folder)
    sys.path.insert(0, folder)
    signal.alarm(300)
    out = os.open("out", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)
    code = pytest.main([*OPTIONS, "-k", names, *files.split()], plugins=[order])
    Path(folder, "order.json").write_text(json.dumps(vars(order)), encoding="utf-8")
    sys.stdout.flush()
    return code


def main():
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    quick = dict(phases=[Phase.generate], max_examples=20, deadline=None, derandomize=True)
    settings.register_profile("quick", **quick)
    settings.load_profile("quick")
    for name in HEAVY.split():
        with contextlib.suppress(ImportError):  # edm/requirements.txt is not installed
            importlib.import_module(name)
    gc.collect(), gc.freeze()  # so that no fork looks through all of that again
    order = Order()
    for line in sys.stdin:
        folder, tests = line.rstrip().split(" ", 1)
        if not (child := os.fork()):
            os._exit(run(order, folder, tests))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        if (learnt := Path(folder, "order.json")).exists():
            order = Order(**json.loads(learnt.read_text("utf-8")))


if __name__ == "__main__":
    main()
