"""--device: what it means, and that nothing is float64 where a device has none.

There is no Mac here.  The meta device stands in for MPS: its tensors have a type and a place and no
numbers, so a whole step can be followed on it.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sim_core as sim
from edm import check_teacher, device, distill
from edm.algorithm2 import Distiller
from edm.images import checkpoints
from edm.images.data import Images
from edm.images.networks import EDMPrecond
from edm.images.sampler import heun
from edm.quality import metrics
from edm.text.pixart import PixArtDenoiser, sigma_of_t
from edm.training.trainee import make_accelerator
from tests import small
from toy.files import UserError


@pytest.mark.parametrize("here, processes, wanted, found", [
    ("", 1, "auto", "cpu"), ("mps", 1, "auto", "mps"), ("mps cuda", 1, "auto", "cuda"),
    ("mps", 2, "auto", "cpu"), ("mps", 1, "mps", "mps"), ("mps", 1, "cpu", "cpu"),
    ("", 1, "mps", "--device mps: no MPS device here"), ("mps", 1, "cuda", "--device cuda: no CUDA device"),
    ("mps", 2, "mps", "--device mps is for one process")])  # fmt: skip
def test_device_that_is_meant(here, processes, wanted, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in here)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in here)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, str(processes - ("RANK" in name)))
    if found.startswith("--"):
        with pytest.raises(UserError, match=found):
            device.find_device(wanted)
    else:
        assert device.find_device(wanted) == found


def test_memory_is_in_bytes_on_every_system(monkeypatch):
    use = SimpleNamespace(ru_maxrss=3000)
    monkeypatch.setattr("resource.getrusage", lambda who: use)
    cpu, mps = SimpleNamespace(type="cpu"), SimpleNamespace(type="mps")
    for system, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(device.sys, "platform", system)
        assert device.peak_memory(cpu) == 3000 * unit
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8)
    assert device.peak_memory(mps) == 7 and device.total_memory(mps) == 8


class Audit(TorchDispatchMode):
    """Counts the tensors made on the meta device, by type."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {k: None if k == "generator" else v for k, v in (kwargs or {}).items()}  # meta has none
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                self.found.setdefault(x.dtype, []).append(str(func))
        return out


@pytest.fixture
def audit(monkeypatch):
    """The meta device as a device without float64, and an Audit to be entered."""
    Adam = torch.optim.Adam
    monkeypatch.setattr(device, "WITHOUT_FLOAT64", {"meta"})
    monkeypatch.setattr(torch, "autocast", lambda *how, **more: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "Adam", lambda *given, fused, **more: Adam(*given, **more))

    def on_meta(**how):
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
        return Accelerator(**how)

    monkeypatch.setattr("edm.training.trainee.Accelerator", on_meta)
    for module in ("edm.algorithm2", "edm.training.denoising"):
        monkeypatch.setattr(f"{module}.generator_of", lambda *numbers: torch.Generator().manual_seed(0))
    draw = lambda name: lambda n, generator=None, dtype=None: name(n, device="meta", dtype=dtype)
    levels = {k: draw(v) for k, v in sim.SIGMA_DISTRIBUTIONS.items()}
    monkeypatch.setattr(sim, "SIGMA_DISTRIBUTIONS", levels)
    AcceleratorState._reset_state(True)
    yield Audit()
    AcceleratorState._reset_state(True)


def clean(audit, least):
    assert torch.float64 not in audit.found, audit.found[torch.float64]
    assert len(audit.found[torch.float32]) >= least, "hardly anything ran there"


@pytest.mark.parametrize(
    "choice", [dict(), dict(weighting="sid"), dict(weighting="edm", micro_batch=4)], ids=str
)
def test_a_step_of_the_distillation_makes_no_float64(audit, choice):
    cfg = small.config(**choice)
    accelerator = make_accelerator(cfg)
    with audit:
        task = distill.build(cfg, accelerator, small.network())
        assert task.device.type == "meta" and isinstance(task, Distiller)
        task.step(3)
    clean(audit, 500)


def test_a_step_of_the_teacher_makes_no_float64(audit):
    data = Images(torch.zeros(20, 1, 8, 8).byte(), torch.arange(20) % 10, "")
    with audit:
        net = small.network().to("meta").requires_grad_(True)
        small.teacher_task(net, data, batch=8, steps=4, flip=True).step(2)
    clean(audit, 200)


