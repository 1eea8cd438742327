"""Files of torch.save: weights come out of whatever a training script writes beside them; nothing runs."""

import argparse
import collections
import datetime
import decimal
import functools
import os
import pathlib
import pickle
import random
import sys
import zipfile

import numpy as np
import pytest
import torch

from edm.images.pth import read_pth
from toy.files import UserError


class Options:
    """Of a class that only the script has."""

    def __init__(self):
        self.lr, self.inner = 0.1, argparse.Namespace(deep=np.float32(3))


class Attributes(dict):
    pass


def weights(seed=0):
    rng = torch.Generator().manual_seed(seed)
    whole = torch.randn(6, 5, generator=rng)
    return {
        "a.weight": torch.nn.Parameter(whole), "a.bias": whole[2], "turned": whole.T, "x": whole[1::2, ::3],
        "half": whole.half(), "bf16": whole.bfloat16(), "double": whole.double(), "mask": whole > 0,
        "empty": torch.zeros(0, 3), "steps": torch.tensor(7),
    }  # fmt: skip


def everything():
    """What scripts write beside weights, and more."""
    network = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(network.parameters())
    network(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, [lambda step: 1.0])
    space, moment = argparse.Namespace, datetime.datetime(2024, 10, 22, tzinfo=datetime.UTC)
    return dict(
        args=space(lr=5e-6, path=pathlib.Path("a/b"), inner=space(x=(0, 1))), options=Options(),
        config={"train": {"args": space(x={1, 2})}, 3: {"a"}}, attributes=Attributes(a=Options()),
        optimizer=optimiser.state_dict(), scheduler=schedule.state_dict(), flag=np.bool_(1), f=np.float64(1),
        count=np.int64(3), array=np.arange(6).reshape(2, 3), names=np.array(["a", "bc"]),
        objects=np.array([1, None, "x"], dtype=object), records=np.zeros(2, "f4,i8"), kind=np.dtype("f4"),
        date=moment, took=datetime.timedelta(hours=3), counts=collections.Counter("abca"), z=1 + 2j,
        queue=collections.deque([1], 5), price=decimal.Decimal("1.5"), data=b"\xff\0", big=2**70,
        groups=collections.defaultdict(list, a=[1]), o=collections.OrderedDict(b=2), r=range(3),
        buffer=bytearray(b"abc"), part=slice(1, 2), maker=functools.partial(int, base=2), join=os.path.join,
        type=torch.half, device=torch.device("cpu"), size=torch.Size([2]), sparse=torch.eye(2).to_sparse(),
        rng=(torch.get_rng_state(), np.random.get_state(), random.getstate(), np.random.default_rng(0)),
        word=np.str_("a"),
        list=[torch.ones(2), None, "x" * 300],
    )  # fmt: skip


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


