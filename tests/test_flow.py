"""Networks that predict velocities: by closed forms; which they are; a distillation."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PixArtTransformer2DModel,
)

import sim_core as sim
from edm import sample_pixart, train_teacher
from edm.config import TEACHERS, TEXT_DISTILLATIONS, TeacherTraining, TextDistillation, command_line, parse
from edm.images.checkpoints import save
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.text import digits
from edm.text.flow import CONFIG, FlowDenoiser, predictions_of, read_predictions
from edm.text.pixart import Guided, without
from edm.text.pixart_files import load_transformer
from edm.text.sampler import flow_scheduler, teacher_sampler
from tests import small_text
from tests.common import start
from tests.small import same, signal_at
from tests.small_text import SMALL, assert_algorithm_2, make_pipeline, record
from toy.files import UserError

fast = small_text.fast

VELOCITY = {"predicts": "velocity", "shift": 1.0, "timesteps": 1000}


class Exact(torch.nn.Module):
    """The velocity of data from N(mean, spread^2), as a transformer of diffusers would be asked for it."""

    mean, spread = 0.3, 0.7

    def __init__(self, dtype):
        super().__init__()
        self.proj_out = torch.nn.Linear(1, 1, dtype=dtype)
        self.config, self.told = SimpleNamespace(in_channels=2, sample_size=2), []

    def forward(self, x, encoder_hidden_states, timestep, encoder_attention_mask, return_dict):
        self.told.append(timestep)
        t = timestep.view(-1, 1, 1, 1) / 1000
        centred = (x - (1 - t) * self.mean) / ((1 - t) ** 2 * self.spread**2 + t**2)
        x0 = self.mean + (1 - t) * self.spread**2 * centred
        return (torch.cat([t * centred - x0, 1e4 + x], 1),)  # E[eps | x_t] - E[x0 | x_t]; no variance is read


def condition(n, dtype=torch.float32):
    return {"caption": torch.zeros(n, 1, 8, dtype=dtype), "mask": torch.ones(n, 1).long()}


# ----------------------------------------------------------------------------------------------
# The adapter.


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_denoiser_of_a_gaussian(dtype, error):
    sigma = torch.logspace(-2, 3, 26, dtype=dtype)
    x = torch.randn(26, 2, 2, 2, dtype=dtype) * (1 + sigma.view(-1, 1, 1, 1))
    net = FlowDenoiser(Exact(dtype))
    s, a = sigma.double().view(-1, 1, 1, 1), Exact.spread**2
    expected = (a * x.double() + s**2 * Exact.mean) / (a + s**2)
    found = net(x, sigma, **condition(26))
    assert found.dtype == dtype and (found - expected).abs().max() < error
    assert torch.equal(net.transformer.told[0], 1000 * (sigma / (1 + sigma))) and net.shape == (2, 2, 2)
    assert torch.equal(net(x, 2.5, **condition(26)), net(x, torch.full((26,), 2.5), **condition(26)))


def test_weights_in_bf16_keep_times_and_arithmetic_exact():
    low, sigma = FlowDenoiser(Exact(torch.float32)).to(torch.bfloat16), torch.tensor([0.3, 2.5, 77.7])
    x = torch.randn(3, 2, 2, 2) * sigma.view(-1, 1, 1, 1)
    out, exact = low(x, sigma, **condition(3)), FlowDenoiser(Exact(torch.float32))(x, sigma, **condition(3))
    assert out.dtype == low.transformer.told[0].dtype == torch.float32 and low.dtype == torch.bfloat16
    assert low.transformer.told[0].tolist() == (1000 * (sigma / (1 + sigma))).tolist()
    assert 0 < (out - exact).abs().max() < 0.03


def test_levels_and_weight_are_those_of_its_training():
    """A logit-normal t moved by a scheduler's shift, and weight 1 on velocities."""
    net, rng = FlowDenoiser(Exact(torch.float32), shift=3.0), torch.Generator().manual_seed(0)
    sigma, weight = net.draw_levels(rng, 100_000)
    assert sigma.log().mean().item() == pytest.approx(math.log(3), abs=0.01)
    assert sigma.log().std().item() == pytest.approx(1, abs=0.01)
    t = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).sigmoid()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=t[:9].tolist(), num_inference_steps=9)
    assert torch.allclose(scheduler.sigmas[:9], (sigma / (1 + sigma))[:9], atol=1e-6)
    few, cond = sigma[:50], condition(50)
    x0, noise = torch.randn(50, 2, 2, 2), torch.randn(50, 2, 2, 2)
    loss = sim.fake_loss(net, x0, few, noise, weight[:50], **cond)
    t = few / (1 + few)
    v = net.velocity((1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * noise, t, **cond)
    assert torch.allclose(loss, (v - (noise - x0)).square().sum((1, 2, 3)), rtol=1e-3)


def test_the_real_network_and_guidance():
    torch.manual_seed(0)
    net = FlowDenoiser(PixArtTransformer2DModel(**SMALL).eval())
    cond = {"caption": torch.randn(3, 5, 64), "mask": torch.ones(3, 5).long()}
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.5, 80.0])
    t = (sigma / (1 + sigma)).view(-1, 1, 1, 1)
    v = net.transformer((1 - t) * x, cond["caption"], timestep=1000 * t.flatten(),
                        encoder_attention_mask=cond["mask"]).sample[:, :4]  # fmt: skip
    assert torch.allclose(net(x, sigma, **cond), (1 - t) * x - t * v, atol=1e-5)
    null = {"caption": torch.randn(1, 2, 64), "mask": torch.ones(1, 2).long()}
    nobody = without(cond, null, torch.tensor([True] * 3))
    assert torch.equal(nobody["mask"][0], torch.tensor([1, 1, 0, 0, 0]))
    expected = net(x, sigma, **nobody) + 3 * (net(x, sigma, **cond) - net(x, sigma, **nobody))
    assert torch.allclose(Guided(net, null, 3.0)(x, sigma, **cond), expected, atol=1e-4)


