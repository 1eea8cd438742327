"""Distil a text-to-image teacher, PixArt-alpha, into a one-step generator: Algorithm 2 as in B.3.

    python edm/distill_pixart.py                         # digits, on a CPU; trains its teacher first
    torchrun --nproc-per-node 4 edm/distill_pixart.py --preset pixart-512 \\
        --teacher PixArt-alpha/PixArt-XL-2-512x512 --prompts captions.jsonl

No images are used, only prompts.  The folder of the run: generator.safetensors (the moving average, what
sample_pixart.py takes and exports), metrics.json, log.csv and curves.png, samples-*.png (the same latents
and prompts every time), panel-*.png (what both networks see), and checkpoints to --resume from.

--captions takes features that `prompts.py encode` made, instead of encoding prompts as they are drawn.
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch

from edm import pixart_digits, pixart_files, plots
from edm.config import TEXT_PRESETS, TextDistillation, TextTeacherTraining, UserError, check, command_line
from edm.device import total_memory
from edm.networks import Generator
from edm.pixart import Guided, PixArtDenoiser, decode, without
from edm.prompts import MAX_TOKENS, CaptionFile, TextEncoder, encode_by_index, quiet, read_prompts
from edm.runs import Run, versions, write_json
from edm.sampler import latents
from edm.trainer import Distiller, compiled, complete, make_accelerator

DISTILLATIONS = {name: preset["distill"] for name, preset in TEXT_PRESETS.items()}
DROPOUT = 0.1  # share of captions that the online network does without, if it is to be guided


class TextDistiller(Distiller):
    """Algorithm 2 with prompts: captions, guidance, and the latents' sigma_data."""

    def __init__(self, cfg, accelerator, teacher, fake, generator, parts):
        self.captions, self.count, self.null = parts.captions, parts.count, parts.null
        average = copy.deepcopy(generator)
        super().__init__(cfg, accelerator, teacher, fake, generator, average, fake.shape, self.pick,
                         fake.sigma_data)  # fmt: skip

    def pick(self, rng, n):
        """Which prompts, and which of them the online network is not shown."""
        prompt = torch.randint(self.count, (n,), generator=rng, device=rng.device)
        hidden = torch.rand(n, generator=rng, dtype=torch.float32, device=rng.device) < DROPOUT
        return {"prompt": prompt, "hidden": hidden}

    def draw(self, *numbers):
        parts = super().draw(*numbers)
        parts["hidden"] = [cond["hidden"] for cond in parts["cond"]]
        parts["cond"] = [self.captions(cond["prompt"]) for cond in parts["cond"]]
        return parts

    def fake_cond(self, draw, i):
        cond = draw["cond"][i]
        if self.cfg.fake_guidance == 1:
            return cond
        caption, mask = without(cond["caption"], cond["mask"], self.null, draw["hidden"][i])
        return {"caption": caption, "mask": mask}

    def judge(self, network):
        return network if self.cfg.fake_guidance == 1 else Guided(network, self.null, self.cfg.fake_guidance)


# ----------------------------------------------------------------------------------------------
# What goes into it.


def train_teacher(cfg, accelerator):
    """The pipeline of pixart-digits, trained, or found trained, in cfg.out/teacher -> its folder."""
    out = Path(cfg.out) / "teacher"
    if not (out / "pipeline").exists():
        accelerator.print(f"no --teacher: training one on scikit-learn's digits first, in {out}")
        shared = {k: getattr(cfg, k) for k in ("preset", "seed", "device", "threads")}
        given = TEXT_PRESETS[cfg.preset]["teacher"] | shared
        if code := pixart_digits.main(TextTeacherTraining(**given, out=str(out), resume=True)):
            sys.exit(code)
        accelerator.wait_for_everyone()
    return str(out / "pipeline") if (out / "pipeline").exists() else sys.exit(0)  # stopped by a signal


def check_files(cfg):
    """Read what a run without --teacher would come to only after its training.  Raises UserError."""
    if cfg.teacher:
        return  # `Parts` does, at once
    if cfg.prompts:
        read_prompts(cfg.prompts)
    if cfg.captions:
        CaptionFile(cfg.captions, "cpu")
    if cfg.transformer:
        pixart_files.load_transformer(cfg.transformer)