FORMS = {  # of torch.save
    "zip": {},
    "before zip": dict(_use_new_zipfile_serialization=False),
    "protocol 4": dict(pickle_protocol=4),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_come_out_of_everything_else(tmp_path, capsys, form):
    content, path = {"state_dict": collections.OrderedDict(weights())}, tmp_path / "x.pth"
    torch.save(content | everything(), path, **FORMS[form])
    same(read_pth(path), weights())
    words = (
        f"10 tensors taken, {len(everything())} other entries ignored (args, options, config, attributes, "
    )
    assert capsys.readouterr().err == f"{path}: {words}optimizer, ...)\n"


def test_names_are_never_looked_up(tmp_path, monkeypatch):
    (tmp_path / "trapdoor.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Options, "__module__", "trapdoor")
    monkeypatch.setitem(sys.modules, "trapdoor", sys.modules[__name__])
    torch.save({"state_dict": weights(), "args": Options(), "function": Options}, tmp_path / "x.pth")
    del sys.modules["trapdoor"]
    same(read_pth(tmp_path / "x.pth"), weights())
    with pytest.raises(SystemExit):  # so that the test could fail
        torch.load(tmp_path / "x.pth", weights_only=False)
    monkeypatch.setitem(sys.modules, "trapdoor", None)


LAYOUTS = {  # around weights w and others o -> how many entries are ignored
    "alone": (lambda w, o: w, 0),
    "mixed with others": (lambda w, o: w | {"epoch": 3, "args": Options(), 7: torch.ones(1)}, 3),
    "model": (lambda w, o: {"model": w, "optimizer": {"state": o}}, 1),
    "module in model": (lambda w, o: {"model": {"module": w, "epoch": 1}, "step": 2}, 2),
    "average first": (lambda w, o: {"state_dict": o, "state_dict_ema": w, "step": 2}, 2),
    "average of a class": (lambda w, o: {"ema": {"decay": 0.999, "module": w}, "model": o}, 2),
    "a rate, no average": (lambda w, o: {"ema": 0.999, "state_dict": w}, 1),
    "an empty average": (lambda w, o: {"ema": {}, "state_dict": w}, 1),
    "ordered": (lambda w, o: collections.OrderedDict(generator=collections.OrderedDict(w)), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_weights_are(tmp_path, capsys, layout):
    wrap, ignored = LAYOUTS[layout]
    torch.save(wrap(weights(), weights(1)), tmp_path / "x.pth")
    same(read_pth(tmp_path / "x.pth"), weights())
    said = capsys.readouterr().err
    assert f"{ignored} other entr" in said and said.count("\n") == 1 if ignored else not said


def test_batch_norms_state_dict_with_metadata(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(network.state_dict(), tmp_path / "x.pth")  # an OrderedDict with an attribute
    same(read_pth(tmp_path / "x.pth"), network.state_dict())


# ----------------------------------------------------------------------------------------------
# Hostile and damaged files.


class Reduced:
    def __init__(self, *how):
        self.how = how

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "how",
    [
        (os.mkdir, ("executed",)), (eval, ("__import__('os').mkdir('executed')",)),
        (exec, ("import os; os.mkdir('executed')",)), (functools.reduce, (os.mkdir, ["executed"])),
        (getattr, (os.mkdir, "__call__")), (dict, ([("a", 1)],)),
    ],
    ids=str,
)  # fmt: skip
def test_calls_are_refused(tmp_path, monkeypatch, form, how):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": weights(), "args": [Reduced(*how)]}, "x.pth", **FORMS[form])
    with pytest.raises(UserError, match=r"it calls \S+, which might be code"):
        read_pth("x.pth")
    assert not os.path.exists("executed")


OPCODES = {  # protocol 0 and 1's ways to call, a function taken apart, and one that an object is given
    "INST": b"(S'executed'\niposix\nmkdir\n.",
    "OBJ": b"(cposix\nmkdir\nS'executed'\no.",
    "BUILD on a stand-in": b"}ctorch._utils\n_rebuild_tensor_v2\n(N}S'__init__'\ncposix\nmkdir\nstbs.",
    "BUILD on a dictionary": b"ccollections\nOrderedDict\n(N}S'__setitem__'\ncposix\nmkdir\nstb.",
}


@pytest.mark.parametrize("code", OPCODES)
def test_opcodes_by_hand(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.pth", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + OPCODES[code])
    with pytest.raises(UserError):
        read_pth("x.pth")
    assert not os.path.exists("executed")
    torch.save(collections.OrderedDict(weights()), "good.pth")
    same(read_pth("good.pth"), weights())  # and nothing is changed for the files that follow


def test_what_is_no_file_of_weights(tmp_path):
    path = tmp_path / "x.pth"

    def refused(words):
        with pytest.raises(UserError, match=words):
            read_pth(path)

    for content in ({}, {"epoch": 3}, torch.ones(3), [torch.ones(2)], {"model": torch.nn.Linear(2, 2)}):
        torch.save(content, path)
        refused("holds no tensors by name")
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    refused("holds no tensors by name")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "")
    refused("a zip file, but not of torch.save")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(100_000))
    refused("data.pkl in it is compressed")
    path.write_bytes(pickle.dumps(1) * 5)
    refused("not a file of torch.save")


def test_damaged_bytes_are_errors_at_worst(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for form in FORMS:
        torch.save({"state_dict": weights(), "args": Options()}, "x.pth", **FORMS[form])
        whole = bytearray(pathlib.Path("x.pth").read_bytes())
        start = max(whole.find(b"\x80\x02"), whole.find(b"\x80\x04"))
        outcomes = collections.Counter()
        for _ in range(150):
            damaged = whole.copy()
            for _ in range(rng.randint(1, 3)):
                damaged[start + rng.randrange(min(1500, len(whole) - start))] = rng.randrange(256)
            pathlib.Path("y.pth").write_bytes(damaged)
            try:
                read_pth("y.pth")
                outcomes["read"] += 1
            except Exception as error:
                outcomes[type(error).__name__] += 1
        assert outcomes["read"] < 150 and outcomes["UserError"] > 10, outcomes
    assert sorted(os.listdir()) == ["x.pth", "y.pth"]
