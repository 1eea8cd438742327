"""Files of weights: round trips, and nothing but a UserError from damaged, foreign or hostile ones."""

import collections
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edm.checkpoints import main
from edm.images import edm_pickle, foreign
from edm.images.checkpoints import load, save
from edm.images.edm_pickle import read_pickle, read_storage
from edm.images.networks import ARCHITECTURES, EDMPrecond
from tests.snapshots import Reduced, edm_names, snapshot
from toy.files import UserError, replacing

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "edm"
MARKER = "edm_pickle_was_executed"
CONFIG = dict(img_resolution=4, img_channels=1, label_dim=3, model_channels=4, channel_mult=[1, 1],
              num_blocks=1, attn_resolutions=[4], augment_dim=2) | ARCHITECTURES["ncsnpp"]  # fmt: skip


def reference(name):
    if not (REFERENCE / name).exists():
        pytest.skip(f"needs the reference files in EDM's format: no {REFERENCE / name}")
    return REFERENCE / name


def tiny(**changes):
    torch.manual_seed(0)
    network = EDMPrecond(**CONFIG | changes)
    for p in network.parameters():
        nn.init.normal_(p)
    return network.eval()


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert [*a] == [*b]
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_sound(network):
    """What load promises of whatever it does not refuse."""
    with torch.device("meta"):
        expected = EDMPrecond(**network.config).state_dict()
    found = network.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert all(v.dtype == torch.float32 and v.device.type == "cpu" for v in found.values())
    assert all(v.isfinite().all() for v in found.values())
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def load_or_refuse(path):
    try:
        network, about = load(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert_sound(network)
        assert isinstance(about, dict)


def peak_memory():
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# ------------------------------------------------------------------------------------------------
# A file in EDM's format, written by Python's own pickler and torch's own tensors.


@pytest.fixture
def content():
    """The top level of such a file, and its network."""
    network = tiny(sigma_data=0.7)
    changes = dict(sigma_data=np.float64(0.7), use_fp16=False, model_type="SongUNet", sigma_min=0,
                   sigma_max=float("inf"))  # fmt: skip
    with edm_names():
        yield snapshot(network, network.config | changes), network


def state_of(ema, *path):
    """The attribute dict of a module in it."""
    state = ema.args[0]["state"]
    for name in path:
        child = state["_modules"][name]
        state = child.__dict__ if isinstance(child, nn.ModuleDict) else child.args[0]["state"]
    return state


def dump(content, path, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [4, 5])
def test_pickle_of_our_own_making(content, protocol, tmp_path):
    content, network = content
    got, about = load(dump(content, tmp_path / "named.safetensors", protocol))  # told apart by content
    assert_same(got, network)
    assert_sound(got)
    assert about == {} and json.dumps(got.config) == json.dumps(network.config)
    assert got.sigma_data == 0.7 and type(got.sigma_data) is float


def test_pickle_of_an_old_python(content, tmp_path):
    """Protocols 2 and 3 need more names, which are not worth supporting: EDM needs Python 3.8."""
    for protocol, name in ((2, r"_codecs\.encode"), (3, r"builtins\.set")):
        with pytest.raises(UserError, match=f"it asks for {name}, which is not allowed"):
            load(dump(content[0], tmp_path / "a.pkl", protocol))


def evil():
    return Reduced(os.system, f'touch "$TMPDIR/{MARKER}"')


def test_nothing_is_executed(content, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pickle.loads(pickle.dumps(evil()))
    (tmp_path / MARKER).unlink()  # so it does work where nothing prevents it
    for place in (
        [evil(), content[0]],
        {"first": evil()} | content[0],
        content[0] | {"augment_pipe": evil()},
    ):
        with pytest.raises(UserError, match=r"evil\.pkl: it asks for posix\.system, which is not allowed"):
            load(dump(place, tmp_path / "evil.pkl"))
    assert not (tmp_path / MARKER).exists()


def test_nothing_is_executed_within_a_storage(content, tmp_path, monkeypatch):
    """torch's own reader of these bytes would: it unpickles them without restriction."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    content, network = content
    bias = network.model.map_layer0.bias.detach()
    start = len(edm_pickle.CONSTANT) + 2
    call = pickle.dumps(evil(), protocol=2)[2:-1] + pickle.POP
    data = storage_bytes(bias)
    load_from_bytes = torch.storage._load_from_bytes
    inner = Reduced(load_from_bytes, data[:start] + call + data[start:])
    load_from_bytes(*inner.args)
    (tmp_path / MARKER).unlink()  # so it does work where nothing prevents it
    parameters = state_of(content["ema"], "model", "map_layer0")["_parameters"]
    parameters["bias"] = rebuilt(inner, 0, (16,), (1,))
    with pytest.raises(UserError, match="a tensor's storage is not in the one form"):
        load(dump(content, tmp_path / "evil.pkl"))
    assert not (tmp_path / MARKER).exists()


def storage_bytes(tensor):
    return tensor._typed_storage().__reduce__()[1][0]


def rebuilt(storage, offset, size, stride):
    """A parameter, pickled with these of its tensor."""
    tensor = Reduced(
        torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict()
    )
    return Reduced(torch._utils._rebuild_parameter, tensor, False, collections.OrderedDict())


def replace(content, **parts):
    state_of(content["ema"], "model", "map_layer0")["_parameters"].update(parts)


def bias(content, count=16, **how):
    args = dict(offset=0, size=(16,), stride=(1,)) | how
    storage = Reduced(torch.storage._load_from_bytes, storage_bytes(torch.ones(count)))
    replace(content, bias=rebuilt(storage, **args))


def shared(content):
    layers = state_of(content["ema"], "model")["_modules"]
    layers["map_layer1"] = layers["map_layer0"]


def cycle(content):
    modules = state_of(content["ema"], "model", "enc")["_modules"]
    modules["2x2_down"] = content["ema"].args[0]["state"]["_modules"]["model"]


def options(**changes):
    return lambda content: state_of(content["ema"])["_init_kwargs"].update(changes)


def renamed(**names):
    def change(content):
        content["ema"].args[0]["class_name"] = names.get("outer", "EDMPrecond")
        state_of(content["ema"])["_modules"]["model"].args[0]["class_name"] = names.get("inner", "SongUNet")

    return change


WRONG = {
    "no_ema": (lambda content: content.pop("ema"), "not one of EDM: no network under 'ema'"),
    "none": (lambda content: content.update(ema=None), "not one of EDM: no network under 'ema'"),
    "vp": (renamed(outer="VPPrecond"), "'VPPrecond', 'SongUNet'.; only EDMPrecond around SongUNet"),
    "adm": (renamed(inner="DhariwalUNet"), "'EDMPrecond', 'DhariwalUNet'.; .*ADM, the network of"),
    "positional": (lambda c: state_of(c["ema"]).update(_init_args=(4, 1)), "made with positional arguments"),
    "unknown_option": (options(colour=3), "cannot build a network with colour=3"),
    "decoder": (options(decoder_type="skip"), "decoder_type must be one of standard, got 'skip'"),
    "wrong_type": (options(num_blocks="1"), "cannot build a network with num_blocks='1'"),
    "nan": (options(dropout=float("nan")), "cannot build a network with dropout=nan"),
    "fractional": (options(model_channels=4.0), "cannot build a network with model_channels=4.0"),
    "blocks": (options(num_blocks=10**5), "tensors are too few for 2 levels of 100000 blocks"),
    "width": (options(model_channels=2**19), "tensor model.map_noise.freqs is .4,."),
    "float32": (options(sigma_data=np.float32(0.7)), "a numpy number that is not a float64"),
    "missing": (lambda c: replace(c, bias=None), "missing tensor model.map_layer0.bias"),
    "extra": (lambda c: replace(c, more=nn.Parameter(torch.ones(2))), "unknown tensor model.map_layer0.more"),
    "shape": (lambda c: bias(c, size=(4, 4), stride=(4, 1)), r"bias is \(4, 4\) .* needs \(16,\)"),
    "short": (lambda c: bias(c, 15), "a tensor does not fill its storage of 15 elements"),
    "long": (lambda c: bias(c, 17), "a tensor does not fill its storage of 17 elements"),
    "offset": (lambda c: bias(c, offset=1), "a tensor does not fill its storage of 16 elements"),
    "size": (lambda c: bias(c, size=(2**62, 8)), "damaged, or|does not fill"),
    "negative": (lambda c: bias(c, size=(-2, -8), stride=(-8, 1)), "damaged, or|does not fill"),
    "stride": (lambda c: bias(c, size=(4, 4), stride=(1, 4)), "a tensor is not in C order"),
    "zero_stride": (lambda c: bias(c, stride=(0,)), "a tensor is not in C order"),
    "int64": (lambda c: replace(c, bias=nn.Parameter(torch.ones(16).long(), False)), "not in the one form"),
    "large": (lambda c: replace(c, bias=nn.Parameter(torch.full((16,), -4e38, dtype=torch.float64))),
              "tensor model.map_layer0.bias has values beyond float32's range"),
    "not_finite": (lambda c: replace(c, bias=nn.Parameter(torch.full((16,), torch.inf))), "not finite"),
    "bare_number": (lambda c: replace(c, bias=3), "damaged, or of another kind"),
    "shared": (shared, "a module or storage occurs twice"),
    "cycle": (cycle, "a module or storage occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_pickles(content, case, tmp_path):
    content, _ = content
    change, message = WRONG[case]
    change(content)
    before = peak_memory()
    with pytest.raises(UserError, match=rf"a\.pkl: .*({message})"):
        load(dump(content, tmp_path / "a.pkl"))
    assert peak_memory() < before + 200  # MB; mostly torch's own modules for the meta device


def test_two_tensors_of_one_storage(content, tmp_path):
    storage = Reduced(torch.storage._load_from_bytes, storage_bytes(torch.ones(16)))
    replace(content[0], bias=rebuilt(storage, 0, (16,), (1,)), more=rebuilt(storage, 0, (16,), (1,)))
    with pytest.raises(UserError, match="a module or storage occurs twice"):
        load(dump(content[0], tmp_path / "a.pkl"))


FLOATS = {"float16": 2, "float32": 4, "float64": 8}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 255, 256, 65535, 65536])
def test_storage(count, dtype):
    """Python pickles integers in one, two or four bytes."""
    values = torch.randn(count, dtype=getattr(torch, dtype))
    found = read_storage(storage_bytes(values))
    assert found.dtype == values.dtype and torch.equal(found, values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_byte_of_a_storage_counts(dtype):
    data = storage_bytes(torch.randn(300, dtype=getattr(torch, dtype)))
    for length in range(len(data)):
        with pytest.raises(UserError):
            read_storage(data[:length])
    with pytest.raises(UserError):
        read_storage(data + bytes(FLOATS[dtype]))
    for i in range(len(data) - FLOATS[dtype] * 300):
        for flip in (1, 2, 16, 128):
            with pytest.raises(UserError):
                read_storage(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.int16])
def test_storages_of_other_types(dtype):
    with pytest.raises(UserError, match="not in the one form"):
        read_storage(storage_bytes(torch.ones(3, dtype=dtype)))


# ------------------------------------------------------------------------------------------------
# Files in EDM's format written by EDM's code.


def test_original_pickle():
    """Weights bit for bit in the original's order, and the original's output."""
    network, about = load(reference("tiny_cond_vp.pkl"))
    file = np.load(reference("tiny_cond_vp.npz"))
    config, weights = read_pickle(reference("tiny_cond_vp.pkl"))
    assert [*weights] == [k.removeprefix("sd/") for k in file if k.startswith("sd/")]
    for name, tensor in network.state_dict().items():
        assert np.array_equal(tensor.numpy(), file[f"sd/{name}"]), name
        assert torch.equal(tensor, weights[name])
    wanted = json.loads(str(file["kwargs"]))
    for name in ("model_type", "use_fp16"):
        del wanted[name]
    assert about == {} and network.config == {"sigma_data": 0.5} | wanted == {"sigma_data": 0.5} | config
    x, sigma, labels, augment, want = (
        torch.from_numpy(file[k]) for k in ("x", "sigma", "class_labels", "augment_labels", "D")
    )
    assert (network(x, sigma, labels, augment) - want).abs().max() < 1e-5
    assert_sound(network)


@pytest.mark.parametrize(
    ("name", "largest"), [("augmented", 0), ("half", 2**-11), ("double", 2**-24)]
)  # the rounding: of the file, of the reader
def test_snapshots_of_other_precisions(name, largest, tmp_path, capsys):
    """One network, written in three precisions: float32's copy of each, told in one line."""
    foreign.tell.cache_clear()
    path = reference(f"snapshot_{name}.pkl")
    for _ in range(2):
        network, about = load(path)
    kind = {"half": "float16", "double": "float64"}.get(name)
    assert capsys.readouterr().err == (f"{path}: its weights are {kind}; read as float32\n" if kind else "")
    assert_sound(network)
    assert about == {}
    exact, _ = load(reference("snapshot_augmented.pkl"))
    for key, tensor in network.state_dict().items():
        want = exact.state_dict()[key]
        assert ((tensor - want).abs() <= largest * want.abs() + 2**-25).all(), key


def test_augmented_snapshot():
    """The original's output, with the layer for augmentations, without it, and all of it converted."""
    whole, _ = load(reference("snapshot_augmented.pkl"))
    file = np.load(reference("snapshot_augmented.npz"))
    x, sigma, labels, want = (torch.from_numpy(file[k]) for k in ("x", "sigma", "class_labels", "denoised"))
    assert whole.model.map_augment.weight.shape == (8, 9)
    assert (whole(x, sigma, labels) - want).abs().max() < 1e-5
    assert torch.equal(whole(x, sigma, labels, torch.zeros(6, 9)), whole(x, sigma, labels))
    assert (whole(x, sigma, labels, torch.ones(6, 9)) - want).abs().max() > 1e-3
    plain = load(reference("snapshot_augmented.pkl"))[0].without_augmentation()
    assert torch.equal(plain(x, sigma, labels), whole(x, sigma, labels))
    assert {*whole.state_dict()} - {*plain.state_dict()} == {"model.map_augment.weight"}
    assert_sound(plain)
    assert plain.without_augmentation() is plain


def test_pickle_of_newer_software():
    network, _ = load(reference("small_cond_vp_newformat.pkl"))
    assert_sound(network)
    assert network.shape == (3, 8, 8) and len(network.state_dict()) == 147


@pytest.mark.parametrize(
    "name, message",
    [("hostile", "it asks for posix.system, which is not allowed"),
     ("hostile_gadget", "it asks for torch.serialization.os.system, which is not allowed"),
     ("hostile_inner", "a tensor's storage is not in the one form that is accepted"),
     ("hostile_source", None)],
)  # fmt: skip
def test_hostile_pickles(name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = reference(f"{name}.pkl")
    if message:
        with pytest.raises(UserError, match=f"{name}.pkl: {message}"):
            load(path)
    else:  # the hostile part is source code, and that is not looked at
        assert_sound(load(path)[0])
    assert not (tmp_path / MARKER).exists()


# ------------------------------------------------------------------------------------------------
# Damage.


@pytest.fixture(params=["ours", "ours_pickled", "reference"])
def sample(request, tmp_path):
    """The bytes of a small valid file, and where to write changed ones."""
    if request.param == "reference":
        data = reference("small_cond_vp_newformat.pkl").read_bytes()
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
    command = [sys.executable, str(ROOT / "edm/checkpoints.py"), "convert", "in.pkl", "out.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    network, about = load(tmp_path / "out.safetensors")
    parameters, entries = sum(p.numel() for p in network.parameters()), len(network.state_dict())
    what = f"{parameters:,} parameters, {entries} entries, resolution 4, label_dim 3\n"
    assert done.stdout == f"wrote out.safetensors: {what}"
    assert about == {"converted_from": "in.pkl"}
    assert_same(network, content[1])


def test_convert_keeps_the_whole_augmented_teacher(tmp_path, capsys):
    path, out = reference("snapshot_augmented.pkl"), tmp_path / "teacher.safetensors"
    main(["convert", str(path), str(out)])
    assert "149 entries" in capsys.readouterr().out
    network, about = load(out)
    assert_same(network, load(path)[0])
    assert network.config["augment_dim"] == 9 and about == {"converted_from": path.name}


def test_convert_notes_sigma_init(tmp_path, capsys):
    path, out = reference("sid_student.pkl"), tmp_path / "student.safetensors"
    for words in ([], ["--sigma-init", "2.5"]):
        main(["convert", str(path), str(out), *words])
        assert load(out)[1] == {"converted_from": path.name} | ({"sigma_init": 2.5} if words else {})
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
