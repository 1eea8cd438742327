"""Distil an EDM teacher into a one-step generator by Score Implicit Matching: Algorithm 2.

    python edm/distill.py --preset digits                         # minutes on a CPU; trains its teacher first
    python edm/distill.py --preset fashion-mnist --precision bf16 --compile
    torchrun --nproc-per-node 4 edm/distill.py --preset cifar10-uncond \\
        --teacher edm-cifar10-32x32-uncond-vp.pkl --precision bf16 --compile
    python edm/distill.py --preset digits --method sid --sigma-distribution karras --weighting sid

No data are used but for the teacher's own training and for the numbers at the end.  The folder of the
run: generator.safetensors (the moving average, what sample.py and evaluate.py take), metrics.json,
log.csv and curves.png, samples-*.png (the same latents every time), panel-*.png (what both networks
see), and checkpoints to --resume from.  Ctrl-C and SIGTERM save first; kill -9 loses a few minutes.

--evaluate-every logs the Frechet distance to the data on the way (fd, of --samples images), and keeps the
best moving average in generator-best.safetensors.  The data are those of the last comparison too: choosing
by them is a choice on the test data, and the distance of what was chosen is too good.
"""

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch
from accelerate import PartialState

from edm import evaluate, train_teacher
from edm.algorithm2 import Distiller
from edm.config import (
    DISTILLATIONS,
    PRESETS,
    TEACHERS,
    Distillation,
    TeacherTraining,
    check,
    command_line,
    settings,
)
from edm.images import checkpoints
from edm.images.data import load_fitting
from edm.images.networks import Generator
from edm.images.sampler import fixed_latents
from edm.quality.judge import Judge
from edm.training.loop import complete
from edm.training.plots import Pictures
from edm.training.run import Run
from edm.training.trainee import compiled, make_accelerator
from toy.files import UserError, naming, versions, write_json
from toy.folder import holds

# ----------------------------------------------------------------------------------------------
# What every distillation does, of images and of text-to-image (distill_pixart.py) alike.


def distil(cfg, kind):
    """Load or train a teacher, build, train, finish; all is in cfg.out at the end.  Returns the exit code.

    kind      `Images`, or distill_pixart.py's `Prompts`; kind(cfg, accelerator) refuses wrong files
    shared    the settings that a teacher of its own takes over, from data; it leaves teacher_file
    load      load(path of a teacher), after which path is known
    build     build() -> the task, of which pictures(run, task) and score(run, task) or None are looked at
    finish    finish(run, task, path) writes the generator -> numbers, of which words(numbers) tells in lines
    """
    check(cfg)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/edm/{cfg.preset}-{cfg.seed}")
    accelerator = make_accelerator(cfg)
    parts = kind(cfg, accelerator)  # refuses what the run or its end could not use, before a folder is made
    run = Run(cfg, accelerator.is_main_process)
    if not cfg.teacher:
        parts.load(find_teacher(cfg, accelerator, parts))
    task = parts.build()
    pictures, score = parts.pictures(run, task), parts.score(run, task)
    if cfg.warmup >= cfg.steps:
        words = f"warning: --warmup {cfg.warmup} leaves no update of the generator in --steps {cfg.steps}"
        accelerator.print(words, file=sys.stderr)
    try:
        code = complete(cfg, accelerator, task, run, pictures.look, pictures, "distil", score)
    except torch.OutOfMemoryError:
        smaller = "lower --micro-batch" if task.batches.micro > 1 else "even for one image at a time"
        raise UserError(f"out of memory: {smaller}; the last checkpoint is kept") from None
    if code is None:
        finish(cfg, accelerator, run, task, parts)
    return code or 0


def own_teacher(cfg, shared):
    """Settings of the teacher that a run without --teacher trains, in its own folder in cfg.out."""
    given = TEACHERS[cfg.preset] | {name: getattr(cfg, name) for name in shared.split()}
    return TeacherTraining(**given, out=str(Path(cfg.out) / "teacher"), resume=True)


def find_teacher(cfg, accelerator, parts):
    """The path of a teacher that is trained, or found trained, in cfg.out/teacher."""
    teacher = own_teacher(cfg, parts.shared)
    path = Path(teacher.out) / parts.teacher_file
    if not path.exists():
        accelerator.print(f"no --teacher: training one on {parts.data} first, in {teacher.out}")
        if code := train_teacher.main(teacher):
            sys.exit(code)
        accelerator.wait_for_everyone()
    return path


