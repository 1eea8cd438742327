"""Compare a one-step student with its teacher, if it has one, and with the data.

    python edm/evaluate.py --student out/edm/digits/generator.safetensors --data digits
    python edm/evaluate.py --student generator.safetensors --data cifar-10-batches-bin \\
        --inception inception-2015-12-05.pt --reference cifar10-32x32.npz
    python edm/evaluate.py --student sid-cifar10-cond.pkl --sigma-init 2.5 --data cifar-10-batches-bin
    python edm/evaluate.py --student generator.safetensors --prompts prompts.txt \\
        --clip openai/clip-vit-large-patch14 --aesthetic sac+logos+ava1-l14-linearMSE.pth
    torchrun --nproc-per-node 4 edm/evaluate.py ...          # the same numbers, sooner

The images are those of seeds 0, 1, 2, ...; with --prompts, one for each prompt.  With --inception the
Fréchet distance is the FID, to the statistics of --reference, or to the data's own without one.  Otherwise
features are those of a small classifier, trained on the data once and kept in a file.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from collections import defaultdict

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from edm import sample_pixart
from edm.config import DEVICE, LEAST_IMAGES, SIGMA_INIT, command_line
from edm.device import find_device
from edm.images import checkpoints
from edm.images.data import load_fitting
from edm.quality.judge import Judge
from edm.quality.text_metrics import Clip, clip_score, load_aesthetic
from edm.text import pixart_files
from edm.text.flow import denoiser_of
from edm.text.joint import text_encoder
from edm.text.pretrained import quiet
from edm.text.prompts import DTYPES
from edm.text.sampler import draw, find_prompts, make_encode
from toy.command import at_least, check_ranges, option
from toy.files import UserError, check_new, replacing


@dataclass(frozen=True)
class Settings:
    student: str = option(None, "generator.safetensors of a run, or a one-step generator in EDM's .pkl form",
                          required=True, metavar="FILE")  # fmt: skip
    sigma_init: float = option(None, SIGMA_INIT, metavar="SIGMA", within="positive")
    teacher: str = option(None, "its teacher (default: as the student's file says, or none)", metavar="FILE")
    data: str = option(None, '"digits", or a data set\'s path')
    inception: str = option(None, "inception-2015-12-05.pt, for FID", metavar="FILE")
    trust: bool = option(False, "open an --inception that is not NVIDIA's own file, and may run anything")
    reference: str = option(None, ".npz with mu and sigma to compute FID to", metavar="FILE")
    classifier: str = option(
        None, "the classifier, kept (default classifier-DATA.safetensors beside --out)", metavar="FILE"
    )
    prompts: str = option(None, "for text to image, instead of --data: a file of prompts, or figure3")
    clip: str = option(None, "for --prompts: a CLIP, folder or hub name", metavar="FOLDER")
    aesthetic: str = option(None, "for --prompts: the head of LAION's aesthetic score", metavar="FILE")
    guidance: float = option(None, "for --prompts: of the teacher (default 4.5)", within="count")
    precision: str = option(
        None, "for --prompts: of transformers and text encoder (default fp32)", ("fp32", "bf16")
    )
    samples: int = option(None, "images of each sampler (default 50000; with --prompts at most: default all)",
                          within=at_least(2))  # fmt: skip
    steps: int = option(None, "the teacher's Heun steps: 2 * steps - 1 evaluations (default 18); with "
                        "--prompts its sampler's (default 20)", within="many")  # fmt: skip
    batch: int = option(None, "images at a time (default 256, with --prompts 4)", within="many")
    device: str = option(*DEVICE)
    out: str = option("metrics.json", "file for the numbers")


# For images, and for prompts: what only they take, defaults.
ONLY = ("data", "inception", "reference", "classifier"), ("clip", "aesthetic", "guidance", "precision")
DEFAULTS = dict(samples=50_000, steps=18, batch=256), dict(steps=20, batch=4, guidance=4.5, precision="fp32")


def filled(cfg):
    """The settings, with the defaults that depend on --prompts."""
    defaults = DEFAULTS[cfg.prompts is not None]
    return dataclasses.replace(cfg, **{k: v for k, v in defaults.items() if getattr(cfg, k) is None})


def check(cfg):
    """What can be refused before anything is read."""
    text = cfg.prompts is not None
    for name in ONLY[not text]:
        if getattr(cfg, name) is not None:
            raise UserError(f"--{name}: {'not' if text else 'only'} with --prompts")
    if not (cfg.clip if text else cfg.data):
        raise UserError("--prompts needs --clip" if text else "one of --data and --prompts is needed")
    check_ranges(cfg)
    if not text and (cfg.samples or LEAST_IMAGES) < LEAST_IMAGES:
        raise UserError(f"--samples must be at least {LEAST_IMAGES}, got {cfg.samples}")
    check_new(cfg.out)
    if not Path(cfg.out).parent.is_dir():
        raise UserError(f"{Path(cfg.out).parent}: no such folder, for --out")
    if cfg.trust and not cfg.inception:
        raise UserError("--trust is of an --inception")
    if cfg.reference and not cfg.inception:
        raise UserError("--reference holds statistics of Inception features: it needs --inception")
    find_device(cfg.device)


def load_networks(cfg):
    """-> {"student": (network, about), "teacher": (network, about)}; without a teacher, the student alone."""
    student, about = checkpoints.load(cfg.student, cfg.sigma_init)
    if "sigma_init" not in about:
        words = "a denoiser, not a one-step generator (it names no sigma_init)"
        raise UserError(f"{cfg.student}: {words}; if it is one, as SiD's files are, give its --sigma-init")
    path = cfg.teacher or checkpoints.noted_teacher(cfg.student, about)
    if not path:
        return {"student": (student, about)}
    teacher, teacher_about = checkpoints.load(path)
    if "sigma_init" in teacher_about:
        raise UserError(f"{path}: a one-step generator, not a teacher")
    if teacher.shape != student.shape:
        raise UserError(f"{path}: makes images of {teacher.shape}, but the student of {student.shape}")
    return {"student": (student, about), "teacher": (teacher, teacher_about)}


def text_table(result):
    lines = ["        CLIP score   error aesthetic   error  images/s"]
    for name in ("student", "teacher"):
        row = {"aesthetic": math.nan, "aesthetic_error": math.nan} | result[name]
        lines.append(
            f"{name:8}{row['clip_score']:10.3f}{row['clip_score_error']:8.3f}{row['aesthetic']:10.3f}"
            f"{row['aesthetic_error']:8.3f}{row['images_per_second']:10.2f}"
        )
    lines.append(f"({row['images']} prompts; the errors are standard errors; the speed without text and VAE)")
    return "\n".join(lines)


def table(result):
    rows = {name: result[name] for name in ("student", "teacher") if name in result}
    floor = result["data_floor"]
    lines = ["        evaluations        FD      IS  precision  recall  seconds  images/s"]
    for name, row in rows.items():
        lines.append(
            f"{name:8}{row['evaluations']:11}{row['fd']:10.3f}{row['inception_score']:8.2f}"
            f"{row['precision']:11.3f}{row['recall']:8.3f}{row['seconds']:9.1f}{row['images_per_second']:10.1f}"
        )
    one, other = floor["sizes"]
    lines.append(f"{'data':19}{floor['fd']:10.3f}{floor['inception_score']:8.2f}")
    return "\n".join([*lines, f"(FD of the data: {one} of its images against the other {other})"])


def compare(cfg):
    """Student and teacher, and data floor: what main prints and writes, as a dictionary."""
    cfg = filled(cfg)
    state = PartialState(cpu=find_device(cfg.device) == "cpu")  # else torchrun on CPUs goes unnoticed
    rows = (compare_data if cfg.prompts is None else compare_prompts)(cfg, state)
    about = {"torch": torch.__version__, "device": str(state.device), "processes": state.num_processes}
    return rows | {"settings": dataclasses.asdict(cfg), "run": about}


def compare_data(cfg, state):
    """-> {"student": numbers, "teacher": numbers, "data_floor": numbers}; "teacher" if there is one."""
    networks = load_networks(cfg)
    shape = networks["student"][0].shape
    judge = Judge(cfg, load_fitting(cfg.data, shape, judge=True, labelled=not cfg.inception), state)
    rows = {name: judge(name, *networks[name]) for name in networks}
    return rows | {"data_floor": judge.floor()}


def drawn(cfg, prompts, state):
    """The batches of sample_pixart.draw: prompt i from seed i, of which this process has its share."""
    student, about = pixart_files.load_transformer(cfg.student, like=cfg.teacher or None)
    if not (source := cfg.teacher or checkpoints.noted_teacher(cfg.student, about)):
        raise UserError(f"{cfg.student}: notes no teacher, so --teacher must be given")
    folder = pixart_files.find_pipeline(source, student)
    sample_pixart.check_teacher(cfg, about, folder)
    encoder = text_encoder(student, folder, state.device, DTYPES[cfg.precision][1])
    vae = pixart_files.load_vae(folder).to(state.device)
    samplers = sample_pixart.make_samplers(cfg, student, about, folder, vae, encoder.null)
    pairs = [(prompt, prompt[0]) for prompt in prompts[state.process_index :: state.num_processes]]
    shape, encode = denoiser_of(student, about).shape, make_encode(encoder)
    bar = dict(total=2 * math.ceil(len(pairs) / cfg.batch), disable=not state.is_main_process, leave=False)
    yield from tqdm(draw(samplers, encode, vae, shape, pairs, cfg.batch), "images", **bar)
    if encoder.truncated:
        print(f"warning: {encoder.truncated} prompts cut at {encoder.max_tokens} tokens", file=sys.stderr)


def compare_prompts(cfg, state):
    """Filled settings of evaluate.py, with prompts -> {"student": numbers, "teacher": numbers}."""
    quiet()
    same = "student sigma_init prompts steps guidance batch precision out".split()
    drawing = sample_pixart.Settings(teacher=cfg.teacher or "", **{k: getattr(cfg, k) for k in same})
    sample_pixart.check(drawing)
    prompts = find_prompts(cfg.prompts)[: cfg.samples]
    if len(prompts) < 2:
        raise UserError(f"--prompts: {len(prompts)} is too few for a standard error")
    clip = Clip(cfg.clip, state.device)
    aesthetic = cfg.aesthetic and load_aesthetic(cfg.aesthetic, clip.width).to(state.device)
    cut = sum(len(ids) > clip.max_tokens for ids in clip.tokenizer([text for _, text in prompts]).input_ids)
    if cut and state.is_main_process:
        print(f"warning: CLIP sees {cut} prompts cut at {clip.max_tokens} tokens", file=sys.stderr)
    scores, seconds, rows = defaultdict(list), defaultdict(list), {}
    for name, pairs, images, took in drawn(drawing, prompts, state):
        embeddings = clip.images(images)
        found = [clip_score(embeddings, clip.texts([text for (_, text), _ in pairs]))]
        found += [aesthetic(embeddings)[:, 0]] if aesthetic else []
        scores[name] += zip([seed for _, seed in pairs], torch.stack(found, 1).tolist())
        seconds[name].append(took)
    for name, steps in (("student", 1), ("teacher", cfg.steps)):
        values = torch.tensor([row for _, row in sorted(gather_object(scores[name]))], dtype=torch.float64)
        row = rows[name] = {"steps": steps, "images": len(values)}
        for key, column in zip(("clip_score", "aesthetic"), values.T):
            row |= {key: column.mean().item(), f"{key}_error": column.std().item() / len(column) ** 0.5}
        calls = gather_object(seconds[name][1:] or seconds[name])  # of each process the first warms up
        working = min(state.num_processes, len(prompts))  # the others have none to draw
        row["images_per_second"] = working * cfg.batch * len(calls) / sum(calls)
    return rows


def main(cfg):
    check(cfg)
    result = compare(cfg)
    if PartialState().is_main_process:
        print(table(result) if cfg.prompts is None else text_table(result))
        with replacing(cfg.out) as temporary:
            entries = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
            temporary.write_text("{\n" + ",\n".join(entries) + "\n}\n", "utf-8")
        print(f"wrote {cfg.out}")


if __name__ == "__main__":
    sys.exit(command_line(main, Settings, __doc__))
