"""EDM's networks: against vectors of the original where these are at hand, and from first principles."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edm.images.networks import ARCHITECTURES, Block, Conv2d, EDMPrecond, Generator, SongUNet
from tests.common import reference

VECTORS = ["tiny_uncond_vp", "tiny_cond_vp", "tiny_uncond_ve", "tiny_cond_ve", "tiny_gray8"]
VECTORS += ["full_uncond_vp", "full_cond_ve"]
SMALL = dict(img_resolution=8, img_channels=3, model_channels=8, channel_mult=(1, 2), num_blocks=1,
             attn_resolutions=(4,), augment_dim=9)  # fmt: skip
CIFAR10 = dict(img_resolution=32, img_channels=3, channel_mult=(2, 2, 2), augment_dim=9, dropout=0.13)


def fill(network, seed):
    """Weights of the usual size everywhere (as initialised, many layers are next to nothing)."""
    rng = np.random.RandomState(seed)
    for name, tensor in network.state_dict().items():
        if not name.endswith("resample_filter"):
            v = rng.standard_normal(tensor.shape)
            if name.endswith("freqs"):
                v = 16 * v
            elif v.ndim > 1:
                v = v / math.sqrt(math.prod(v.shape[1:]))
            else:
                v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
            tensor.copy_(torch.from_numpy(v.astype(np.float32)))
    return network.eval()


def small(arch="ncsnpp", label_dim=10, seed=0, **changes):
    return fill(EDMPrecond(**SMALL | ARCHITECTURES[arch] | dict(label_dim=label_dim) | changes), seed)


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------
# Against the original.


def original(name):
    """Our network with the weights of a reference file, and that file's arrays as tensors."""
    file = np.load(reference(f"edm/{name}.npz"))
    config = json.loads(str(file["kwargs"]))
    assert config.pop("model_type") == "SongUNet" and not config.pop("use_fp16")
    network = EDMPrecond(**config).eval()
    arrays = {k: torch.from_numpy(file[k]) for k in file if file[k].dtype.kind == "f"}
    if "seed" in file:
        assert [*network.state_dict()] == file["sd_head_names"].tolist()
        fill(network, int(file["seed"]))
        first = torch.stack([v.flatten()[0] for v in network.state_dict().values()])
        assert torch.equal(first, arrays["sd_first_value"])
    else:
        weights = {k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")}
        assert [*weights] == [*network.state_dict()]
        network.load_state_dict(weights)
    return network, arrays, file["pgrad_names"].tolist()


@pytest.mark.parametrize("name", VECTORS)
def test_output_and_gradients_of_the_original(name):
    network, a, names = original(name)
    x, labels = a["x"].requires_grad_(), dict(class_labels=a.get("class_labels"))
    out = network(x, a["sigma"], **labels, augment_labels=a.get("augment_labels"))
    (out * a["v"]).sum().backward()
    assert error(out, a["D"]) < 1e-5
    assert error(x.grad, a["dx"]) < 1e-5
    gradients = {k.removeprefix("model."): p.grad.norm().item() for k, p in network.named_parameters()}
    got = [gradients[k.removeprefix("model.")] for k in names]
    assert len(got) == len(gradients)
    np.testing.assert_allclose(got, a["pgrad_norm"].numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in VECTORS if name.startswith("tiny")])
@torch.no_grad()
def test_labels_and_sigma_may_be_left_out_or_shared(name):
    network, a, _ = original(name)
    labels, augment = a.get("class_labels"), a.get("augment_labels")
    if "D_no_augment" in a:
        assert error(network(a["x"], a["sigma"], labels), a["D_no_augment"]) < 1e-5
    if "D_no_labels" in a:
        assert error(network(a["x"], a["sigma"], None, augment), a["D_no_labels"]) < 1e-5
    assert error(network(a["x"], 1.7, labels, augment), a["D_sigma_one_element"]) < 1e-5


@pytest.mark.parametrize(
    "name, arch, label_dim", [("uncond_vp", "ddpmpp", 0), ("cond_ve", "ncsnpp", 10)], ids=["vp", "ve"]
)
def test_names_and_shapes_of_the_original(name, arch, label_dim):
    lines = reference(f"edm/keys_{name}.txt").read_text().splitlines()
    with torch.device("meta"):
        network = EDMPrecond(**CIFAR10, **ARCHITECTURES[arch], label_dim=label_dim)
    assert [f"{k}\t{list(v.shape)}" for k, v in network.state_dict().items()] == lines


