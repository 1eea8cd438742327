"""Files of weights: round trips, and nothing but a UserError from damaged or foreign ones; their command."""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edm.checkpoints import main
from edm.images.checkpoints import load, save
from edm.images.networks import ARCHITECTURES
from tests import snapshots
from tests.common import ROOT, reference, spawn
from tests.snapshots import CONFIG, assert_same, assert_sound, dump, peak_memory, tiny
from toy.files import UserError, replacing

content = snapshots.content  # a fixture

# ------------------------------------------------------------------------------------------------
# Damage, to files of ours and of EDM's form.


def load_or_refuse(path):
    try:
        network, about = load(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert_sound(network)
        assert isinstance(about, dict)


@pytest.fixture(params=["ours", "ours_pickled", "reference"])
def sample(request, tmp_path):
    """The bytes of a small valid file, and where to write changed ones."""
    if request.param == "reference":
        data = reference("edm/small_cond_vp_newformat.pkl").read_bytes()
    elif request.param == "ours":
        save(tmp_path / "a", tiny(), note=1)
        data = (tmp_path / "a").read_bytes()
    else:
        data = dump(request.getfixturevalue("content")[0], tmp_path / "a").read_bytes()
    return data, tmp_path / "a"


def test_truncated(sample):
    data, path = sample
    for length in [*range(20), *range(20, len(data), len(data) // 60), len(data) - 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=str(path)):
            load(path)


def test_changed_bytes(sample):
    """Refused, or other weights of the right shapes; no crash, no other error, no memory."""
    data, path = sample
    path.write_bytes(data)
    assert_sound(load(path)[0])
    before = peak_memory()
    places = st.one_of(st.integers(0, 3000), st.integers(0, len(data) - 1))  # the head matters most

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4))
    def check(changes):
        changed = bytearray(data)
        for place, value in changes:
            changed[place] = value
        path.write_bytes(changed)
        load_or_refuse(path)

    check()
    assert peak_memory() < before + 100


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    st.binary(max_size=40), st.sampled_from([b"", b"\x80\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"PK"])
)
def test_arbitrary_bytes(data, head):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(head + data)
        with pytest.raises(UserError, match=str(path)):
            load(path)


# ------------------------------------------------------------------------------------------------
# Our own format.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_round_trip(arch, tmp_path):
    network = tiny(**ARCHITECTURES[arch]).train().to(memory_format=torch.channels_last)
    about = dict(step=7, sigma_init=2.5, name="Fréchet", nested={"a": [1, None, True]}, pair=(1, 2))
    save(tmp_path / "a.safetensors", network, **about)
    again, notes = load(tmp_path / "a.safetensors")
    assert_same(again, network)
    assert_sound(again)
    assert notes == about | {"pair": [1, 2]}
    assert again.config == json.loads(json.dumps(network.config))  # tuples come back as lists
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_flipped_bit_is_told_and_names_the_file(tmp_path):
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(0)
    save(path, tiny(), sigma_init=2.5, teacher="t")
    whole = path.read_bytes()
    for place in rng.integers(len(whole), size=60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.integers(8))]) + whole[place + 1 :])
        try:
            network, about = load(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
        else:  # in the name of the digest, or white space
            assert_same(network, tiny())
            assert about == {"sigma_init": 2.5, "teacher": "t"}


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, tiny())
    network, _ = load(path)
    with open(path, "rb+") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(network, tiny())


def resaved(path, config=CONFIG, about="{}", **changes):
    """A file like ours, with other contents.  changes: name=tensor or None, with __ for dots."""
    weights = tiny().state_dict() | {k.replace("__", "."): v for k, v in changes.items()}
    metadata = {"config": config if isinstance(config, str) else json.dumps(config), "about": about}
    weights = {k: v for k, v in weights.items() if v is not None}
    safetensors.torch.save_file(weights, path, {k: v for k, v in metadata.items() if v})
    return path


BIAS = "model__map_layer0__bias"


