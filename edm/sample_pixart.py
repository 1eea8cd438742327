"""Draw images from prompts with a one-step text-to-image student, and with its teacher beside it.

    python edm/sample_pixart.py --student generator.safetensors --prompts "a red fox" --out fox.png
    python edm/sample_pixart.py --student generator.safetensors --prompts figure3 --teacher --out both.png
    python edm/sample_pixart.py --student generator.safetensors --prompts prompts.txt --seeds 0 --out samples
    python edm/sample_pixart.py --student generator.safetensors --export one-step-pixart
    python edm/sample_pixart.py --student SIM-DiT.pth --sigma-init 2.5 \\
        --pipeline PixArt-alpha/PixArt-XL-2-512x512 --out figure3.png         # a generator of others

--out NAME.png is one picture with a row for each prompt; any other name is a folder of single PNGs,
0003-000005.png for seed 5 of the fourth prompt, and prompts.jsonl.  --export writes a folder that diffusers'
PixArtAlphaPipeline opens, of students that predict noise.  An image depends on its prompt and seed, not on
the others of the run; on --batch only as rounding does.
"""

import itertools
import json
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from edm.config import DEVICE, command_line
from edm.device import find_device, processes
from edm.images.checkpoints import noted_teacher
from edm.images.networks import Generator
from edm.images.sampler import parse_seeds
from edm.sample import kind_of
from edm.text.export import check_exact, write_pipeline
from edm.text.flow import denoiser_of
from edm.text.joint import text_encoder
from edm.text.pixart_files import caption_kind, find_pipeline, load_transformer, load_vae, look, sigma_init_of
from edm.text.pretrained import quiet
from edm.text.sampler import draw, find_prompts, make_encode, teacher_sampler
from edm.training import plots
from toy.command import at_least, check_ranges, option
from toy.files import UserError, check_apart, check_new, naming, replacing


@dataclass(frozen=True)
class Settings:
    student: str = option(None, "generator.safetensors of a distillation, or a generator of others",
                          required=True, metavar="FILE")  # fmt: skip
    prompts: str = option(
        "figure3", "one prompt, or a file of them (.txt, .jsonl, .csv), or figure3: the paper's"
    )
    seeds: str = option("0-3", "for each prompt one image for each, such as 0-3,100")
    out: str = option(None, "NAME.png, or a folder")
    teacher: str = option(None, "draw the teacher's images as well (the one that the student notes)",
                          nargs="?", const="", metavar="FOLDER")  # fmt: skip
    steps: int = option(20, "of the teacher's sampler: DPM-Solver++, or of a velocity its own scheduler's",
                        within=at_least(1)._replace(high=999))  # fmt: skip  # more repeat a level: NaN
    guidance: float = option(4.5, "scale of the teacher's classifier-free guidance", within="count")
    pipeline: str = option(
        None, "tokenizer, text encoder and VAE (default: the noted teacher's)", metavar="FOLDER"
    )
    sigma_init: float = option(
        None, "of a student whose file does not name it; another is refused", within="positive"
    )
    heads: int = option(
        None, "attention heads of a file in PixArt's naming (default: the pipeline's, or 16)", within="count"
    )
    export: str = option(None, "write a pipeline for diffusers into this new folder", metavar="FOLDER")
    batch: int = option(4, "images at a time", within="many")
    device: str = option(*DEVICE)
    precision: str = option("fp32", "of the transformers and the text encoder", ("fp32", "bf16"))


def sheet(rows):
    """[(words, images (N, C, H, W) uint8)] -> a picture, the words above each row."""
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14)
    parts = []
    for words, images in rows:
        row = plots.grid(images, columns=len(images)).convert("RGB")
        lines = textwrap.wrap(words, max(10, int(row.width / font.getlength("n")))) or [""]
        strip = Image.new("RGB", (row.width, 18 * len(lines) + 4), "white")
        ImageDraw.Draw(strip).text((4, 2), "\n".join(lines), "black", font)
        parts += [strip, row]
    whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    for top, part in zip(itertools.accumulate((p.height for p in parts), initial=0), parts):
        whole.paste(part, (0, top))
    return whole


def save_sheet(cfg, batches):
    """All images in one picture, the student's row of each prompt above the teacher's."""
    words = {"student": "student, 1 step", "teacher": f"teacher, {cfg.steps} step{'s'[: cfg.steps > 1]}"}
    rows = defaultdict(list)
    for name, pairs, images in batches:
        for (prompt, _), image in zip(pairs, images):
            rows[prompt, name].append(image)
    named = [(f"{words[name]}: {text}", torch.stack(row)) for ((_, text), name), row in sorted(rows.items())]
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(cfg.out) as path:
        sheet(named).save(path, format="png")