@pytest.mark.parametrize(
    "arch, label_dim, parameters, entries",
    [("ddpmpp", 0, 55_733_891, 425), ("ddpmpp", 10, 55_735_299, 427),
     ("ncsnpp", 0, 56_397_827, 432), ("ncsnpp", 10, 56_400_643, 434)],
)  # fmt: skip
def test_sizes_of_the_released_networks(arch, label_dim, parameters, entries):
    with torch.device("meta"):
        network = EDMPrecond(**CIFAR10, **ARCHITECTURES[arch], label_dim=label_dim)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == entries


@pytest.mark.parametrize(
    "arch, values",
    [("ddpmpp", [1.079720, -0.634435, 0.052222]), ("ncsnpp", [1.056478, -0.470231, 0.178025])],
)  # fmt: skip
@torch.no_grad()
def test_pinned_output(arch, values):
    """Computed by this implementation when it agreed with all vectors of the original."""
    rng = np.random.RandomState(1)
    x, labels = rng.standard_normal((2, 3, 8, 8)), np.eye(10)[[3, 7]]
    out = small(arch)(torch.from_numpy(x), torch.tensor([0.3, 4]), torch.from_numpy(labels))
    np.testing.assert_allclose(out.flatten()[[0, 100, 383]], values, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Layers.


def test_initialisation():
    """Xavier-uniform with a gain per kind of layer, biases 0, norms 1; so the network starts near 0."""
    torch.manual_seed(0)
    network = SongUNet(16, 3, 3, 10, 9, model_channels=32, channel_mult=(1, 2), **ARCHITECTURES["ncsnpp"])
    gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.GroupNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all() and layer.eps == 1e-6
            assert layer.num_groups == min(32, layer.num_channels // 4)
        elif isinstance(layer, (nn.Linear, Conv2d)):
            assert layer.bias is None or (layer.bias == 0).all()
            n_out, n_in, *kernel = layer.weight.shape
            gain = next((g for end, g in gains.items() if name.endswith(end)), 1)
            bound = gain * math.sqrt(6 / ((n_in + n_out) * math.prod(kernel)))
            assert 0.95 * bound < layer.weight.abs().max() <= bound * 1.000001, name
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
    assert network.map_noise.freqs.std().item() == pytest.approx(16, rel=0.3)
    out = network(images(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, 10))
    assert out.abs().max() < 1e-2


@torch.no_grad()
def test_attention_against_a_loop():
    """Channel 3c + j of qkv is query, key or value (j = 0, 1, 2) of channel c."""
    C, H, W = 8, 2, 3
    block = Block(C, C, 4, attention=True).eval()
    block.proj.weight.copy_(torch.eye(C)[:, :, None, None])
    x = images(1, C, H, W)
    qkv = block.qkv(x)[0].flatten(1)
    q, k, v = qkv[0::3], qkv[1::3], qkv[2::3]  # (C, HW)
    want = torch.zeros(C, H * W)
    for i in range(H * W):
        logits = torch.stack([(q[:, i] * k[:, j]).sum() / math.sqrt(C) for j in range(H * W)])
        for j, weight in enumerate(logits.exp() / logits.exp().sum()):
            want[:, i] += weight * v[:, j]
    assert error(block.attend(x)[0].flatten(1), want) < 1e-6


def test_block_scales_its_sums():
    """With zero convolutions a block is x sqrt(1/2), and x/2 with attention: the variance of sums stays."""
    x, emb = images(2, 8, 4, 4), torch.randn(2, 4)
    for attention, factor in ((False, math.sqrt(0.5)), (True, 0.5)):
        block = Block(8, 8, 4, attention=attention).eval()
        for layer in (block.conv1, block.proj) if attention else (block.conv1,):
            nn.init.zeros_(layer.weight)
        assert error(block(x, emb), factor * x) < 1e-6


@torch.no_grad()
def test_box_filter_averages_and_repeats():
    x = images(2, 4, 6, 6)
    assert error(Conv2d(4, 4, 3, down=True).resample(x, 0), F.avg_pool2d(x, 2)) < 1e-6
    assert error(Conv2d(4, 4, 3, up=True).resample(x, 0), F.interpolate(x, scale_factor=2)) < 1e-6


@torch.no_grad()
def test_wide_filter():
    """Taps 1, 3, 3, 1: constants stay, up is four times the transpose of down, the kernel is centred."""
    taps = ARCHITECTURES["ncsnpp"]["resample_filter"]
    down, up = Conv2d(2, 2, 3, down=True, taps=taps), Conv2d(2, 2, 3, up=True, taps=taps)
    ones = torch.ones(1, 2, 8, 8)
    assert error(down.resample(ones, 1)[..., 1:-1, 1:-1], ones[..., :2, :2]) < 1e-6
    assert error(up.resample(ones, 1)[..., 1:-1, 1:-1], torch.ones(1, 2, 14, 14)) < 1e-6
    x, y = images(1, 2, 8, 8), images(1, 2, 4, 4, seed=2)
    assert error((up.resample(y, 1) * x).sum(), 4 * (y * down.resample(x, 1)).sum()) < 1e-4
    spike = torch.zeros(1, 2, 3, 3)
    spike[..., 1, 1] = 1
    kernel = torch.outer(torch.tensor(taps), torch.tensor(taps)) / 16
    assert torch.equal(up.resample(spike, 1)[0, 0], F.pad(kernel, (1, 1, 1, 1)))


@torch.no_grad()
def test_order_of_filter_and_convolution():
    """Normal: filter, then convolution.  Fused: convolution of a wider field, then filter unpadded."""
    x, taps = images(1, 2, 8, 8), (1, 3, 3, 1)
    normal, fused = (Conv2d(2, 3, 3, down=True, taps=taps, fused=fused) for fused in (False, True))
    fused.weight.copy_(normal.weight)
    for layer in (normal, fused):
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    kernel = torch.outer(torch.tensor(taps), torch.tensor(taps)) / 64

    def filtered(x):
        """x: (1, C, 2n + 2, ...) -> (1, C, n, ...), window by window."""
        n = x.shape[-1] // 2 - 1
        rows = [[(x[0, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] * kernel).sum((1, 2)) for j in range(n)]
                for i in range(n)]  # fmt: skip
        return torch.stack([torch.stack(row, -1) for row in rows], -2)[None]

    want_normal = F.conv2d(filtered(F.pad(x, [1] * 4)), normal.weight, normal.bias, padding=1)
    want_fused = filtered(F.conv2d(F.pad(x, [2] * 4), fused.weight)) + fused.bias[:, None, None]
    assert error(normal(x), want_normal) < 1e-5
    assert error(fused(x), want_fused) < 1e-5
    assert error(want_normal, want_fused) > 0.1


@pytest.mark.parametrize(
    "change, message",
    [(dict(embedding_type="sinus"), "embedding_type must be one of positional, fourier, got 'sinus'"),
     (dict(encoder_type="skip"), "encoder_type must be one of standard, residual, got 'skip'"),
     (dict(decoder_type="skip"), "decoder_type must be one of standard, got 'skip'"),
     (dict(img_resolution=10, channel_mult=(1, 1, 1)), "resolution 10 cannot be halved 2 times")],
)  # fmt: skip
def test_what_is_not_supported(change, message):
    with pytest.raises(ValueError, match=message):
        EDMPrecond(**SMALL | change)


# ------------------------------------------------------------------------------------------------
# The denoiser and the generator.


@torch.no_grad()
def test_preconditioning():
    """Against EDM's Table 1, with a network that records its arguments and returns a constant."""
    network, seen = small(label_dim=0, sigma_data=0.7), {}

    class Constant(nn.Module):
        map_layer0 = network.model.map_layer0

        def forward(self, x, c_noise, class_labels, augment_labels):
            seen.update(x=x, c_noise=c_noise)
            return torch.full_like(x, 2)

    network.model = Constant()
    x, sigma = images(2, 3, 8, 8), torch.tensor([0.1, 3.0])
    out = network(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        total = s**2 + 0.7**2
        assert error(seen["x"][i], x[i] / math.sqrt(total)) < 1e-6
        assert seen["c_noise"][i].item() == pytest.approx(math.log(s) / 4)
        assert error(out[i], 0.7**2 / total * x[i] + s * 0.7 / math.sqrt(total) * 2) < 1e-6


def test_gradcheck():
    """Gradients with respect to image, noise level and one weight of each kind."""
    network = fill(EDMPrecond(4, 1, 2, model_channels=4, channel_mult=(1, 1), num_blocks=1,
                              attn_resolutions=(4,), **ARCHITECTURES["ncsnpp"]), 0).double()  # fmt: skip
    ends = ("map_label.weight", "4x4_conv.weight", "2x2_aux_residual.weight", "2x2_block0.affine.bias",
            "2x2_in0.qkv.bias", "2x2_in0.norm2.weight", "4x4_aux_conv.weight")  # fmt: skip
    names = [k for k, _ in network.named_parameters() if k.endswith(ends)]
    assert len(names) >= len(ends)
    labels = torch.eye(2, dtype=torch.float64)[:1]

    def f(x, sigma, *weights):
        return torch.func.functional_call(network, dict(zip(names, weights)), (x, sigma, labels))

    x, sigma = images(1, 1, 4, 4).double(), torch.tensor([0.8], dtype=torch.float64)
    inputs = [x, sigma, *(network.get_parameter(k).detach() for k in names)]
    assert torch.autograd.gradcheck(f, [v.clone().requires_grad_() for v in inputs], fast_mode=True)


@torch.no_grad()
def test_labels():
    x, sigma, labels = images(3, 3, 8, 8), torch.tensor([0.1, 1, 10]), torch.eye(10)[[1, 2, 3]]
    conditional, unconditional = small(), small(label_dim=0)
    assert torch.equal(conditional(x, sigma), conditional(x, sigma, torch.zeros(3, 10)))
    assert error(conditional(x, sigma), conditional(x, sigma, labels)) > 0.01
    assert torch.equal(unconditional(x, sigma), unconditional(x, sigma, labels))
    augmented = unconditional(x, sigma, augment_labels=images(3, 9))
    assert error(unconditional(x, sigma), augmented) > 0.01
    assert torch.equal(unconditional(x, sigma), unconditional(x, sigma, augment_labels=torch.zeros(3, 9)))


@torch.no_grad()
def test_labels_and_sigma_of_other_shapes_are_named():
    network, x = small(), images(10, 3, 8, 8)
    rows = torch.eye(10)[:1]
    assert error(network(x, 0.5, rows), network(x, torch.full((10,), 0.5), rows.expand(10, 10))) < 1e-6
    assert torch.equal(network(x, 0.5, rows.long()), network(x, torch.tensor([0.5]), rows))
    wrong = (
        torch.arange(10),
        torch.tensor(3),
        list(range(10)),
        torch.arange(10)[:, None],
        rows[0],
        rows[:, :9],
    )
    for labels in (*wrong, torch.eye(10)[:3], torch.arange(10.0)):
        with pytest.raises(ValueError, match=r"class_labels must be one-hot, of shape \(10, 10\), got \("):
            Generator(network)(x, class_labels=labels)
    with pytest.raises(ValueError, match=r"sigma must be a number or \(10,\), got 3 of them"):
        network(x, torch.ones(3))


@torch.no_grad()
def test_dropout_is_for_training_only():
    x, sigma, labels = images(3, 3, 8, 8), torch.ones(3), torch.eye(10)[[1, 2, 3]]
    network = small(dropout=0.5)
    assert torch.equal(network(x, sigma, labels), small(dropout=0)(x, sigma, labels))
    assert error(network.train()(x, sigma, labels), network.eval()(x, sigma, labels)) > 0.01
    network = small(dropout=0, label_dropout=1)  # all labels dropped
    assert torch.equal(network.train()(x, sigma, labels), network.eval()(x, sigma))
    assert error(network.eval()(x, sigma, labels), network.eval()(x, sigma)) > 0.01


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_bfloat16(arch):
    """Autocast rounds within the U-Net only: noise embedding and preconditioner stay float32."""
    network, x, sigma = small(arch), images(3, 3, 8, 8), torch.tensor([0.002, 1, 80])
    plain = network(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x, sigma)
        embedding = network.model.map_layer1.register_forward_hook(
            lambda module, args, out: seen.append(out.dtype)
        )
        seen = []
        network(x, sigma)
        embedding.remove()
    assert low.dtype == torch.float32 and seen == [torch.float32]
    assert 1e-4 < error(plain, low) < 0.1
    assert error(plain[:1], low[:1]) < 1e-3  # little noise: nearly x, which is not rounded


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_memory_format(arch):
    network, x, sigma = small(arch), images(3, 3, 8, 8), torch.tensor([0.1, 1, 10])
    plain = network(x, sigma)
    last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), sigma)
    assert error(plain, last) < 1e-5


@torch.no_grad()
def test_dtypes_and_shape():
    network, x = small(), images(2, 3, 8, 8)
    assert network.shape == (3, 8, 8)
    single = network(x.double(), torch.ones(2, dtype=torch.float64))
    assert single.dtype == torch.float32  # of the weights
    assert network.double()(x, 1.0).dtype == torch.float64


def test_config_rebuilds_the_network():
    network = small()
    again = EDMPrecond(**json.loads(json.dumps(network.config)))
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in network.state_dict().items()
    ]


@torch.no_grad()
def test_generator():
    """g(z) = D(s z; s)."""
    network, z, labels = small(), images(2, 3, 8, 8), torch.eye(10)[[1, 2]]
    assert Generator(network).sigma_init == 2.5
    out = Generator(network, 1.5)(z, class_labels=labels)
    assert torch.equal(out, network(1.5 * z, torch.tensor([1.5, 1.5]), labels))
