"""A small PixArt that a CPU can train: handwritten digits that follow their caption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from edm.device import Single
from edm.images.data import Images, load_images, to_network
from edm.text.pixart import BETA_FIRST, BETA_LAST, encode, without
from toy.command import stop_on_signal
from toy.files import replacing

NUMBERS = "zero one two three four five six seven eight nine".split()
TEMPLATES = ("a handwritten {}", "the digit {}", "the number {}", "a {}")
PROMPTS = [template.format(number) for number in NUMBERS for template in TEMPLATES]  # by digit
PIXELS, DROPOUT = 16, 0.1  # of the pictures; share of captions left out, for guidance
TRANSFORMER = dict(num_attention_heads=4, attention_head_dim=24, num_layers=5, in_channels=4, out_channels=8,
                   cross_attention_dim=96, caption_channels=64, sample_size=8, patch_size=2)  # fmt: skip
VAE = dict(block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
           down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
           mid_block_add_attention=False, sample_size=PIXELS)  # fmt: skip
T5 = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
          dropout_rate=0.0)  # fmt: skip
SAMPLER = dict(steps=18, sigma_min=0.02, sigma_max=80.0)  # of the teacher, for `heun`: 35 evaluations


def pictures() -> Images:
    """scikit-learn's 8x8 digits as 16x16 grey RGB: an edm.images.data.Images."""
    data = load_images("digits")
    larger = F.interpolate(data.images.float(), PIXELS, mode="bilinear").round().to(torch.uint8)
    return Images(larger.expand(-1, 3, -1, -1).contiguous(), data.labels, "digits, 16x16")


def make_text_encoder() -> tuple[Any, Module]:
    """-> a tokenizer of letters and of the prompts' words, and a T5 encoder of random weights."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,", *("▁" + word for word in words)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0 - (len(piece) == 1)) for piece in dict.fromkeys(pieces)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=120)
    with Single():
        return tokenizer, T5EncoderModel(T5Config(vocab_size=len(vocabulary), **T5))


def train_vae(images: Tensor, steps: int, batch=64, lr=4e-3, kl_weight=0.01) -> Module:
    """Squared error + kl_weight KL, summed over pixels and latents -> AutoencoderKL for 16x16 images."""
    from diffusers import AutoencoderKL

    with Single():
        vae, x = AutoencoderKL(**VAE), to_network(images)
    optimiser = torch.optim.Adam(vae.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps)
    with stop_on_signal() as stop:
        for _ in tqdm(range(steps), "VAE", unit="step", mininterval=1):
            if stop:
                raise KeyboardInterrupt  # too short to be continued: it begins anew
            some = x[torch.randint(len(x), (batch,))]
            posterior = vae.encode(some).latent_dist
            error = (vae.decode(posterior.sample()).sample - some).square().sum((1, 2, 3))
            optimiser.zero_grad()
            (error + kl_weight * posterior.kl()).mean().backward()
            optimiser.step()
            schedule.step()
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode(vae.eval(), x).std().item())
    return vae


def make_frozen(folder: Path, seed: int, vae_steps: int) -> None:
    """tokenizer/, text_encoder/ and vae/, all or nothing."""
    if folder.exists():
        return
    torch.manual_seed(seed)
    parts = *make_text_encoder(), train_vae(pictures().images, vae_steps)
    with replacing(folder) as unfinished:
        for name, part in zip(("tokenizer", "text_encoder", "vae"), parts):
            part.save_pretrained(unfinished / name)


def text_examples(data: Images, vae: Module, encoder: Callable, draw_levels: Callable) -> Callable:
    """Latents at the levels of draw_levels, a denoiser's: `examples` of a TeacherTask."""
    x0, labels = encode(vae, to_network(data.images)), data.labels.to(vae.device)
    captions, null = encoder(PROMPTS), encoder([""])

    def examples(rng, n):
        index, template = (
            torch.randint(high, (n,), generator=rng, device=rng.device) for high in (len(x0), len(TEMPLATES))
        )
        sigma, weight = draw_levels(rng, n)
        prompt = labels[index] * len(TEMPLATES) + template
        left_out = torch.rand(n, generator=rng, dtype=torch.float32, device=rng.device) < DROPOUT
        cond = {name: part[prompt] for name, part in captions.items()}
        return x0[index], sigma, weight, without(cond, null, left_out)

    return examples


def make_scheduler(predicts: str) -> Any:
    """What tells others, and us, what the network predicts."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if predicts == "velocity":
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    return DPMSolverMultistepScheduler(beta_start=BETA_FIRST, beta_end=BETA_LAST, beta_schedule="linear")


def save_pipeline(folder: str | Path, frozen: Path, transformer: Module, predicts="noise") -> None:
    """All of it as diffusers.PixArtAlphaPipeline.from_pretrained opens it, and prompts.txt."""
    from diffusers import AutoencoderKL, PixArtAlphaPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    pipeline = PixArtAlphaPipeline(
        AutoTokenizer.from_pretrained(frozen / "tokenizer"),
        T5EncoderModel.from_pretrained(frozen / "text_encoder"),
        AutoencoderKL.from_pretrained(frozen / "vae", dtype=torch.float32),
        transformer,
        make_scheduler(predicts),
    )
    with replacing(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
        (unfinished / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")


def grid_prompts(rows=4) -> list[str]:
    """For pictures: a column per digit, a row per wording."""
    return [TEMPLATES[row % len(TEMPLATES)].format(number) for row in range(rows) for number in NUMBERS]