class Parts:
    """What a run is made of: the teacher's pipeline and the prompts.  Raises UserError for a wrong file.

    captions   captions(indices) -> {"caption", "mask"}, for `count` prompts
    source     the TextEncoder or CaptionFile behind them
    """

    def __init__(self, cfg, pipeline, device):
        self.pipeline = pipeline
        self.transformer, _ = pixart_files.load_transformer(cfg.transformer or pipeline, like=pipeline)
        self.vae = pixart_files.load_vae(pipeline).to(device)
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        if cfg.captions:
            self.source = CaptionFile(cfg.captions, device)
        else:
            self.source = TextEncoder(pipeline, device, dtype)
        path = cfg.prompts or Path(pipeline) / "prompts.txt"
        if not cfg.prompts and not path.exists():
            raise UserError(f"preset {cfg.preset} needs --prompts: FILE.txt, .jsonl or .csv")
        prompts = read_prompts(path)
        width = self.transformer.config.caption_channels
        self.captions, self.null = encode_by_index(prompts, self.source, width), self.source.null
        self.count = len(prompts)

    def frozen_bytes(self):
        """Of the text encoder and the VAE."""
        networks = [self.vae] + ([self.source.model] if isinstance(self.source, TextEncoder) else [])
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def build(cfg, accelerator, parts):
    """The three networks, all starting as the teacher, and the task that trains two of them."""
    if cfg.checkpointing:
        parts.transformer.enable_gradient_checkpointing()
    fake = PixArtDenoiser(parts.transformer).to(accelerator.device).requires_grad_(True)
    generator = Generator(copy.deepcopy(fake), cfg.sigma_init)
    teacher = copy.deepcopy(fake)
    if cfg.precision == "bf16":  # the frozen one alone: in bf16 a weight cannot take steps of 5e-6
        teacher.to(torch.bfloat16)
    if cfg.guidance != 1:
        teacher = Guided(teacher, parts.null, cfg.guidance)
    task = TextDistiller(cfg, accelerator, teacher, fake, generator, parts)
    if cfg.compile:
        compiled([teacher, fake, generator], accelerator.device, accelerator.print)
    return task


# ----------------------------------------------------------------------------------------------
# Memory.


