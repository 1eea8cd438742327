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

from edm import checkpoints, evaluate, plots, train_teacher
from edm.config import PRESETS, Distillation, TeacherTraining, UserError, check, command_line
from edm.data import load_fitting
from edm.networks import Generator
from edm.runs import Run, check_settings, versions, write_json
from edm.sampler import fixed_latents
from edm.trainer import Distiller, compiled, complete, make_accelerator

DISTILLATIONS = {name: {"data": p["data"]} | p["distill"] for name, p in PRESETS.items()}


def own_teacher(cfg):
    """Settings of the teacher that a run without --teacher trains, in its own folder in cfg.out."""
    shared = {k: getattr(cfg, k) for k in "preset data seed device precision compile threads".split()}
    given = PRESETS[cfg.preset]["teacher"] | shared
    return TeacherTraining(**given, out=str(Path(cfg.out) / "teacher"), resume=True)


def check_files(cfg):
    """Refuse a teacher or data that the run or its end could not use, before anything is written."""
    network = PRESETS[cfg.preset]["network"]
    if cfg.teacher:
        network = load_teacher(cfg.teacher).config
    elif not cfg.data:
        raise UserError(f"preset {cfg.preset} needs --teacher: one of NVlabs' edm-cifar10-32x32-*.pkl")
    else:  # whose data are the teacher's: these do decide what it learned
        check_settings(own_teacher(cfg))
    if cfg.data:
        size, classes = network["img_resolution"], 0 if cfg.teacher else network["label_dim"]
        load_fitting(cfg.data, (network["img_channels"], size, size), classes, judge=True)
    elif cfg.evaluate_every:
        raise UserError("--evaluate-every needs --data")


def find_teacher(cfg, accelerator):
    """The path of --teacher; without one, it is trained (or found trained) in cfg.out/teacher."""
    if cfg.teacher:
        return cfg.teacher
    teacher = own_teacher(cfg)
    path = Path(teacher.out) / "teacher.safetensors"
    if not path.exists():
        accelerator.print(f"no --teacher: training one on {cfg.data} first, in {teacher.out}")
        if code := train_teacher.main(teacher):
            sys.exit(code)
        accelerator.wait_for_everyone()
    return path if path.exists() else sys.exit(0)  # stopped by a signal


def load_teacher(path):
    """The teacher, of any size, without the layer for augmentations: nothing here has any."""
    teacher, about = checkpoints.load(path)
    if "sigma_init" in about:
        raise UserError(f"{path} is a one-step generator, not a teacher")
    return teacher.without_augmentation()


def differences(teacher, preset):
    """Where a teacher is not what the preset, to train one, would have made: words, or an empty text."""
    made = PRESETS[preset]["network"]
    found = {k: getattr(teacher, k) for k in ("img_resolution", "img_channels", "label_dim")}
    return ", ".join(f"{k} {found[k]}, not {made[k]}" for k in found if found[k] != made[k])


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

    task = Distiller(cfg, accelerator, teacher, fake, generator, copy.deepcopy(generator), teacher.shape,
                     condition, teacher.sigma_data)  # fmt: skip
    if cfg.compile:
        compiled([teacher, fake, generator], accelerator.device, accelerator.print)
    return task


def evaluation(cfg, **files):
    """Of evaluate.py, in the features of a classifier of the data, kept in the run's folder."""
    same = {name: getattr(cfg, name) for name in ("data", "samples", "device")}
    return evaluate.Settings(**files, **same, out=str(Path(cfg.out) / "metrics.json"))


def notes(cfg, teacher_path, steps, **more):
    """What is written beside a generator's weights."""
    return dict(kind="generator", sigma_init=cfg.sigma_init, preset=cfg.preset, steps=steps,
                teacher=str(Path(teacher_path).resolve())) | more  # fmt: skip


