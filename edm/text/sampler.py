"""Images from prompts: the one-step student, and its teacher by diffusers' own pipeline.

sample(z, caption, mask) -> latents like z.
"""

import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from edm.images.data import to_uint8
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.text.pixart import Guided, PixArtDenoiser, decode, without
from edm.text.prompts import read_prompts
from toy.files import UserError, naming

FIGURE3 = (  # B.6
    "A small cactus with a happy face in the Sahara desert.",
    "An image of a jade green and gold coloured Fabergé egg, 16k resolution, highly detailed, product "
    "photography, trending on artstation, sharp focus, studio photo, intricate details, fairly dark "
    "background, perfect lighting, perfect composition, sharp features, Miki Asai Macro photography, "
    "close-up, hyper detailed, trending on artstation, sharp focus, studio photo, intricate details, highly "
    "detailed, by greg rutkowski.",
    "Baby playing with toys in the snow.",
)


def student_sampler(denoiser, sigma_init):
    """The generator, g(z) = D(sigma_init z; sigma_init)."""
    generator = Generator(denoiser, sigma_init)
    return lambda z, caption, mask: generator(z, caption=caption, mask=mask)


def teacher_sampler(transformer, folder, vae, null, steps, guidance):
    """diffusers' own pipeline with the solver of that folder, from the same z as the student.

    One step, which that pipeline knows of students alone, is D(sigma z; sigma) at the highest sigma.
    """
    if steps == 1:
        denoiser = PixArtDenoiser(transformer).to(vae.device)
        return student_sampler(Guided(denoiser, null, guidance), denoiser.levels[-1].item())
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    with naming(f"{folder}/scheduler"):
        scheduler = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = PixArtAlphaPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample(z, caption, mask):
        everyone = torch.ones(len(z), dtype=torch.bool, device=z.device)
        null_caption, null_mask = without(caption, mask, null, everyone)
        return pipeline(
            latents=z.to(caption.dtype), prompt_embeds=caption, prompt_attention_mask=mask,
            negative_prompt=None, negative_prompt_embeds=null_caption,
            negative_prompt_attention_mask=null_mask,
            num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
            use_resolution_binning=False,
        ).images  # fmt: skip

    return sample


def make_encode(encoder):
    """-> encode(prompts) -> caption (B, L, width), mask (B, L), of one L, each prompt encoded alone."""

    @lru_cache(64)
    def single(prompt):
        found = encoder([prompt])
        missing = encoder.max_tokens - found["mask"].shape[1]
        return F.pad(found["caption"], (0, 0, 0, missing)), F.pad(found["mask"], (0, missing))

    return lambda prompts: map(torch.cat, zip(*map(single, prompts)))


@torch.no_grad()
def draw(samplers, encode, vae, shape, pairs, batch):
    """Yield (name of the sampler, pairs, images (B, C, H, W) uint8, seconds) for each batch of pairs.

    samplers: {name: sample}.  pairs: [((number, prompt), seed)].  seconds: of the sampler's call alone.
    Every call has `batch` images, the last filled up with copies: as in edm/sample.py, an image so depends
    on no company.
    """
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        full = some + some[-1:] * (batch - len(some))
        caption, mask = encode([prompt for (_, prompt), _ in full])
        z = latents([seed for _, seed in full], shape)[0].to(vae.device)
        for name, sample in samplers.items():
            begin = time.perf_counter()
            x = sample(z, caption, mask).float().cpu()  # to the CPU, so that a GPU has finished
            seconds = time.perf_counter() - begin
            try:
                images = to_uint8(decode(vae, x[: len(some)], batch=1).cpu())
            except ValueError as error:
                raise UserError(f"{name}, seed {some[0][1]} and on: {error}") from None
            yield name, some, images, seconds


def find_prompts(text):
    """--prompts -> [(number, prompt), ...]."""
    if Path(text).suffix in (".txt", ".jsonl", ".csv"):
        return list(enumerate(read_prompts(text)))
    if not text.strip():
        raise UserError("--prompts is empty")
    return list(enumerate(FIGURE3 if text == "figure3" else [text.strip()]))