def save_folder(cfg, batches):
    """Single PNGs, as they come."""
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for _, text in find_prompts(cfg.prompts)]
    with replacing(Path(cfg.out) / "prompts.jsonl") as path:
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    for name, pairs, images in batches:
        for ((number, _), seed), image in zip(pairs, images):
            ending = "" if name == "student" else f"-{name}"
            path = Path(cfg.out) / f"{number:04d}-{seed:06d}{ending}.png"
            with naming(path):
                Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(path)


def check(cfg):
    """What can be refused before anything is read."""
    check_ranges(cfg)
    if not cfg.out and not cfg.export:
        raise UserError("nothing to do: give --out, for images, or --export")
    for path in filter(None, (cfg.out, cfg.export)):
        check_new(path, folder=path == cfg.out and kind_of(path) == "folder")
    check_apart(cfg.out, cfg.export)
    find_device(cfg.device)


def make_samplers(cfg, student, about, folder, vae, null):
    """-> {"student": sample} and, if it is wanted, "teacher", with the networks on their device."""
    sigma_init = sigma_init_of(cfg.student, about, cfg.sigma_init)
    device, dtype = vae.device, null["caption"].dtype
    denoiser = denoiser_of(student, about).to(device, dtype)
    samplers = {"student": Generator(denoiser, sigma_init)}
    if cfg.teacher is not None:
        source = teacher_of(cfg, about)
        teacher = denoiser_of(*load_transformer(source, cfg.heads, like=folder)).to(device, dtype)
        if teacher.shape != denoiser.shape:
            raise UserError(f"{source}: makes images of another size than {cfg.student}")
        if caption_kind(teacher.transformer) != caption_kind(student):
            raise UserError(f"{source}: takes other captions than {cfg.student}")
        folders = [source, folder] if Path(source).is_dir() else [folder]
        samplers["teacher"] = teacher_sampler(teacher, folders, vae, null, cfg.steps, cfg.guidance)
    return samplers


def teacher_of(cfg, about):
    return cfg.teacher or noted_teacher(cfg.student, about) or cfg.pipeline


def check_teacher(cfg, about, folder):
    """UserError for a teacher of a kind that is not supported, before anything heavy is loaded."""
    if cfg.teacher is not None and not Path(teacher_of(cfg, about)).is_file():
        look(teacher_of(cfg, about), like=folder)


def report(seconds, batch):
    """Print the seconds per image of each sampler, without its first call if there are others."""
    each = {}
    for name, calls in seconds.items():
        counted = calls[1:] or calls
        each[name] = sum(counted) / len(counted) / batch
        first = "" if len(calls) > 1 else ", warming up included"
        print(f"{name}: {each[name]:.3g} s per image, {batch} at a time, without text and VAE{first}")
    if "teacher" in each:
        print(f"the student is {each['teacher'] / each['student']:.3g} times as fast")


def draw_all(cfg, student, about, folder, pairs):
    """From all files to the images, and how long they took."""
    quiet()
    device = torch.device(find_device(cfg.device))
    encoder = text_encoder(
        student, folder, device, {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision]
    )
    vae = load_vae(folder).to(device)  # in float32 always: it is small
    samplers = make_samplers(cfg, student, about, folder, vae, encoder.null)
    seconds = {name: [] for name in samplers}

    def batches():
        shape = denoiser_of(student, about).shape
        for name, some, images, took in draw(samplers, make_encode(encoder), vae, shape, pairs, cfg.batch):
            seconds[name].append(took)
            yield name, some, images

    (save_folder if kind_of(cfg.out) == "folder" else save_sheet)(cfg, batches())
    if encoder.truncated:
        print(f"warning: {encoder.truncated} prompts cut at {encoder.max_tokens} tokens", file=sys.stderr)
    report(seconds, cfg.batch)
    print(f"wrote {len(pairs) * len(samplers)} images to {cfg.out}")


def main(cfg):
    """Draw the images, or write the pipeline."""
    check(cfg)
    if processes() > 1:
        raise UserError(f"{processes()} processes would draw the same images: start it without torchrun")
    prompts, seeds = find_prompts(cfg.prompts), parse_seeds(cfg.seeds)
    student, about = load_transformer(cfg.student, cfg.heads, like=cfg.pipeline)
    sigma_init = sigma_init_of(cfg.student, about, cfg.sigma_init)
    if cfg.export:
        check_exact(cfg.student, about)
    if not (source := cfg.pipeline or noted_teacher(cfg.student, about)):
        raise UserError(f"{cfg.student}: notes no teacher, so --pipeline must be given")
    folder = find_pipeline(source, student)
    check_teacher(cfg, about, folder)
    if cfg.export:
        write_pipeline(student, sigma_init, folder, cfg.export)
        print(f"wrote {cfg.export}")
    if cfg.out:
        draw_all(cfg, student, about, folder, [(prompt, seed) for prompt in prompts for seed in seeds])


if __name__ == "__main__":
    sys.exit(command_line(main, Settings, __doc__))