class Best:
    """Called with a step: scores the moving average -> {"fd": its distance}, and keeps the best one.

    The file itself remembers how good it is, and by which data and how many samples: with others, the
    choice begins anew.  So a killed run finds what it had, or makes it again, and ends in the same bits.
    """

    def __init__(self, cfg, run, task, teacher_path):
        self.cfg, self.run, self.task, self.teacher_path = cfg, run, task, teacher_path
        data = load_fitting(cfg.data, task.teacher.shape, judge=True)
        self.judge = evaluate.Judge(evaluate.filled(evaluation(cfg)), data, PartialState())
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
                    "precision", "recall", "class_histogram")}  # fmt: skip
    return numbers


def summary(m, out):
    """What main prints at the end."""
    teacher = f"{m['teacher_seconds']:.0f} s of training for the teacher, " if m["teacher_seconds"] else ""
    lines = [f"finished after {m['steps']} steps; {teacher}{m['distill_seconds']:.0f} s for the student"]
    if "student_fd" in m:
        lines += [
            f"  Frechet distance of {m['samples']} samples: student {m['student_fd']:.3f} (1 evaluation), "
            f"teacher {m['teacher_fd']:.3f} ({m['teacher_evaluations']})",
            f"  halves of the data against each other: {m['floor_fd']:.3f}",
            f"  images per second: student {m['student_images_per_second']:.0f}, "
            f"teacher {m['teacher_images_per_second']:.0f}",
        ]
    if "best_fd" in m:
        lines.append(f"  best on the way, chosen on these data: {m['best_fd']:.3f} at step {m['best_step']}")
    return "\n".join([*lines, f"  everything is in {out}; look at samples-*.png, panel-*.png and curves.png"])


def finish(cfg, accelerator, run, task, teacher_path, best):
    """Write generator.safetensors, and metrics.json: with data at hand, compared with them."""
    path = run.path / "generator.safetensors"
    if accelerator.is_main_process:
        checkpoints.save(path, task.ema.network.denoiser, **notes(cfg, teacher_path, cfg.steps))
    accelerator.wait_for_everyone()
    log = Path(teacher_path).with_name("metrics.json")
    trained = not cfg.teacher and log.exists()
    metrics = {"preset": cfg.preset, "seed": cfg.seed, "steps": cfg.steps, "status": "finished",
               "teacher_seconds": json.loads(log.read_text())["seconds"] if trained else 0.0,
               "distill_seconds": run.history[-1]["seconds"]}  # fmt: skip
    metrics |= compare(cfg, path, teacher_path) if cfg.data else {}
    if best and "steps" in best.found:  # else, after a finished run, there was nothing to choose from
        metrics |= {"best_fd": best.found["fd"], "best_step": best.found["steps"]}
    if accelerator.is_main_process:
        write_json(run.path / "metrics.json", metrics | {"versions": versions()})
        print(summary(metrics, cfg.out))


def main(cfg):
    """Distil; everything is in cfg.out at the end.  Returns the exit code."""
    check(cfg)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/edm/{cfg.preset}-{cfg.seed}")
    accelerator = make_accelerator(cfg)
    check_files(cfg)
    run = Run(cfg, accelerator.is_main_process)
    teacher_path = find_teacher(cfg, accelerator)
    teacher = load_teacher(teacher_path)
    if words := differences(teacher, cfg.preset):
        accelerator.print(
            f"the teacher's own network counts, not that of preset {cfg.preset}: it has {words}"
        )
    task = build(cfg, accelerator, teacher)
    pictures = plots.Pictures(run, task, *fixed_latents(task.teacher, task.device))
    best = Best(cfg, run, task, teacher_path) if cfg.evaluate_every else None
    code = complete(cfg, accelerator, task, run, pictures.look, pictures, "distil", best)
    if code is None:
        finish(cfg, accelerator, run, task, teacher_path, best)
    return code or 0


if __name__ == "__main__":
    sys.exit(command_line(main, Distillation, __doc__, presets=DISTILLATIONS))