@pytest.mark.parametrize(
    "changes, message",
    [({BIAS: None}, "missing tensor model.map_layer0.bias"),
     ({"model__more": torch.ones(1)}, "unknown tensor model.more"),
     ({BIAS: torch.ones(15)}, r"model.map_layer0.bias is \(15,\) torch.float32, the network needs \(16,\)"),
     ({BIAS: torch.ones(16).half()}, r"bias is \(16,\) torch.float16, .* needs \(16,\) torch.float32"),
     ({BIAS: torch.full((16,), torch.nan)}, "model.map_layer0.bias has values that are not finite"),
     ({"config": ""}, "a safetensors file, but not one of ours"),
     ({"about": ""}, "a safetensors file, but not one of ours"),
     ({"config": "{"}, "damaged, or of another kind .JSONDecodeError"),
     ({"config": "[" * 100_000}, "damaged, or of another kind .RecursionError"),
     ({"config": "[]"}, "not a dictionary"),
     ({"about": "3"}, "not a dictionary"),
     ({"about": '{"sigma_init": NaN}'}, "its notes have sigma_init=nan"),
     ({"about": '{"sigma_init": true}'}, "its notes have sigma_init=True"),
     ({"about": '{"sigma_init": -2.5}'}, "its notes have sigma_init=-2.5"),
     ({"about": '{"sigma_init": 1e400}'}, "its notes have sigma_init=inf"),
     ({"about": '{"sigma_init": "2.5"}'}, "its notes have sigma_init='2.5'"),
     ({"about": '{"teacher": ["a"]}'}, r"its notes have teacher=\['a'\]"),
     ({"about": r'{"teacher": "a\u001b[2Jb"}'}, r"its notes have teacher='a.x1b"),
     ({"about": json.dumps({"teacher": "a" * 10**5})}, r"its notes have teacher='aaa"),
     ({"about": '{"preset": {"a": 1}}'}, r"its notes have preset=\{'a': 1\}"),
     ({"config": CONFIG | {"num_blocks": 10**6}}, "too few for 2 levels of 1000000 blocks"),
     ({"config": CONFIG | {"channel_mult": []}}, "damaged, or of another kind"),
     ({"config": CONFIG | {"channel_mult": [1] * 10**5}}, r"with channel_mult=\[1, 1, 1, 1, 1, 1, \.\.\.\]"),
     ({"config": CONFIG | {"model_channels": 2048}}, "the network needs"),
     ({"config": CONFIG | {"label_dim": 2**18}}, "the network needs")],
)  # fmt: skip
def test_wrong_safetensors(changes, message, tmp_path):
    before = peak_memory()
    with pytest.raises(UserError, match=rf"a\.safetensors: .*{message}") as error:
        load(resaved(tmp_path / "a.safetensors", **changes))
    assert len(str(error.value)) < len(str(tmp_path)) + 250
    assert peak_memory() < before + 200  # a network of these sizes would take gigabytes


