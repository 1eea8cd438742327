"""Algorithm 2 on text-to-image: its gradients by hand, guided, accumulated; memory; whole runs."""

import dataclasses
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

import sim_core as sim
from edm import distill_pixart, prompts
from edm.algorithm2 import Distiller
from edm.config import TEXT_PRESETS, TextDistillation
from edm.images.networks import Generator
from edm.text import digits, pixart_files
from edm.text.pixart import PixArtDenoiser
from edm.training.trainee import generator_of
from tests import small_text
from tests.by_hand import flat, relative
from tests.small import (
    Watch,
    assert_each_update_moves_its_own,
    assert_refused,
    assert_rows_close,
    same,
    signal_at,
)
from tests.small_text import GUIDED, SMALL, assert_algorithm_2, gradients, record, run, task_of
from toy.files import UserError
from toy.folder import Folder

fast, pipeline = small_text.fast, small_text.pipeline  # fixtures


@pytest.mark.parametrize("choice", [dict(), dict(guidance=3.0, fake_guidance=2.0, micro_batch=4)], ids=str)
def test_each_update_moves_its_own_network(pipeline, choice):
    task = task_of(pipeline, sigma_init=1.3, **choice)
    draw = task.draw(0, 0)
    images = task.images(draw, keep_graph=task.batches.count == 1)
    z, level = draw["z"][0].double(), torch.full((len(draw["z"][0]),), 1.3).double()
    by_hand = task.generator.network.denoiser(1.3 * z, level, **draw["cond"][0])
    assert relative(images[0], by_hand) < 1e-5
    assert_each_update_moves_its_own(task, images, draw)


def denoised(net, xt, level, cond):
    """By the transformer, which predicts the noise."""
    t = net.timestep(level.flatten())
    given = dict(timestep=t, encoder_attention_mask=cond["mask"])
    noise = net.transformer(xt / (1 + level**2).sqrt(), cond["caption"].double(), **given).sample[:, :4]
    return xt - level * noise


CHOICES = [dict(), dict(guidance=3.0), dict(fake_guidance=2.0)]
CHOICES += [dict(fake_weighting=name) for name in ("edm", "noise")]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_gradients_of_a_step_are_those_of_algorithm_2(pipeline, choice):
    assert_algorithm_2(pipeline, denoised, **choice)


@pytest.mark.parametrize("share", [True, False])
def test_accumulation_reproduces_the_whole_batch(pipeline, share):
    whole = gradients(pipeline, share=share, **GUIDED)
    for name, g in gradients(pipeline, share=share, micro_batch=2, **GUIDED).items():
        assert relative(g, whole[name]) < 1e-6, name  # captions are float32, padded otherwise


def test_checkpointing_changes_no_gradient(pipeline):
    whole = gradients(pipeline)
    for name, g in gradients(pipeline, checkpointing=True).items():
        assert relative(g, whole[name]) < 1e-9, name


def test_lambda_edm_and_the_log_know_that_latents_have_a_standard_deviation_of_1(pipeline):
    task, sigma = task_of(pipeline), torch.tensor([0.3, 1.0, 40.0])
    assert task.weight("edm", sigma).tolist() == pytest.approx([(s**2 + 1) / s**2 for s in sigma.tolist()])
    assert list(task.gap_by_sigma()) == ["gap_0_0.2", "gap_0.2_1", "gap_1_4", "gap_4_inf"]


def test_points_keep_the_sigma_that_was_drawn(pipeline):
    """B.3 rounds sigma once it has been passed into the network."""
    levels = dict(sigma_distribution="pixart", fake_sigma_distribution="pixart")
    task, seen = task_of(pipeline, **levels), []
    x0 = task.images(task.draw(7, 0), keep_graph=False)[0]
    task.fake.network.register_forward_pre_hook(lambda network, given: seen.append(given))
    task.step(7)
    rng = generator_of(task.device, 0, 7, 0)  # of the seed, the step, the update
    normal = lambda: torch.randn(8, 4, 8, 8, generator=rng)
    drawn = lambda: (-2 + 2 * torch.randn(8, generator=rng)).exp().clamp(0.01, 156.6155)
    _, fake_sigma, fake_noise, sigma = normal(), drawn(), normal(), drawn()
    (xt, given), (_, later) = seen
    assert torch.equal(given, fake_sigma) and torch.equal(later, sigma)
    assert torch.allclose(xt, x0 + fake_sigma.view(-1, 1, 1, 1) * fake_noise)


