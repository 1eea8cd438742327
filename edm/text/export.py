"""A one-step student as a folder for diffusers' PixArtAlphaPipeline."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from edm.images.foreign import read_json
from edm.text.pixart import PixArtDenoiser, sigma_of_t
from edm.text.pixart_files import parts_of
from toy.files import UserError, check_new, naming, replacing

CARD = """A one-step text-to-image generator, distilled by score implicit matching (arXiv:2410.16794).

    from diffusers import PixArtAlphaPipeline
    pipe = PixArtAlphaPipeline.from_pretrained("{name}")
    image = pipe("a prompt", num_inference_steps=1, guidance_scale=1.0, clean_caption=False).images[0]

The scheduler is made for one step, from sigma = {sigma_init} at t = {t} to 0; without guidance.  diffusers
lower-cases prompts.
"""


def write_pipeline(transformer: Module, sigma_init: float, folder: Path, out: str | Path) -> None:
    """Write a folder for diffusers' PixArtAlphaPipeline, whose single step is the generator's.

    folder: of `find_pipeline`; its other parts are linked or, across disks, copied.  out: must not exist.
    """
    out = Path(out)
    check_new(out)
    classes = {"transformer": "PixArtTransformer2DModel", "scheduler": "EulerDiscreteScheduler"}
    known = {"_class_name": "PixArtAlphaPipeline"} | {k: ["diffusers", v] for k, v in classes.items()}
    with naming(folder / "model_index.json"):
        index = read_json(folder / "model_index.json") | known
    scheduler, t = one_step_scheduler(transformer, sigma_init)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as new:
        for part in parts_of(transformer)[0]:
            shutil.copytree(folder / part, new / part, copy_function=link)
        transformer.save_pretrained(new / "transformer")
        scheduler.save_pretrained(new / "scheduler")
        (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        card = CARD.format(name=out.name, sigma_init=sigma_init, t=t)
        (new / "README.md").write_text(card, "utf-8", "replace")


def check_exact(path: str | Path, about: dict[str, Any]) -> None:
    """UserError for a student whose one step no pipeline of diffusers can make."""
    if about.get("predicts", "noise") != "noise":
        words = "it predicts a velocity, and diffusers' pipelines start at t = 1, not at its sigma_init"
        raise UserError(f"{path}: cannot be exported exactly: {words}")


def link(source: str | Path, target: str | Path) -> None:
    """A hard link to a file, or where the disk cannot, a copy."""
    try:
        os.link(os.path.realpath(source), target)  # the hub's cache is of symbolic links
    except OSError:
        shutil.copyfile(source, target)


def one_step_scheduler(transformer: Module, sigma_init: float) -> tuple[Any, int]:
    """-> (EulerDiscreteScheduler whose one step is the generator's, t).

    Euler's step from (x, sigma) to 0 is x - sigma F(x / sqrt(sigma^2 + 1); t): the denoiser.  Trailing
    spacing puts it at the last step, so the noise levels end at t, and the last is moved to sigma_init.
    """
    from diffusers import EulerDiscreteScheduler

    t = int(PixArtDenoiser(transformer).timestep(torch.tensor([sigma_init], dtype=torch.float32)))
    kept = 1 / (1 + sigma_of_t()[:t] ** 2)  # of the signal's variance, before t
    beta = (1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])).float()
    before = float((1 - beta).cumprod(0)[-1]) if t else 1.0  # as diffusers rounds it
    betas = [*beta.tolist(), 1 - 1 / ((1 + sigma_init**2) * before)]
    return EulerDiscreteScheduler(t + 1, trained_betas=betas, timestep_spacing="trailing"), t
