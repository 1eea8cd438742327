"""EDM's pickled networks: ours in that form, those of EDM's own code; nothing in a file is executed."""

import collections
import json
import os
import pickle
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

from edm.images import edm_pickle, foreign
from edm.images.checkpoints import load
from edm.images.edm_pickle import read_pickle, read_storage
from tests import snapshots
from tests.common import reference
from tests.snapshots import Reduced, assert_same, assert_sound, dump, peak_memory
from toy.files import UserError

content = snapshots.content  # a fixture
MARKER = "edm_pickle_was_executed"


def state_of(ema, *path):
    """The attribute dict of a module in it."""
    state = ema.args[0]["state"]
    for name in path:
        child = state["_modules"][name]
        state = child.__dict__ if isinstance(child, nn.ModuleDict) else child.args[0]["state"]
    return state


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


def twice(content):
    storage = Reduced(torch.storage._load_from_bytes, storage_bytes(torch.ones(16)))
    replace(content, bias=rebuilt(storage, 0, (16,), (1,)), more=rebuilt(storage, 0, (16,), (1,)))


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
    "two tensors of one storage": (twice, "a module or storage occurs twice"),
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
    network, about = load(reference("edm/tiny_cond_vp.pkl"))
    file = np.load(reference("edm/tiny_cond_vp.npz"))
    config, weights = read_pickle(reference("edm/tiny_cond_vp.pkl"))
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
    path = reference(f"edm/snapshot_{name}.pkl")
    for _ in range(2):
        network, about = load(path)
    kind = {"half": "float16", "double": "float64"}.get(name)
    assert capsys.readouterr().err == (f"{path}: its weights are {kind}; read as float32\n" if kind else "")
    assert_sound(network)
    assert about == {}
    exact, _ = load(reference("edm/snapshot_augmented.pkl"))
    for key, tensor in network.state_dict().items():
        want = exact.state_dict()[key]
        assert ((tensor - want).abs() <= largest * want.abs() + 2**-25).all(), key


def test_augmented_snapshot():
    """The original's output, with the layer for augmentations, without it, and all of it converted."""
    whole, _ = load(reference("edm/snapshot_augmented.pkl"))
    file = np.load(reference("edm/snapshot_augmented.npz"))
    x, sigma, labels, want = (torch.from_numpy(file[k]) for k in ("x", "sigma", "class_labels", "denoised"))
    assert whole.model.map_augment.weight.shape == (8, 9)
    assert (whole(x, sigma, labels) - want).abs().max() < 1e-5
    assert torch.equal(whole(x, sigma, labels, torch.zeros(6, 9)), whole(x, sigma, labels))
    assert (whole(x, sigma, labels, torch.ones(6, 9)) - want).abs().max() > 1e-3
    plain = load(reference("edm/snapshot_augmented.pkl"))[0].without_augmentation()
    assert torch.equal(plain(x, sigma, labels), whole(x, sigma, labels))
    assert {*whole.state_dict()} - {*plain.state_dict()} == {"model.map_augment.weight"}
    assert_sound(plain)
    assert plain.without_augmentation() is plain


def test_pickle_of_newer_software():
    network, _ = load(reference("edm/small_cond_vp_newformat.pkl"))
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
    path = reference(f"edm/{name}.pkl")
    if message:
        with pytest.raises(UserError, match=f"{name}.pkl: {message}"):
            load(path)
    else:  # the hostile part is source code, and that is not looked at
        assert_sound(load(path)[0])
    assert not (tmp_path / MARKER).exists()
