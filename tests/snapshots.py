"""Files in the form of EDM's .pkl, by Python's own pickler and torch's own tensors, of networks of ours."""

import collections
import pickle
import resource
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from edm.images.networks import ARCHITECTURES, EDMPrecond

CONFIG = dict(img_resolution=4, img_channels=1, label_dim=3, model_channels=4, channel_mult=[1, 1],
              num_blocks=1, attn_resolutions=[4], augment_dim=2) | ARCHITECTURES["ncsnpp"]  # fmt: skip


class Reduced:
    """Pickled as a call of function, with args."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def _reconstruct_persistent_obj(*args):
    raise AssertionError("executed")


@contextmanager
def edm_names():
    """While it lasts, the function above bears the name that stands in EDM's files; pickle looks it up."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj, package.persistence = _reconstruct_persistent_obj, module
    _reconstruct_persistent_obj.__module__ = module.__name__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, module.__name__, module)
        yield


def persistent(class_name, **state):
    about = dict(type="class", version=6, module_src="raise SystemExit", class_name=class_name)
    return Reduced(_reconstruct_persistent_obj, about | {"state": state})


def stand_in(module, **more):
    """What EDM's persistence would write of a module of ours."""
    frozen = lambda p: None if p is None else nn.Parameter(p.detach(), requires_grad=False)
    parts = dict(
        _parameters={k: frozen(p) for k, p in module._parameters.items()},
        _buffers=collections.OrderedDict(module._buffers, unused=None),
        _modules={k: m and stand_in(m) for k, m in module._modules.items()},
        _non_persistent_buffers_set=set(), _forward_hooks=collections.OrderedDict(),
        _is_full_backward_hook=None,
    )  # fmt: skip
    if isinstance(module, nn.ModuleDict):
        written = nn.ModuleDict()
        written.__dict__.update(parts)
        return written
    return persistent(type(module).__name__, training=False, scale=np.float64(0.5), **parts, **more)


def snapshot(network, kwargs):
    """The top level of a file of EDM's training: an EDMPrecond, and the constructor arguments it records."""
    return dict(
        ema=stand_in(network, _init_args=(), _init_kwargs=kwargs),
        loss_fn=persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        augment_pipe=persistent("AugmentPipe", p=0.12),
        dataset_kwargs=dict(path="datasets/cifar10-32x32.zip", use_labels=bool(network.label_dim)),
    )


def write_snapshot(path, network, kwargs):
    with edm_names(), open(path, "wb") as file:
        pickle.dump(snapshot(network, kwargs), file, protocol=4)


def dump(content, path, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def tiny(**changes):
    torch.manual_seed(0)
    network = EDMPrecond(**CONFIG | changes)
    for p in network.parameters():
        nn.init.normal_(p)
    return network.eval()


@pytest.fixture
def content():
    """The top level of such a file, and its network."""
    network = tiny(sigma_data=0.7)
    changes = dict(sigma_data=np.float64(0.7), use_fp16=False, model_type="SongUNet", sigma_min=0,
                   sigma_max=float("inf"))  # fmt: skip
    with edm_names():
        yield snapshot(network, network.config | changes), network


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


def peak_memory():
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
