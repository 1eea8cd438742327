"""A small PixArt that a CPU can train: handwritten digits that follow their caption.

    python edm/pixart_digits.py                     # some minutes; distill_pixart.py does it by itself

Leaves OUT/pipeline, a diffusers pipeline like the big one: tokenizer, T5 encoder (of random weights:
frozen random features tell words apart), VAE and transformer (both trained on scikit-learn's digits,
16x16 pixels, with captions such as "a handwritten seven"), scheduler; and prompts.txt.  Beside it the
log, pictures and checkpoints of the transformer's training, to --resume from.
"""

import dataclasses
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch
import torch.nn.functional as F
from tqdm import tqdm

from edm import plots
from edm.config import TEXT_TEACHERS, TextTeacherTraining, check, command_line
from edm.data import Images, load_images, to_network, to_uint8
from edm.device import Single
from edm.metrics import Reference, classifier_features, data_floor, evaluate_samples, features_of
from edm.pixart import BETA_FIRST, BETA_LAST, PixArtDenoiser, decode, encode, without
from edm.pixart_files import load_vae
from edm.prompts import TextEncoder, quiet
from edm.runs import Run
from edm.sampler import heun, latents
from edm.train_teacher import TeacherTask, learn
from edm.trainer import make_accelerator

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


def pictures():
    """scikit-learn's 8x8 digits as 16x16 grey RGB: an edm.data.Images."""
    data = load_images("digits")
    larger = F.interpolate(data.images.float(), PIXELS, mode="bilinear").round().to(torch.uint8)
    return Images(larger.expand(-1, 3, -1, -1).contiguous(), data.labels, "digits, 16x16")


# ----------------------------------------------------------------------------------------------
# The frozen parts.


