"""Images from prompts: the one-step student, and its teacher by the solver of its own scheduler.

sample(z, **cond) -> latents like z.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from edm.images.data import to_uint8
from edm.images.foreign import read_json
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.text.flow import CONFIG, FlowDenoiser, read_predictions
from edm.text.pixart import Guided, LatentDenoiser, decode, without
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


def teacher_sampler(
    denoiser: LatentDenoiser, folders: list, vae: Module | None, null: dict, steps: int, guidance: float
) -> Callable:
    """The solver of the first of the folders with one for such a teacher, from the same z as the student."""
    if isinstance(denoiser, FlowDenoiser):
        velocity = denoiser.velocity if guidance == 1 else Guided(denoiser.velocity, null, guidance)
        return flow_sampler(velocity, flow_scheduler(denoiser, folders), steps)
    if steps == 1:  # which diffusers' pipeline does of students alone: D at the highest sigma
        return Generator(Guided(denoiser, null, guidance), denoiser.levels[-1].item())
    return pixart_sampler(denoiser.transformer, folders[-1], vae, null, steps, guidance)


def pixart_sampler(
    transformer: Module, folder: str | Path, vae: Module, null: dict, steps: int, guidance: float
) -> Callable:
    """diffusers' own pipeline."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    if read_predictions(folder):
        raise UserError(f"{folder}: its scheduler is for velocities, and the teacher predicts noise")
    with naming(f"{folder}/scheduler"):
        scheduler = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = PixArtAlphaPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample(z, **cond):
        nobody = without(cond, null, torch.ones(len(z), dtype=torch.bool, device=z.device))
        return pipeline(
            latents=z.to(cond["caption"].dtype),
            prompt_embeds=cond["caption"], prompt_attention_mask=cond["mask"],
            negative_prompt=None, negative_prompt_embeds=nobody["caption"],
            negative_prompt_attention_mask=nobody["mask"],
            num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
            use_resolution_binning=False,
        ).images  # fmt: skip

    return sample


def flow_scheduler(denoiser: FlowDenoiser, folders: Iterable[str | Path]) -> Any:
    """The scheduler of the first folder with one for velocities, or else Euler's."""
    import diffusers

    for folder in folders:
        if read_predictions(folder):
            with naming(Path(folder, CONFIG)):
                name = read_json(Path(folder, CONFIG))["_class_name"]
                return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return diffusers.FlowMatchEulerDiscreteScheduler(denoiser.timesteps, denoiser.shift)


def flow_sampler(velocity: Callable, scheduler: Any, steps: int) -> Callable:
    """A scheduler's solver from t = 1, where x_t is z, to 0.  The network is told its t, not rounded."""

    def sample(z, **cond):
        scheduler.set_timesteps(steps, device=z.device)
        scheduler.set_begin_index(0)
        x = z
        for told, t in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
            x = scheduler.step(velocity(x, t, **cond), told, x, return_dict=False)[0]
        return x

    return sample


def make_encode(encoder: Callable) -> Callable:
    """-> encode(prompts) -> conditions (B, ...), captions of one length, each prompt encoded alone."""

    @lru_cache(64)
    def single(prompt):
        found = encoder([prompt])
        missing = max(0, encoder.max_tokens - found["caption"].shape[1])
        return {name: F.pad(part, (0, 0) * (part.ndim - 2) + (0, missing)) for name, part in found.items()}

    def encode(prompts):
        found = [single(prompt) for prompt in prompts]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    return encode


@torch.no_grad()
def draw(
    samplers: dict[str, Callable], encode: Callable, vae: Any, shape: tuple[int, ...], pairs: list, batch: int
) -> Iterator[tuple[str, list, Tensor, float]]:
    """Yield (name of the sampler, pairs, images (B, C, H, W) uint8, seconds) for each batch of pairs.

    samplers: {name: sample}.  pairs: [((number, prompt), seed)].  seconds: of the sampler's call alone.
    Every call has `batch` images, the last filled up with copies: as in edm/sample.py, an image so depends
    on no company.
    """
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        full = some + some[-1:] * (batch - len(some))
        cond = encode([prompt for (_, prompt), _ in full])
        z = latents([seed for _, seed in full], shape)[0].to(vae.device)
        for name, sample in samplers.items():
            begin = time.perf_counter()
            x = sample(z, **cond).float().cpu()  # to the CPU, so that a GPU has finished
            seconds = time.perf_counter() - begin
            try:
                images = to_uint8(decode(vae, x[: len(some)], batch=1).cpu())
            except ValueError as error:
                raise UserError(f"{name}, seed {some[0][1]} and on: {error}") from None
            yield name, some, images, seconds


def find_prompts(text: str) -> list[tuple[int, str]]:
    """--prompts -> [(number, prompt), ...]."""
    if Path(text).suffix in (".txt", ".jsonl", ".csv"):
        return list(enumerate(read_prompts(text)))
    try:
        text = text.strip().encode("utf-8", "surrogateescape").decode()  # under a C locale, too
    except UnicodeError:
        text = ""
    if not text:
        raise UserError("--prompts is empty, or neither UTF-8 nor in the terminal's encoding")
    return list(enumerate(FIGURE3 if text == "figure3" else [text]))