def notes(cfg, teacher_path, steps, **more):
    """What is written beside a generator's weights."""
    here = Path(teacher_path)
    return dict(kind="generator", sigma_init=cfg.sigma_init, preset=cfg.preset, steps=steps,
                teacher=str(here.resolve() if here.exists() else here)) | more  # fmt: skip


def finish(cfg, accelerator, run, task, parts):
    """Write generator.safetensors, and metrics.json with what can be said of it."""
    log = Path(parts.path).with_name("metrics.json")
    trained = not cfg.teacher and log.exists()
    with naming(log):
        seconds = float(json.loads(log.read_text("utf-8"))["seconds"]) if trained else 0.0
    metrics = {"preset": cfg.preset, "seed": cfg.seed, "steps": cfg.steps, "status": "finished",
               "teacher_seconds": seconds,
               "distill_seconds": run.history[-1]["seconds"]}  # fmt: skip
    metrics |= parts.finish(run, task, run.path / "generator.safetensors")
    if run.first:
        write_json(run.path / "metrics.json", metrics | {"versions": versions()})
        print(summary(metrics, parts.words(metrics), cfg.out))
    accelerator.wait_for_everyone()


def summary(m, words, out):
    """What the command prints at the end."""
    teacher = f"{m['teacher_seconds']:.0f} s of training for the teacher, " if m["teacher_seconds"] else ""
    lines = [
        f"finished after {m['steps']} steps; {teacher}{m['distill_seconds']:.0f} s for the student",
        *words,
    ]
    if "student_fd" in m:
        lines.append(
            f"images per second: student {m['student_images_per_second']:.0f}, "
            f"teacher {m['teacher_images_per_second']:.0f}"
        )
    return "\n  ".join([*lines, f"everything is in {out}; look at samples-*.png, panel-*.png and curves.png"])


# ----------------------------------------------------------------------------------------------
# Images.


class Images:
    """EDM's U-Nets, and the Fréchet distance to data.  path, teacher: as soon as they are known."""

    shared, teacher_file = "preset data seed device precision compile threads", "teacher.safetensors"

    def __init__(self, cfg, accelerator):
        self.cfg, self.accelerator, self.data, self.best = cfg, accelerator, cfg.data, None
        made = PRESETS[cfg.preset]["network"]
        if cfg.teacher:
            self.load(cfg.teacher)
            made = self.teacher.config
        elif not cfg.data:
            raise UserError(f"preset {cfg.preset} needs --teacher: one of NVlabs' edm-*.pkl")
        else:  # whose data are the teacher's: these do decide what it learned
            teacher = own_teacher(cfg, self.shared)
            holds(teacher.out, settings(teacher))
        if cfg.data:
            size, classes = made["img_resolution"], 0 if cfg.teacher else made["label_dim"]
            load_fitting(cfg.data, (made["img_channels"], size, size), classes, judge=True)
        elif cfg.evaluate_every:
            raise UserError("--evaluate-every needs --data")

    def load(self, path):
        """The teacher, of any size, without the layer for augmentations: nothing here has any."""
        teacher, about = checkpoints.load(path)
        if "sigma_init" in about:
            raise UserError(f"{path} is a one-step generator, not a teacher")
        self.path, self.teacher = path, teacher.without_augmentation()

    def build(self):
        made = PRESETS[self.cfg.preset]["network"]
        found = {k: getattr(self.teacher, k) for k in ("img_resolution", "img_channels", "label_dim")}
        if other := ", ".join(f"{k} {v}, not {made[k]}" for k, v in found.items() if v != made[k]):
            own = f"the teacher's own network counts, not that of preset {self.cfg.preset}"
            self.accelerator.print(f"{own}: it has {other}")
        return build(self.cfg, self.accelerator, self.teacher)

    def pictures(self, run, task):
        return Pictures(run, task, *fixed_latents(task.teacher, task.device))

    def score(self, run, task):
        if self.cfg.evaluate_every:
            self.best = Best(self.cfg, run, task, self.path)
        return self.best

    def finish(self, run, task, path):
        """Write the moving average; with data at hand, compare it with them -> numbers."""
        if run.first:
            checkpoints.save(path, task.ema.network.denoiser, **notes(self.cfg, self.path, self.cfg.steps))
        self.accelerator.wait_for_everyone()
        numbers = compare(self.cfg, path, self.path) if self.cfg.data else {}
        if self.best and "steps" in self.best.found:  # else the run was finished: nothing to choose from
            numbers |= {"best_fd": self.best.found["fd"], "best_step": self.best.found["steps"]}
        return numbers

    def words(self, m):
        if "student_fd" in m:
            yield (
                f"Frechet distance of {m['samples']} samples: student {m['student_fd']:.3f} (1 evaluation), "
                f"teacher {m['teacher_fd']:.3f} ({m['teacher_evaluations']})"
            )
            yield f"halves of the data against each other: {m['floor_fd']:.3f}"
        if "best_fd" in m:
            yield f"best on the way, chosen on these data: {m['best_fd']:.3f} at step {m['best_step']}"