def test_captions_are_those_of_the_prompts(pipeline):
    task, texts = task_of(pipeline, batch=64), digits.PROMPTS
    picked = task.pick(torch.Generator().manual_seed(0), 1000)
    assert picked["prompt"].unique().tolist() == list(range(len(texts)))
    assert picked["hidden"].float().mean().item() == pytest.approx(0.1, abs=0.03)
    encoder = prompts.TextEncoder(pipeline)
    one = task.captions(torch.tensor([7, 33]))
    expected = encoder([texts[7], texts[33]])
    assert all(torch.equal(one[k], expected[k]) for k in expected)


def test_b3():
    """4 GPUs that accumulate 8 times make a batch of 1024; weight 1 is PixArt's own, on noise."""
    paper = dict(batch=1024, micro_batch=1024 / 4 / 8, steps=16_000, lr=5e-6, fake_lr=5e-6, beta1=0.0)
    paper |= dict(beta2=0.999, sigma_init=2.5, precision="bf16", checkpointing=True, weighting="one")
    paper |= dict(fake_weighting="noise", sigma_distribution="pixart", fake_sigma_distribution="pixart")
    cfg = TextDistillation(preset="pixart-512", **TEXT_PRESETS["pixart-512"]["distill"])
    assert {k: getattr(cfg, k) for k in paper} == paper and cfg.lr_end == 1 and cfg.fake_updates == 1
    drawn = sim.SIGMA_DISTRIBUTIONS["pixart"].keywords
    assert drawn == dict(mean=-2.0, std=2.0, sigma_min=0.01, sigma_max=156.6155)


def test_float32_weights_move_where_bf16_weights_would_not(pipeline):
    task = task_of(pipeline, torch.float32, precision="bf16", lr=5e-6, fake_lr=5e-6, warmup=0)
    before = {name: flat(net) for name, net in Watch(task).networks.items()}
    for n in range(3):
        task.step(n)
    for name in ("fake", "generator"):
        now = flat(getattr(task, name).network)
        assert now.dtype == torch.float32 and 0 < (now - before[name]).abs().max() < 1e-4
        large = before[name].abs() > 0.02  # there a step of 5e-6 is far below bf16's spacing
        assert (now != before[name])[large].float().mean() > 0.9
        assert (now.bfloat16() != before[name].bfloat16())[large].float().mean() < 0.05
    teacher = next(task.teacher.transformer.parameters())
    assert teacher.dtype == torch.bfloat16 and torch.equal(flat(task.teacher), before["teacher"])


# ----------------------------------------------------------------------------------------------
# Memory.


def test_memory_plan_of_the_paper(monkeypatch):
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
            cross_attention_dim=1152, caption_channels=4096, sample_size=64, patch_size=2)  # fmt: skip
    assert transformer.num_parameters() == 610_856_096
    cfg = TextDistillation(preset="pixart-512", **TEXT_PRESETS["pixart-512"]["distill"])
    frozen = 2 * 4_762_310_656 + 4 * 83_653_863
    plan = distill_pixart.memory_plan(cfg, transformer, frozen, 4)
    fixed = [v for k, v in plan.items() if "activations" not in k]
    assert sum(fixed) / 1e9 == pytest.approx(19.5 + 2.4 + 1.2 + 9.5 + 0.3, abs=0.2)  # with T5
    planned = lambda **changes: [
        *distill_pixart.memory_plan(dataclasses.replace(cfg, **changes), transformer, frozen, 4).values()
    ]
    assert sum(planned()) / 1e9 == pytest.approx(47.6, abs=0.1)  # with --captions 38: more, or all, of 40 GB
    assert planned(sharding="fsdp")[0] == planned()[0] // 4
    assert planned(checkpointing=False)[-1] > 5 * planned()[-1] > 0
    assert planned(micro_batch=16)[-1] == planned()[-1] / 2 and planned(guidance=1.0)[-1] < planned()[-1]
    lines = []
    monkeypatch.setattr("edm.device.psutil.virtual_memory", lambda: SimpleNamespace(total=60e9))
    distill_pixart.tell_memory(dict(a=int(30e9), b=int(20e9)), torch.device("cpu"), lines.append)
    assert lines[-1].strip() == "50.00 GB  on each device: too much for 40 GB, fits 80 GB"
    with pytest.raises(
        UserError, match="needs about 70 GB on each device, which has 60 GB: try a lower --micro"
    ):
        distill_pixart.tell_memory(dict(a=int(70e9)), torch.device("cpu"), lines.append)


