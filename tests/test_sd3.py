"""SD3's family: its files, its captions, its teacher's images, and a distillation, of a small one."""

import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from edm import check_teacher
from edm.images.checkpoints import save
from edm.images.sampler import latents
from edm.text import digits
from edm.text.flow import FlowDenoiser
from edm.text.joint import JointEncoder
from edm.text.pixart import decode, encode
from edm.text.pixart_files import load_transformer
from edm.text.sampler import teacher_sampler
from tests import small_text
from tests.test_flow import VELOCITY, distil, sample
from toy.files import UserError

fast = small_text.fast

SD3 = dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, out_channels=4,
           num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16,
           pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm")  # fmt: skip


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """A whole pipeline of SD3's kind, small, of random weights; and it as diffusers has it."""
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    torch.manual_seed(0)
    words = "<|startoftext|> <|endoftext|> a</w> b</w> c</w>".split()
    letters = {word: i for i, word in enumerate(words)}
    clip = lambda: CLIPTokenizer(vocab=letters, merges=[], model_max_length=77)
    text = dict(vocab_size=8, hidden_size=16, intermediate_size=32, projection_dim=8, num_hidden_layers=2,
                num_attention_heads=2, bos_token_id=0, eos_token_id=1)  # fmt: skip
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**text)) for _ in range(2)]
    t5, _ = digits.make_text_encoder()
    t5_model = T5EncoderModel(T5Config(vocab_size=len(t5), **digits.T5 | dict(d_model=32)))
    vae = AutoencoderKL(**digits.VAE | dict(scaling_factor=1.5, shift_factor=0.06))
    transformer = SD3Transformer2DModel(**SD3)
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, encoders[0],
                                    clip(), encoders[1], clip(), t5_model, t5)  # fmt: skip
    for network in (*encoders, t5_model, vae, transformer):
        network.eval().requires_grad_(False)
    pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("a\nb\na b c\n", encoding="utf-8")
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe


def test_sd3_is_read_whole(joint, tmp_path):
    folder, pipe = joint
    network, about = load_transformer(folder)
    assert about == VELOCITY | {"shift": 3.0}
    expected = pipe.transformer.state_dict()
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in network.state_dict().items())
    save(tmp_path / "s.safetensors", network, sigma_init=2.5, **about)
    again, about = load_transformer(tmp_path / "s.safetensors")
    assert about["shift"] == 3.0 and type(again) is SD3Transformer2DModel
    assert torch.equal(again.pos_embed.pos_embed, network.pos_embed.pos_embed)
    save(tmp_path / "noise.safetensors", network, sigma_init=2.5)
    with pytest.raises(UserError, match="a SD3Transformer2DModel, but no scheduler says that it predicts"):
        load_transformer(tmp_path / "noise.safetensors")


def test_the_teachers_images_are_those_of_sd3s_own_pipeline(joint):
    folder, pipe = joint
    encoder, z = JointEncoder(folder), latents([3, 4], (4, 8, 8))[0]
    cond = encoder(["a b", "c"])
    assert cond["caption"].shape == (2, 77 + 256, 32) and cond["pooled"].shape == (2, 16)
    assert encoder.null["pooled"].shape == (1, 16) and not encoder.truncated
    net = FlowDenoiser(load_transformer(folder)[0], shift=3.0)
    x = teacher_sampler(net, [folder], pipe.vae, encoder.null, 4, 3.0)(z, **cond)
    given = dict(latents=z, num_inference_steps=4, guidance_scale=3.0)
    theirs, images = (pipe(["a b", "c"], **given, output_type=kind).images for kind in ("latent", "pt"))
    assert (x - theirs).abs().max() < 1e-4 and (x - z).abs().max() > 0.1
    assert torch.allclose((decode(pipe.vae, x) / 2 + 0.5).clamp(0, 1), images, atol=1e-4)
    pictures = torch.rand(2, 3, 16, 16)
    found = pipe.vae.encode(pictures).latent_dist.mean
    assert torch.allclose(encode(pipe.vae, pictures), (found - 0.06) * 1.5)


@pytest.mark.usefixtures("here", "fast")
def test_sd3_is_distilled_and_sampled(joint, capsys):
    folder, _ = joint
    assert distil(folder, "run", steps=2, guidance=2.0, fake_guidance=1.5) == 0
    student = "run/generator.safetensors"
    assert sample(student=student, prompts="a b", seeds="1", teacher="", steps=2, out="a.png") == 0
    assert distil(folder, "other", captions="none.safetensors") == 2
    assert "holds no pooled captions" in capsys.readouterr().err
    shutil.copytree(folder, "mute", ignore=shutil.ignore_patterns("text_encoder_3"))
    assert distil("mute", "other") == 2
    assert "mute: missing text_encoder_3: there is no text_encoder_3/ in it" in capsys.readouterr().err


def test_sd3_as_a_teacher_is_checked(joint, tmp_path, capsys):
    folder, _ = joint
    out = ("--images", "8", "--seconds", "0.1", "--out", str(tmp_path / "check.png"))
    assert check_teacher.main([str(folder), "--data", "digits", *out]) in (0, 1)
    said = capsys.readouterr().out
    assert "from sigma 0.002 to 80" in said and "D is affine in the scale" in said and "raises" not in said