def test_the_sampler_and_the_metrics_make_no_float64(audit, monkeypatch):
    moved = []

    class Metric(metrics.FrechetInceptionDistance):
        def update(self, part, real):
            moved.append((part.device.type, part.dtype))

    monkeypatch.setattr(metrics, "FrechetInceptionDistance", Metric)
    monkeypatch.setattr(device, "exact", None)
    monkeypatch.setattr(metrics, "exact", lambda x: torch.zeros(x.shape).double())  # as x.cpu() would be
    with audit:
        z, labels = torch.randn(4, 1, 8, 8, device="meta"), torch.zeros(4, 10, device="meta")
        assert heun(small.network().to("meta"), z, class_labels=labels).dtype == torch.float32
        features = torch.randn(20, 6, device="meta")
        metrics.neighbour_radii(features)
        for compute in (lambda: metrics.share_inside(features, features, features[:, 0]),
                        lambda: metrics.frechet_distance(features, features)):  # fmt: skip
            with contextlib.suppress(RuntimeError, NotImplementedError):  # .item(), of no numbers
                compute()
    clean(audit, 300)
    assert moved == [("cpu", torch.float64)] * 2


def test_float64_goes_to_the_cpu_only_where_it_must(monkeypatch):
    x = torch.randn(3)
    assert (
        device.exact(x).dtype == torch.float64 == device.finest("cpu")
        and device.finest("cuda") == torch.float64
    )
    assert device.finest("mps") == torch.float32
    monkeypatch.setattr(device, "WITHOUT_FLOAT64", {"cpu"})
    assert heun(lambda x, sigma: 0.5 * x, torch.randn(2, 3)).dtype == torch.float32


def test_heun_is_float64_to_the_bit():
    """Against the same rule with its levels in a tensor."""
    net, z = small.network(), torch.randn(3, 1, 8, 8)
    cond = {"class_labels": torch.eye(10)[:3]}
    ramp = torch.linspace(0, 1, 6, dtype=torch.float64)
    top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = torch.cat([(top + ramp * (bottom - top)) ** 7, ramp.new_zeros(1)])
    slope = lambda x, s: (x - net(x.float(), s.float().expand(3), **cond).double()) / s
    x = z.double() * levels[0]
    for s, t in zip(levels, levels[1:]):
        first = slope(x, s)
        x = x + (t - s) * first if t == 0 else x + (t - s) / 2 * (first + slope(x + (t - s) * first, t))
    assert torch.equal(heun(net, z, steps=6, **cond), x)


def test_levels_in_float32_choose_the_same_steps(monkeypatch):
    exact = PixArtDenoiser(torch.nn.Linear(1, 1))
    monkeypatch.setattr(device, "WITHOUT_FLOAT64", {"cpu"})
    low = copy.deepcopy(exact).to("cpu")
    assert low.levels.dtype == low.edges.dtype == torch.float32 and exact.edges.dtype == torch.float64
    near = exact.edges.float()
    sigma = torch.cat([near, *(torch.nextafter(near, near * end) for end in (0, 2))])
    assert torch.equal(low.timestep(sigma), exact.timestep(sigma))
    assert len(sigma_of_t()) == 1000


@pytest.mark.parametrize("kind, capability, slow", [
    ("cpu", "AVX2", True), ("cpu", "AVX512", False), ("cuda", "AVX2", False)])  # fmt: skip
def test_where_bf16_is_slow(kind, capability, slow, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert device.slow_in_bf16(kind) == slow


def test_a_checked_teacher_computes_where_it_is_told(tmp_path):
    net = EDMPrecond(img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1)
    checkpoints.save(tmp_path / "t.safetensors", net)
    teacher = check_teacher.load(str(tmp_path / "t.safetensors"), None, "meta")
    assert next(teacher.denoiser.parameters()).is_meta and teacher.device == "meta"
    seen = []
    teacher.denoiser = lambda *given, **cond: seen.extend([*given, *cond.values()]) or torch.zeros(3, 1, 8, 8)
    teacher.cond = {"a": torch.ones(2, 1)}
    assert teacher.said(torch.ones(3, 1, 8, 8), 1.0).device.type == "cpu"
    assert [x.device.type for x in seen] == ["meta"] * 3