# ----------------------------------------------------------------------------------------------
# Which networks predict what.

EULER, DPM = (
    {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    {"_class_name": "DPMSolverMultistepScheduler"},
)
SANA = DPM | {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
REFUSED = {  # words -> settings of a scheduler
    "prediction_type 'v_prediction' without use_flow_sigmas": DPM | {"prediction_type": "v_prediction"},
    "prediction_type 'sample' without use_flow_sigmas": DPM | {"prediction_type": "sample"},
    "prediction_type 'epsilon' with use_flow_sigmas": DPM | {"use_flow_sigmas": True},
    "prediction_type 'flow_prediction' without use": DPM | {"prediction_type": "flow_prediction"},
    "prediction_type ['epsilon']": DPM | {"prediction_type": ["epsilon"]},
    "scheduler 'LCMScheduler' is not known": {"_class_name": "LCMScheduler"},
    "scheduler None is not known": {"shift": 1.0},
    "scheduler ['x'] is not known": {"_class_name": ["x"]},
    "with invert_sigmas is not supported": EULER | {"invert_sigmas": True},
    "with use_dynamic_shifting is not supported": EULER | {"use_dynamic_shifting": True},
    "shift must be a positive number, got 'x'": EULER | {"shift": "x"},
    "shift must be a positive number, got nan": EULER | {"shift": math.nan},
    "shift must be a positive number, got inf": SANA | {"flow_shift": math.inf},
    "shift must be a positive number, got 0": EULER | {"shift": 0},
    "shift must be a positive number, got -3.0": EULER | {"shift": -3.0},
    "shift must be a positive number, got True": EULER | {"shift": True},
    "its timesteps must be from 1 to 100,000, got 0": EULER | {"num_train_timesteps": 0},
    "its timesteps must be from 1 to 100,000, got 1000.0": EULER | {"num_train_timesteps": 1e3},
    "its timesteps must be from 1 to 100,000, got 10000000000": DPM | {"num_train_timesteps": 10**10},
    "its timesteps must be from 1 to 100,000": DPM | {"trained_betas": [0.1] * 10**6},
}


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_matching_is_recognised(tmp_path, scheduler):
    scheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    assert read_predictions("none", tmp_path) == VELOCITY | {"shift": 3.0}
    assert predictions_of(SANA) == VELOCITY | {"shift": 3.0}
    assert predictions_of(EULER | {"num_train_timesteps": 500}) == VELOCITY | {"timesteps": 500}


def test_noise_is_what_no_settings_say(tmp_path):
    DPMSolverMultistepScheduler().save_pretrained(tmp_path / "scheduler")
    assert read_predictions(tmp_path) == read_predictions(tmp_path / "none") == read_predictions() == {}


@pytest.mark.parametrize("words", REFUSED)
def test_other_predictions_are_refused(words):
    with pytest.raises(UserError) as caught:
        predictions_of(REFUSED[words])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("flow"), "velocity")


def test_the_folder_decides_and_others_follow_it(pipeline, tmp_path):
    """A transformer alone, and files in PixArt's own naming, are told by the pipeline that they go with."""
    for source in (pipeline, pipeline / "transformer"):
        assert load_transformer(source)[1] == VELOCITY
    shutil.copytree(pipeline / "transformer", tmp_path / "alone")
    assert load_transformer(tmp_path / "alone")[1] == {}
    network, about = load_transformer(tmp_path / "alone", like=pipeline)
    assert about == VELOCITY
    save(tmp_path / "noise.safetensors", network, sigma_init=2.5)
    assert load_transformer(tmp_path / "noise.safetensors", like=pipeline)[1] == {"sigma_init": 2.5}


def changed(folder, config, name=CONFIG):
    """The pipeline of another scheduler's or transformer's settings, its weights unreadable."""
    shutil.copytree(folder, "changed")
    Path("changed", name).write_text(json.dumps(config), encoding="utf-8")
    for weights in Path("changed").rglob("*.safetensors"):
        weights.write_bytes(b"")
    return "changed"


COMMANDS = {
    "v-prediction": (CONFIG, DPM | {"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'"),
    "sample": (CONFIG, DPM | {"prediction_type": "sample"}, "prediction_type 'sample'"),
    "unknown": (CONFIG, {"_class_name": "FlowScheduler"}, "scheduler 'FlowScheduler' is not known"),
    "damaged": (CONFIG, [1], "damaged, or of another kind"),
    "transformer": ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "a 'FluxTransf"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_refuse_before_weights_are_read(here, case, pipeline, capsys):
    name, config, words = COMMANDS[case]
    teacher = changed(pipeline, config, name)
    assert distil(teacher, "run") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not Path("run").exists()
    save("s.safetensors", PixArtTransformer2DModel(**SMALL), sigma_init=2.5)
    assert sample(student="s.safetensors", pipeline=pipeline, teacher=teacher, out="a.png") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


# ----------------------------------------------------------------------------------------------
# The distillation.


def distil(teacher, out, *more, **changes):
    return small_text.run(*more, **dict(preset="flow-digits", teacher=teacher, out=out) | changes)


def sample(**given):
    return start(sample_pixart.main, sample_pixart.Settings, dict(device="cpu") | given)


def velocity(net, x, t, cond):
    """By hand."""
    given = dict(timestep=1000 * t.flatten(), encoder_attention_mask=cond["mask"])
    return net.transformer(x, cond["caption"].double(), **given).sample[:, :4]


def denoised(net, xt, s, cond):
    return xt / (1 + s) - s / (1 + s) * velocity(net, xt / (1 + s), s / (1 + s), cond)


def test_gradients_of_a_step_are_those_of_algorithm_2(pipeline):
    levels = dict(sigma_mean=0.0, sigma_std=1.0, fake_sigma_mean=0.5, fake_sigma_std=1.0)
    assert_algorithm_2(pipeline, denoised, preset="flow-digits", **levels)


def test_the_preset_draws_its_own_levels_unless_others_are_named():
    flow = ["--preset", "flow-digits"]
    settings = lambda *words: parse(TextDistillation, "", [*flow, *words], TEXT_DISTILLATIONS)
    names, cfg = ("sigma_mean", "sigma_std", "fake_sigma_mean", "fake_sigma_std"), settings()
    assert [getattr(cfg, name) for name in names] == [0, 1, 0, 1]
    cfg = settings("--sigma-distribution", "edm", "--fake-sigma-mean", "0.5")
    assert [getattr(cfg, name) for name in names] == [None, None, 0.5, 1]


def test_a_stopped_run_resumes_and_its_student_is_read_by_velocity(here, pipeline, fast, monkeypatch, capsys):
    assert distil(pipeline, "whole") == 0
    assert "the teacher predicts velocities, trained at ln sigma ~ N(0.00, 1)" in capsys.readouterr().out
    with signal_at(2):
        assert distil(pipeline, "cut") == 130
    assert distil(pipeline, "cut", "--resume") == 0
    assert same(record("cut"), record("whole"))
    student, about = load_transformer("whole/generator.safetensors")
    assert VELOCITY.items() <= about.items() and about["sigma_init"] == 2.5
    seen, given = [], dict(teacher="", device="cpu", steps=3, guidance=2.0)
    drawing = lambda samplers, encode, vae, shape, pairs, batch: seen.append((samplers, encode)) or iter(())
    monkeypatch.setattr(sample_pixart, "draw", drawing)
    monkeypatch.setattr(sample_pixart, "report", lambda seconds, batch: None)
    assert sample(student="whole/generator.safetensors", out="a", **given) == 0
    (samplers, encode_), z = seen[0], latents([3, 4], (4, 8, 8))[0]
    cond = encode_(["a handwritten one", "the digit two"])
    generator = Generator(FlowDenoiser(student), 2.5)
    assert torch.allclose(samplers["student"](z, **cond), generator(z, **cond), atol=1e-5)
    net = FlowDenoiser(load_transformer(pipeline)[0]).double()
    nobody, x = without(cond, encode_([""]), torch.tensor([True] * 2)), z.double()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    scheduler.set_timesteps(3)
    for t, s in zip(scheduler.sigmas.double(), scheduler.sigmas[1:].double()):
        plain, null = (velocity(net, x, t.expand(2), c) for c in (cond, nobody))
        x = x + (s - t) * (null + 2 * (plain - null))
    assert torch.allclose(samplers["teacher"](z, **cond).double(), x, atol=1e-4)


def test_export_is_refused(here, pipeline, capsys):
    notes = dict(sigma_init=2.5, teacher=str(pipeline), **VELOCITY)
    save("s.safetensors", PixArtTransformer2DModel(**SMALL), **notes)
    assert sample(student="s.safetensors", export="folder") == 2
    err = capsys.readouterr().err
    assert "s.safetensors: cannot be exported exactly: it predicts a velocity" in err and err.count("\n") == 1
    assert sample(student="s.safetensors", out="a.png", seeds="1", prompts="a one", teacher="", steps=2) == 0
    save("bad.safetensors", PixArtTransformer2DModel(**SMALL), **notes | {"predicts": "sample"})
    assert sample(student="bad.safetensors", out="b.png") == 2
    assert "its notes have predicts='sample'" in capsys.readouterr().err


HEUN = FlowMatchHeunDiscreteScheduler(shift=2.0)


@pytest.mark.parametrize("scheduler", [HEUN, DPMSolverMultistepScheduler.from_config(SANA)])
def test_other_schedulers_of_the_straight_path_reach_the_data(scheduler, tmp_path):
    """Of a Gaussian: its samples have its mean and spread."""
    scheduler.save_pretrained(tmp_path / "scheduler")
    net = FlowDenoiser(Exact(torch.float32))
    assert type(flow_scheduler(net, [tmp_path / "none", tmp_path])) is type(scheduler)
    assert flow_scheduler(net, []).config.shift == 1.0
    z, cond = torch.randn(4000, 2, 2, 2, generator=torch.Generator().manual_seed(0)), condition(4000)
    x = teacher_sampler(net, [tmp_path], None, condition(1), 20, 1.0)(z, **cond)
    assert x.mean().item() == pytest.approx(Exact.mean, abs=0.02)
    assert x.std().item() == pytest.approx(Exact.spread, rel=0.05)


def test_the_twin_of_the_text_digits_is_trained_at_its_levels(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "TRANSFORMER", SMALL)
    monkeypatch.setitem(digits.SAMPLER, "steps", 2)
    monkeypatch.setitem(TEACHERS, "flow-digits", dict(steps=2, batch=8, lr=1e-3, every=16, vae_steps=2))
    words = ["--preset", "flow-digits", "--device", "cpu", "--out", str(tmp_path / "t")]
    drawn, draw_levels = [], FlowDenoiser.draw_levels
    noting = lambda self, rng, n: drawn.append(n) or draw_levels(self, rng, n)
    monkeypatch.setattr(FlowDenoiser, "draw_levels", noting)
    assert command_line(train_teacher.main, TeacherTraining, "", words, TEACHERS) == 0
    _, about = load_transformer(tmp_path / "t/pipeline")
    assert about == VELOCITY and drawn == [8, 8]
    assert distil(tmp_path / "t/pipeline", tmp_path / "run", steps=1) == 0
