"""The same numbers on every device and in every type as on a CPU in float64.

python -m pytest tests/test_anywhere.py --device cuda --dtype bfloat16
"""

import pytest
import torch
from torch.utils._pytree import tree_map

import sim_core as sim
from tests.test_core import SMOOTH, affine, randn
from toy.mixtures import make_target

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}


@pytest.fixture
def like(device, dtype):
    return {"device": device, "dtype": getattr(torch, dtype)}


def assert_close(found, expected, like):
    """Found is there and in that type; errors are measured by the largest number."""
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == torch.device(like["device"]).type and a.dtype == like["dtype"]
        assert (a.cpu().double() - b).abs().max() <= TOLERANCE[a.dtype] * (1e-3 + b.abs().max())


@pytest.mark.parametrize("space", sim.SPACES)
@pytest.mark.parametrize("distance", SMOOTH, ids=repr)
def test_every_loss_and_its_gradient(distance, space, like):
    x0, noise, sigma = 0.5 * randn(6, 3), randn(6, 3, seed=1), (0.3 * randn(6, seed=2)).exp()

    def results(**like):
        x, n, s = (tensor.to(**like) for tensor in (x0, noise, sigma))
        x.requires_grad_()
        networks = affine(0.7, 0.1), affine(0.5, -0.2)
        triple = sim.predictions(*networks, x, s, n, space)
        weights = [weight(triple, s, space, 0.5) for weight in sim.WEIGHTINGS.values()]
        losses = [sim.generator_loss(*networks, x, s, n, distance, space, weight=w) for w in weights]
        losses.append(sim.density_loss(*networks, x, s, n, distance, space))
        losses += [loss(*triple) for loss in (sim.sid_loss, sim.diff_instruct_loss)]
        losses.append(sim.full_loss(*triple, distance))
        found = [*losses, sim.fake_loss(networks[1], x, s, n, sim.edm_weight(s))]
        return found + [torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in losses]

    assert_close(results(**like), results(), like)


@pytest.mark.parametrize("name", sim.SIGMA_DISTRIBUTIONS)
def test_levels_are_drawn_where_they_are_needed(name, like):
    rng = torch.Generator(like["device"]).manual_seed(0)
    sigma = sim.SIGMA_DISTRIBUTIONS[name](20_000, generator=rng, **like)
    on_cpu = sim.SIGMA_DISTRIBUTIONS[name](20_000, generator=torch.Generator().manual_seed(1))
    assert sigma.device == rng.device and sigma.dtype == like["dtype"]
    for share in (0.1, 0.5, 0.9):
        assert abs((sigma.cpu().double() <= on_cpu.quantile(share)).double().mean() - share) < 0.03


def test_a_mixtures_score_and_denoiser(like):
    x, sigma = randn(200, 2), randn(200, seed=1).exp()
    if like["dtype"].itemsize < 4:
        pytest.skip("a posterior of 8 narrow blobs needs float32")

    def results(device="cpu", dtype=torch.float64):
        target = make_target("ring").to(device)
        target = type(target)(*(part.to(dtype) for part in (target.means, target.stds, target.weights)))
        return [of(x.to(device, dtype), sigma.to(device, dtype)) for of in (target.score, target.denoiser)]

    assert_close(results(**like), results(), like)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def task_on(device, dtype=torch.float64, **choice):
    state = pytest.importorskip("accelerate.state", reason="edm/requirements.txt is not installed")
    from tests import small

    state.AcceleratorState._reset_state(True)  # it remembers the device of the first
    return small.task_of(dtype, device=device, **choice)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("choice", [{}, {"share": False}, {"micro_batch": 4}], ids=str)
def test_both_updates_of_a_step(choice):
    here, there, drawn = task_on("cpu", **choice), task_on("cuda", **choice), {}

    def draw(*numbers):  # on another device a seed draws other numbers
        return drawn.setdefault(numbers, type(there).draw(there, *numbers))

    there.draw, here.draw = draw, lambda *numbers: tree_map(torch.Tensor.cpu, drawn[numbers])
    there.step(3)
    here.step(3)
    for name in ("fake", "generator"):
        found, expected = there.gradients[name].cpu(), here.gradients[name]
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.gpu
@needs_gpu
def test_no_step_waits_for_the_gpu():
    """tests/test_device.py says so of the meta device; here CUDA itself does."""
    task = task_on("cuda", torch.float32)
    task.step(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.step(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