def memory_plan(cfg, transformer, frozen, processes):
    """Bytes on each device: {what: bytes}.  frozen: parameters of the text encoder and the VAE.

    Activations are estimates: a block keeps its input if it is made again, else about 20 numbers for each
    of those; the generator's, the online network's and the teacher's (twice, if guided) are all alive.
    """
    config, one = transformer.config, transformer.num_parameters()
    shares = processes if cfg.sharding == "fsdp" else 1
    low = 2 if cfg.precision == "bf16" else 4
    numbers = (config.sample_size // config.patch_size) ** 2 * transformer.inner_dim  # of a block's input
    kept = config.num_layers + 20 if cfg.checkpointing else 20 * config.num_layers
    graphs = 2 + (cfg.fake_guidance != 1) + 1 + (cfg.guidance != 1)
    images = min(cfg.micro_batch or cfg.batch, cfg.batch // processes)
    return {
        "generator and online network: weights, gradients, Adam's two moments": 2 * 16 * one // shares,
        "moving average": 4 * one // shares,
        "teacher": low * one // shares,
        "text encoder and VAE": frozen,
        f"activations of {images} images (estimated)": low * graphs * images * numbers * kept,
    }


def tell_memory(plan, device, say):
    """Print the plan.  Raises UserError if the device is too small for it."""
    total = sum(plan.values())
    for what, size in plan.items():
        say(f"  {size / 1e9:7.2f} GB  {what}")
    fits = ", ".join(f"{'fits' if total < 0.95e9 * size else 'too much for'} {size} GB" for size in (40, 80))
    say(f"  {total / 1e9:7.2f} GB  on each device: {fits}")
    if total > (there := total_memory(device)):
        raise UserError(
            f"needs about {total / 1e9:.3g} GB on each device, which has {there / 1e9:.3g} GB: "
            "lower --micro-batch, or try --checkpointing, --sharding fsdp, --captions"
        )


def gather(cfg, accelerator, pipeline):
    """The Parts, if there is the memory for all that they become."""
    parts = Parts(cfg, pipeline, accelerator.device)
    accelerator.print(f"{parts.count:,} prompts; memory:")
    plan = memory_plan(cfg, parts.transformer, parts.frozen_bytes(), accelerator.num_processes)
    tell_memory(plan, accelerator.device, accelerator.print)
    return parts


# ----------------------------------------------------------------------------------------------
# The run.


def make_pictures(run, task, vae):
    """Some prompts spread over all of them, with the latents of the first seeds."""
    n, columns = (40, 8) if task.shape[1] <= 16 else (8, 4)
    z, _ = latents(range(n), task.shape)
    cond = task.captions(torch.linspace(0, task.count - 1, n, dtype=torch.float32).long())
    return plots.Pictures(run, task, z.to(task.device), cond, lambda x: decode(vae, x), columns)


def finish(cfg, accelerator, run, task, parts):
    """Write generator.safetensors, and metrics.json: for digits, with what a classifier reads."""
    weights = task.ema.state_dict()  # by every process, if sharded
    if not accelerator.is_main_process:
        return accelerator.wait_for_everyone()
    teacher, _ = pixart_files.load_transformer(cfg.transformer or parts.pipeline, like=parts.pipeline)
    student = copy.deepcopy(teacher)
    student.load_state_dict({k.removeprefix("denoiser.transformer."): v for k, v in weights.items()})
    here = Path(parts.pipeline)
    about = dict(kind="generator", sigma_init=cfg.sigma_init, preset=cfg.preset, steps=cfg.steps,
                 teacher=str(here.resolve() if here.exists() else here))  # fmt: skip
    pixart_files.save_student(run.path / "generator.safetensors", student, **about)
    log = here.with_name("metrics.json")
    trained = not cfg.teacher and log.exists()
    metrics = {"preset": cfg.preset, "seed": cfg.seed, "steps": cfg.steps, "status": "finished",
               "teacher_seconds": json.loads(log.read_text())["seconds"] if trained else 0.0,
               "distill_seconds": run.history[-1]["seconds"]}  # fmt: skip
    if cfg.preset == "pixart-digits" and isinstance(parts.source, TextEncoder):
        generator = Generator(PixArtDenoiser(student), cfg.sigma_init).to(accelerator.device)
        denoiser = PixArtDenoiser(teacher).to(accelerator.device)
        if cfg.guidance != 1:
            denoiser = Guided(denoiser, parts.null, cfg.guidance)
        networks = generator, denoiser, task.shape, parts.vae, parts.source
        metrics |= pixart_digits.compare(*networks, cfg.samples, run.path / "classifier.safetensors")
    write_json(run.path / "metrics.json", metrics | {"versions": versions()})
    print(summary(metrics, cfg.out))
    accelerator.wait_for_everyone()


def summary(m, out):
    """What main prints at the end."""
    teacher = f"{m['teacher_seconds']:.0f} s of training for the teacher, " if m["teacher_seconds"] else ""
    lines = [f"finished after {m['steps']} steps; {teacher}{m['distill_seconds']:.0f} s for the student"]
    if "student_follows" in m:
        lines += [
            f"  the digit of the prompt is read from {m['student_follows']:.1%} of {m['samples']} one-step "
            f"samples, and from {m['teacher_follows']:.1%} of the teacher's (35 evaluations)",
            f"  Frechet distance: student {m['student_fd']:.3f}, teacher {m['teacher_fd']:.3f}, "
            f"halves of the data {m['floor_fd']:.3f}",
            f"  images per second: student {m['student_images_per_second']:.0f}, "
            f"teacher {m['teacher_images_per_second']:.0f}",
        ]
    return "\n".join([*lines, f"  everything is in {out}; look at samples-*.png, panel-*.png and curves.png"])


def main(cfg):
    """Distil; everything is in cfg.out at the end.  Returns the exit code."""
    check(cfg)
    quiet()
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/edm/{cfg.preset}-{cfg.seed}")
    if not cfg.teacher and not TEXT_PRESETS[cfg.preset]["teacher"]:
        raise UserError(f"preset {cfg.preset} needs --teacher, such as PixArt-alpha/PixArt-XL-2-512x512")
    accelerator = make_accelerator(cfg)
    if cfg.fake_guidance != 1:
        words = f"the online network learns {DROPOUT:.0%} of its samples without their caption; B.3 does not"
        accelerator.print(f"warning: --fake-guidance {cfg.fake_guidance:g}: {words}", file=sys.stderr)
    # What is wrong with a file, or too big, is told before the folder is made.
    check_files(cfg)
    parts = gather(cfg, accelerator, cfg.teacher) if cfg.teacher else None
    run = Run(cfg, accelerator.is_main_process)
    parts = parts or gather(cfg, accelerator, train_teacher(cfg, accelerator))
    task = build(cfg, accelerator, parts)
    pictures = make_pictures(run, task, parts.vae)
    try:
        code = complete(cfg, accelerator, task, run, pictures.look, pictures, "distil")
    except torch.OutOfMemoryError:
        raise UserError("out of memory: lower --micro-batch; the last checkpoint is kept") from None
    if cut := getattr(parts.source, "truncated", 0):
        accelerator.print(f"warning: {cut:,} of the prompts drawn were cut to {MAX_TOKENS} tokens")
    if code is None:
        finish(cfg, accelerator, run, task, parts)
    return code or 0


if __name__ == "__main__":
    sys.exit(command_line(main, TextDistillation, __doc__, presets=DISTILLATIONS))