# ----------------------------------------------------------------------------------------------
# Whole runs, in this process.


@pytest.fixture
def here(pipeline, monkeypatch):
    """A folder with the pipeline and files that are wrong in some way."""
    folder = pipeline.parent
    monkeypatch.chdir(folder)
    if not (folder / "mute").exists():
        for name, missing in (("mute", "text_encoder"), ("blind", "vae"), ("headless", "transformer")):
            shutil.copytree(pipeline, folder / name, ignore=shutil.ignore_patterns(missing))
        shutil.copytree(pipeline, folder / "narrow")
        narrow = PixArtTransformer2DModel(**SMALL | dict(caption_channels=32))
        narrow.save_pretrained(folder / "narrow/transformer")
        weights = PixArtTransformer2DModel(**SMALL).state_dict()
        weights.pop("proj_out.bias")
        shutil.copytree(pipeline, folder / "lacking")
        save_file(weights, folder / "lacking/transformer/diffusion_pytorch_model.safetensors")
        (folder / "empty.txt").write_text("\n \n")
        (folder / "binary.txt").write_bytes(bytes(range(256)))
        (folder / "few.txt").write_text("a handwritten one\na handwritten two\n")
    return folder


def test_a_run_leaves_what_it_promises(here, fast, tmp_path):
    assert run(out=tmp_path / "run") == 0
    names = "checkpoints config.json curves.png generator.safetensors log.csv metrics.json"
    pictures = {f"{kind}-{step:07d}.png" for kind in ("panel", "samples") for step in (0, 2, 4)}
    found = {p.name for p in (tmp_path / "run").iterdir()} - {".lock", "tensorboard"}
    assert found == pictures | set(names.split())
    student, about = pixart_files.load_transformer(tmp_path / "run/generator.safetensors")
    assert about["sigma_init"] == 2.5 and about["teacher"] == str(here / "pipeline")
    state = Folder(tmp_path / "run", {}).load()
    average = Generator(PixArtDenoiser(student)).state_dict()
    assert all(torch.equal(average[k], v) for k, v in state["ema"].items())
    rows, _ = record(tmp_path / "run")
    assert all(math.isfinite(float(v)) for row in rows for k, v in row.items() if "gap" not in k)


def test_captions_hidden_from_the_online_network_are_told(here, fast, tmp_path, capsys):
    assert run(out=tmp_path / "a", steps=1) == run(out=tmp_path / "b", steps=1, fake_guidance=2.0) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    words = "the online network learns 10% of its samples without their caption; B.3 does not"
    assert told == [f"warning: --fake-guidance 2: {words}"]


def test_captions_made_beforehand_give_the_same_run(here, fast, tmp_path, monkeypatch):
    words = ["encode", "pipeline/prompts.txt", str(tmp_path / "c.safetensors"), "--text-encoder", "pipeline"]
    prompts.main([*words, "--dtype", "fp32"])
    assert run(out=tmp_path / "a") == 0
    assert run(out=tmp_path / "b", captions=tmp_path / "c.safetensors") == 0
    (rows, mine), (others, its) = record(tmp_path / "a"), record(tmp_path / "b")
    assert_rows_close(rows, others, rel=1e-3)
    assert relative(mine[0], its[0]) < 1e-3


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_it_resumes_to_the_same_bits(number, here, fast, capsys, tmp_path):
    assert run(out=tmp_path / "whole", steps=6) == 0
    with signal_at(2, number):
        assert run(out=tmp_path / "cut", steps=6) == 130
    assert "stopped by a signal and saved; --resume" in capsys.readouterr().out
    assert run("--resume", out=tmp_path / "cut", steps=6) == 0
    assert "going on from step 3" in capsys.readouterr().out
    assert same(record(tmp_path / "cut"), record(tmp_path / "whole"))