def test_other_files(tmp_path):
    torch.save({"ema": torch.ones(3)}, tmp_path / "zip.pt")
    torch.save({"ema": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html>")
    dump([1, 2], tmp_path / "list.pkl")
    for name, message in (
        ("zip.pt", "a zip file, as torch.save writes; need .safetensors of ours or .pkl of EDM"),
        ("old.pt", "a pickle, but not one of EDM: no network under 'ema'"),
        ("list.pkl", "a pickle, but not one of EDM: no network under 'ema'"),
        ("foreign.safetensors", "a safetensors file, but not one of ours"),
        ("page.pkl", "neither a .safetensors file of ours nor a .pkl file of EDM"),
        ("none.pkl", "No such file or directory"),
        ("", "Is a directory"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            load(tmp_path / name)


def test_replacing(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.txt", []
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"  # some writers append theirs
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, f=original: (calls.append(name), f(*a)))
    with replacing(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]
    assert calls == ["fsync", "replace"]


# ------------------------------------------------------------------------------------------------
# The command line.


def test_command_line(content, tmp_path):
    """As users call it: from another folder, in a process of its own."""
    dump(content[0], tmp_path / "in.pkl")
    done = spawn(ROOT / "edm/checkpoints.py", "convert", "in.pkl", "out.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    network, about = load(tmp_path / "out.safetensors")
    parameters, entries = sum(p.numel() for p in network.parameters()), len(network.state_dict())
    what = f"{parameters:,} parameters, {entries} entries, resolution 4, label_dim 3\n"
    assert done.stdout == f"wrote out.safetensors: {what}"
    assert about == {"converted_from": "in.pkl"}
    assert_same(network, content[1])


def test_convert_keeps_the_whole_augmented_teacher(tmp_path, capsys):
    path, out = reference("edm/snapshot_augmented.pkl"), tmp_path / "teacher.safetensors"
    main(["convert", str(path), str(out)])
    assert "149 entries" in capsys.readouterr().out
    network, about = load(out)
    assert_same(network, load(path)[0])
    assert network.config["augment_dim"] == 9 and about == {"converted_from": path.name}


def test_convert_notes_sigma_init(tmp_path, capsys):
    path, out = reference("edm/sid_student.pkl"), tmp_path / "student.safetensors"
    for words in ([], ["--sigma-init", "2.5"]):
        main(["convert", str(path), str(out), *words])
        assert load(out)[1] == {"converted_from": path.name} | ({"sigma_init": 2.5} if words else {})
        notes = dict(
            sigma_init=1e-30, teacher="/a\u3000b\u200b/\udcff.pkl"
        )  # what a distillation may have had
        save(out.with_name("odd"), load(out)[0], **notes)
        assert load(out.with_name("odd"))[1] == notes
        for again, code in ((2.5, 0), (2.4, bool(words))):  # a file keeps to what it names
            try:
                assert load(out, again)[1]["sigma_init"] == again and not code
            except UserError as error:
                assert code and str(error) == f"{out}: notes sigma_init 2.5, but --sigma-init says 2.4"
        out.unlink()


@pytest.mark.parametrize("sigma_init", [0.0, -2.5, float("nan"), float("inf")])
def test_impossible_sigma_init(sigma_init, tmp_path):
    with pytest.raises(UserError, match=f"--sigma-init must be positive, got {sigma_init}"):
        load(tmp_path / "none.pkl", sigma_init)


def test_show(tmp_path, capsys):
    save(tmp_path / "a.safetensors", tiny(), step=3)
    main(["show", str(tmp_path / "a.safetensors")])
    config, about, size = capsys.readouterr().out.splitlines()
    assert json.loads(config.removeprefix("config")) == json.loads(json.dumps(tiny().config))
    assert about == 'about   {"step": 3}'
    assert size.endswith("resolution 4, label_dim 3")


def test_command_line_errors(tmp_path, capsys):
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x04oops.")
    save(tmp_path / "good.safetensors", tiny())
    bad, good, out, nowhere = (
        str(tmp_path / name) for name in ("bad.pkl", "good.safetensors", "out.safetensors", "no/out")
    )
    for args, message in (
        (["convert", bad, out], f"error: {bad}: not a readable pickle"),
        (["convert", bad + "x", out], f"error: {bad}x: No such file or directory"),
        (["convert", good, good], f"error: {good}: exists already, and nothing is overwritten"),
        (["convert", good, nowhere], "No such file or directory"),
        (["show", bad], f"error: {bad}: not a readable pickle"),
        (["show"], "error: the following arguments are required: file"),
        (["melt", bad], "invalid choice: 'melt'"),
        ([], "error: the following arguments are required: {convert,show}"),
    ):
        with pytest.raises(SystemExit) as stop:
            sys.exit(main(args))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and message in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pkl", "good.safetensors"]


def test_help(capsys):
    for args, words in (
        (["--help"], ["convert", "show", "safetensors"]),
        (["convert", "--help"], ["file to write"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and all(word in out for word in words)