def make_text_encoder(folder):
    """A tokenizer of letters and of the prompts' words, and a T5 encoder of random weights."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,", *("▁" + word for word in words)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0 - (len(piece) == 1)) for piece in dict.fromkeys(pieces)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=120).save_pretrained(folder / "tokenizer")
    with Single():
        encoder = T5EncoderModel(T5Config(vocab_size=len(vocabulary), **T5))
    encoder.save_pretrained(folder / "text_encoder")


def train_vae(images, steps, batch=64, lr=4e-3, kl_weight=0.01):
    """Squared error + kl_weight KL, summed over pixels and latents -> AutoencoderKL for 16x16 images."""
    from diffusers import AutoencoderKL

    with Single():
        vae, x = AutoencoderKL(**VAE), to_network(images)
    optimiser = torch.optim.Adam(vae.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps)
    for _ in tqdm(range(steps), "VAE", unit="step", mininterval=1):
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


def make_frozen(folder, cfg):
    """tokenizer/, text_encoder/ and vae/, all or nothing."""
    if folder.exists():
        return
    torch.manual_seed(cfg.seed)
    unfinished = folder.with_name("tmp-" + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    make_text_encoder(unfinished)
    train_vae(pictures().images, cfg.vae_steps).save_pretrained(unfinished / "vae")
    unfinished.rename(folder)


# ----------------------------------------------------------------------------------------------
# The transformer.


def text_examples(data, vae, encoder, levels):
    """Latents at levels uniform over the 1,000, weighted for the noise: `examples` of a TeacherTask."""
    x0, labels = encode(vae, to_network(data.images)), data.labels.to(vae.device)
    captions, null = encoder(PROMPTS), encoder([""])

    def examples(rng, n):
        index, template, step = (
            torch.randint(high, (n,), generator=rng, device=rng.device)
            for high in (len(x0), len(TEMPLATES), len(levels))
        )
        prompt = labels[index] * len(TEMPLATES) + template
        left_out = torch.rand(n, generator=rng, dtype=torch.float32, device=rng.device) < DROPOUT
        caption, mask = without(captions["caption"][prompt], captions["mask"][prompt], null, left_out)
        sigma = levels[step].float()
        return x0[index], sigma, sigma**-2, {"caption": caption, "mask": mask}

    return examples


def save_pipeline(folder, frozen, transformer):
    """All of it as diffusers.PixArtAlphaPipeline.from_pretrained opens it, and prompts.txt."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    unfinished = folder.with_name("tmp-" + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    PixArtAlphaPipeline(
        AutoTokenizer.from_pretrained(frozen / "tokenizer"),
        T5EncoderModel.from_pretrained(frozen / "text_encoder"),
        AutoencoderKL.from_pretrained(frozen / "vae", dtype=torch.float32),
        transformer,
        DPMSolverMultistepScheduler(beta_start=BETA_FIRST, beta_end=BETA_LAST, beta_schedule="linear"),
    ).save_pretrained(unfinished)
    (unfinished / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    unfinished.rename(folder)


def grid_prompts(rows=4):
    """For pictures: a column per digit, a row per wording."""
    return [TEMPLATES[row % len(TEMPLATES)].format(number) for row in range(rows) for number in NUMBERS]


def main(cfg):
    """Train; cfg.out/pipeline is there at the end.  Returns the exit code."""
    from diffusers import PixArtTransformer2DModel

    check(cfg)
    quiet()
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/edm/{cfg.preset}-teacher-{cfg.seed}")
    accelerator = make_accelerator(cfg)
    run = Run(cfg, accelerator.is_main_process)
    frozen = run.path / "frozen"
    if accelerator.is_main_process:
        make_frozen(frozen, cfg)
    accelerator.wait_for_everyone()
    vae, encoder = load_vae(frozen).to(accelerator.device), TextEncoder(frozen, accelerator.device)
    torch.manual_seed(cfg.seed)
    with Single():
        network = PixArtDenoiser(PixArtTransformer2DModel(**TRANSFORMER)).to(accelerator.device)
    task = TeacherTask(cfg, accelerator, network, text_examples(pictures(), vae, encoder, network.levels))
    z, _ = latents(range(40), network.shape)
    caption = encoder(grid_prompts())

    def picture(step):
        samples = heun(task.ema.network, z.to(accelerator.device), **SAMPLER, **caption)
        if run.first:
            plots.save_grid(run.path / f"samples-{step:07d}.png", decode(vae, samples))

    def write(path):
        if not path.exists():
            save_pipeline(path, frozen, task.ema.network.transformer)

    return learn(cfg, accelerator, task, run, picture, "pipeline", write)


# ----------------------------------------------------------------------------------------------
# Do samples follow their captions?


def compare(generator, teacher, shape, vae, encoder, n, cache):
    """n samples of each, seeds 0, 1, ..., under the prompts in turn, read by a classifier of the data.

    generator, teacher: the one-step network and the denoiser.  cache: file of the classifier.
    -> {"student_follows": the share in which the classifier reads the digit of the prompt, "student_fd": the
    Frechet distance to the data, ...}
    """
    data = pictures()
    net = classifier_features(data, cache)
    features, _ = features_of(net, data.images.split(500))
    reference, numbers = Reference(features), {"floor_fd": data_floor(features)["fd"], "samples": n}
    how = {"student": generator, "teacher": lambda z, **caption: heun(teacher, z, **SAMPLER, **caption)}
    for who, sample in how.items():
        start, images = time.perf_counter(), []
        for seeds in torch.arange(n).split(100):
            z, _ = latents(seeds.tolist(), shape)
            caption = encoder([PROMPTS[seed % len(PROMPTS)] for seed in seeds.tolist()])
            with torch.no_grad():
                images.append(decode(vae, sample(z.to(vae.device), **caption)).cpu())
        seconds = time.perf_counter() - start
        images = [to_uint8(some) for some in images]
        found = evaluate_samples(net, reference, images)
        read = torch.cat([net.probabilities(some).argmax(1) for some in images])
        named = torch.arange(n) % len(PROMPTS) // len(TEMPLATES)
        numbers |= {f"{who}_{name}": found[name] for name in ("fd", "precision", "recall", "class_histogram")}
        numbers[f"{who}_follows"] = (read == named).float().mean().item()
        numbers[f"{who}_images_per_second"] = n / seconds
    return numbers


if __name__ == "__main__":
    sys.exit(command_line(main, TextTeacherTraining, __doc__, presets=TEXT_TEACHERS))
