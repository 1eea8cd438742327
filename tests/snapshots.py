"""Files in the form of EDM's .pkl, of networks of ours, by Python's own pickler and torch's own tensors."""

import collections
import pickle
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
from torch import nn


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