def build(cfg, accelerator, teacher):
    """The three networks, all starting as the teacher, and the task that trains two of them."""
    teacher = teacher.to(accelerator.device, memory_format=torch.channels_last)
    fake = copy.deepcopy(teacher).requires_grad_(True)
    generator = Generator(copy.deepcopy(fake), cfg.sigma_init)
    one_hot_rows = torch.eye(teacher.label_dim, device=accelerator.device, dtype=torch.float32)

    def condition(rng, n):
        if not teacher.label_dim:
            return {}
        labels = torch.randint(teacher.label_dim, (n,), generator=rng, device=rng.device)
        return {"class_labels": one_hot_rows[labels]}

    task = Distiller(cfg, accelerator, teacher, fake, generator, condition)
    if cfg.compile:
        compiled([teacher, fake, generator], accelerator.device, accelerator.print)
    return task


def evaluation(cfg, **files):
    """Of evaluate.py, in the features of a classifier of the data, kept in the run's folder."""
    same = {name: getattr(cfg, name) for name in ("data", "samples", "device")}
    return evaluate.Settings(**files, **same, out=str(Path(cfg.out) / "metrics.json"))


class Best:
    """Called with a step: scores the moving average -> {"fd": its distance}, and keeps the best one.

    The file itself remembers how good it is, and by which data and how many samples: with others, the
    choice begins anew.  So a killed run finds what it had, or makes it again, and ends in the same bits.
    """

    def __init__(self, cfg, run, task, teacher_path):
        self.cfg, self.run, self.task, self.teacher_path = cfg, run, task, teacher_path
        data = load_fitting(cfg.data, task.teacher.shape, judge=True)
        self.judge = Judge(evaluate.filled(evaluation(cfg)), data, PartialState())
        self.path, self.by = run.path / "generator-best.safetensors", [cfg.data, cfg.samples]
        self.found = {"fd": math.inf}
        if run.first and self.path.exists():
            _, about = checkpoints.load(self.path)
            if about.get("chosen_by") == self.by:
                self.found = about
            else:
                print(f"{self.path}: by other --data or --samples; the choice begins anew")

    def __call__(self, step):
        denoiser = self.task.ema.network.denoiser
        fd = self.judge("student", denoiser, {"sigma_init": self.cfg.sigma_init})["fd"]
        if self.run.first and fd < self.found["fd"]:
            self.found = notes(self.cfg, self.teacher_path, step, fd=fd, chosen_by=self.by)
            checkpoints.save(self.path, denoiser, **self.found)
        return {"fd": fd}


def compare(cfg, path, teacher_path):
    """Student, teacher and the data's own floor."""
    result = evaluate.compare(evaluation(cfg, student=str(path), teacher=str(teacher_path)))
    numbers = {"floor_fd": result["data_floor"]["fd"], "samples": cfg.samples}
    for who in ("student", "teacher"):
        row = result[who]
        numbers |= {f"{who}_{name}": row[name] for name in ("fd", "evaluations", "images_per_second",
                    "precision", "recall", "brightness", "class_histogram")}  # fmt: skip
    return numbers


def main(cfg):
    return distil(cfg, Images)


if __name__ == "__main__":
    sys.exit(command_line(main, Distillation, __doc__, presets=DISTILLATIONS))