def test_prompts_that_are_too_long_are_counted(here, fast, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("a " * 200 + "\n")
    assert run(out=tmp_path / "run", prompts=tmp_path / "long.txt", steps=1) == 0
    assert "of the prompts drawn were cut to 120 tokens" in capsys.readouterr().out


def test_resuming_with_another_sigma_init_is_refused(here, fast, capsys, tmp_path):
    assert run(out=tmp_path / "run", steps=1) == 0
    before = record(tmp_path / "run")
    assert run("--resume", out=tmp_path / "run", steps=1, sigma_init=3.0) == 2
    assert "holds a run of other settings (sigma_init 2.5, not 3.0)" in capsys.readouterr().err
    assert same(record(tmp_path / "run"), before)


WRONG = {  # words on the command line -> in the message
    "--teacher none": "none: no such file or folder",
    "--teacher mute": "mute: missing text encoder",
    "--teacher blind": "blind: its vae cannot be loaded",
    "--teacher headless": "headless: ",
    "--teacher narrow": "captions of width 64, but the denoiser takes 32",
    "--teacher lacking": "lacking/transformer: missing tensor proj_out.bias",
    "--transformer pipeline/prompts.txt": "pipeline/prompts.txt: ",
    "--prompts none.txt": "none.txt: No such file",
    "--prompts empty.txt": "empty.txt: there are no prompts in it",
    "--prompts binary.txt": "binary.txt: line 1: ",
    "--captions none.safetensors": "none.safetensors: No such file",
    "--teacher= --prompts none.txt": "none.txt: No such file",  # before a teacher is trained
    "--teacher= --captions none.safetensors": "none.safetensors: No such file",
    "--teacher= --transformer pipeline/prompts.txt": "pipeline/prompts.txt: ",
    "--samples 4": "--samples must be at least 5, got 4",
    "--preset pixart-512 --teacher=": "preset pixart-512 needs --teacher",
    "--preset imagenet": "invalid choice: 'imagenet'",
    "--sharding fsdp": "--sharding fsdp is for several processes",
    "--guidance=-1": "--guidance must be positive, got -1.0",
    "--micro-batch 3": "--micro-batch 3 does not divide 8",
    "--sigma-init 0": "--sigma-init must be positive, got 0.0",
    "--distance l2 --c 1": "distance 'l2' does not take c",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_inputs_are_refused_in_one_line_and_leave_no_trace(words, here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # of which only runs tell
    assert WRONG[words] in assert_refused(run, words, here, capsys)[1]


def test_no_memory_is_told_before_anything_is_trained(here, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("edm.device.psutil.virtual_memory", lambda: SimpleNamespace(total=1e6))
    assert run(out=tmp_path / "run") == 2
    out, err = capsys.readouterr()
    assert "on each device, which has 0.001 GB: try a lower --micro-batch" in err and err.count("\n") == 1
    assert "40 prompts; memory:" in out and not (tmp_path / "run").exists()


def test_running_out_of_memory_is_one_line_and_keeps_checkpoints(here, fast, capsys, monkeypatch, tmp_path):
    step = Distiller.step

    def exhausted(self, n):
        if n == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, n)

    monkeypatch.setattr(Distiller, "step", exhausted)
    assert run(out=tmp_path / "run") == 2
    assert "error: out of memory: lower --micro-batch" in capsys.readouterr().err.splitlines()[-1]
    assert Folder(tmp_path / "run", {}).load()["step"] == 2
    assert run(out=tmp_path / "one", micro_batch=1) == 2
    assert "error: out of memory: even for one image at a time" in capsys.readouterr().err.splitlines()[-1]
