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
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch

from edm import checkpoints, evaluate, plots, train_teacher
from edm.config import PRESETS, Distillation, TeacherTraining, UserError, check, command_line
from edm.data import load_images
from edm.networks import Generator
from edm.runs import Run, versions, write_json
from edm.sampler import fixed_latents
from edm.trainer import Distiller, compiled, complete, make_accelerator

DISTILLATIONS = {name: {"data": p["data"]} | p["distill"] for name, p in PRESETS.items()}


def find_teacher(cfg, accelerator):
    """The path of --teacher; without one, it is trained (or found trained) in cfg.out/teacher."""
    if cfg.teacher:
        return cfg.teacher
    out = Path(cfg.out) / "teacher"
    path = out / "teacher.safetensors"
    if not path.exists():
        accelerator.print(f"no --teacher: training one on {cfg.data} first, in {out}")
        shared = {k: getattr(cfg, k) for k in ("preset", "data", "seed", "device", "precision", "compile",
                                               "threads")}  # fmt: skip
        given = PRESETS[cfg.preset]["teacher"] | shared
        if code := train_teacher.main(TeacherTraining(**given, out=str(out), resume=True)):
            sys.exit(code)
        accelerator.wait_for_everyone()
    return path if path.exists() else sys.exit(0)  # stopped by a signal


def load_teacher(path, preset):
    """The teacher, if it fits the preset."""
    teacher, about = checkpoints.load(path)
    if "sigma_init" in about:
        raise UserError(f"{path} is a one-step generator, not a teacher")
    for name in ("img_resolution", "img_channels", "label_dim"):
        wanted, found = PRESETS[preset]["network"].get(name, 0), getattr(teacher, name)
        if wanted != found:
            raise UserError(f"{path} has {name} {found}, but preset {preset} means {wanted}")
    return teacher


def build(cfg, accelerator, teacher):
    """The three networks, all starting as the teacher, and the task that trains two of them."""
    teacher = teacher.to(accelerator.device, memory_format=torch.channels_last)
    fake = copy.deepcopy(teacher).requires_grad_(True)
    generator = Generator(copy.deepcopy(fake), cfg.sigma_init)

    one_hot_rows = torch.eye(teacher.label_dim, device=accelerator.device)

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


def compare(cfg, path, teacher_path):
    """Student, teacher and the data's own floor, in the features of a classifier of the data."""
    result = evaluate.compare(evaluate.Settings(student=str(path), teacher=str(teacher_path), data=cfg.data,
                                                samples=cfg.samples))  # fmt: skip
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
    return "\n".join([*lines, f"  everything is in {out}; look at samples-*.png, panel-*.png and curves.png"])


def finish(cfg, accelerator, run, task, teacher_path):
    """Write generator.safetensors, and metrics.json: with data at hand, compared with them."""
    path = run.path / "generator.safetensors"
    about = dict(kind="generator", sigma_init=cfg.sigma_init, preset=cfg.preset, steps=cfg.steps,
                 teacher=str(Path(teacher_path).resolve()))  # fmt: skip
    if accelerator.is_main_process:
        checkpoints.save(path, task.ema.network.denoiser, **about)
    accelerator.wait_for_everyone()
    log = Path(teacher_path).with_name("metrics.json")
    trained = not cfg.teacher and log.exists()
    metrics = {"preset": cfg.preset, "seed": cfg.seed, "steps": cfg.steps, "status": "finished",
               "teacher_seconds": json.loads(log.read_text())["seconds"] if trained else 0.0,
               "distill_seconds": run.history[-1]["seconds"]}  # fmt: skip
    metrics |= compare(cfg, path, teacher_path) if cfg.data else {}
    if accelerator.is_main_process:
        write_json(run.path / "metrics.json", metrics | {"versions": versions()})
        print(summary(metrics, cfg.out))


def main(cfg):
    """Distil; everything is in cfg.out at the end.  Returns the exit code."""
    check(cfg)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/edm/{cfg.preset}-{cfg.seed}")
    accelerator = make_accelerator(cfg)
    if cfg.teacher:  # a wrong file, here or below, is told before the folder is made
        load_teacher(cfg.teacher, cfg.preset)
    elif not cfg.data:
        raise UserError(f"preset {cfg.preset} needs --teacher: one of NVlabs' edm-cifar10-32x32-*.pkl")
    if cfg.data:
        load_images(cfg.data, resolution=PRESETS[cfg.preset]["network"]["img_resolution"])
    run = Run(cfg, accelerator.is_main_process)
    teacher_path = find_teacher(cfg, accelerator)
    task = build(cfg, accelerator, load_teacher(teacher_path, cfg.preset))
    pictures = plots.Pictures(run, task, *fixed_latents(task.teacher, task.device))
    code = complete(cfg, accelerator, task, run, pictures.look, pictures, "distil")
    if code is None:
        finish(cfg, accelerator, run, task, teacher_path)
    return code or 0


if __name__ == "__main__":
    sys.exit(command_line(main, Distillation, __doc__, presets=DISTILLATIONS))
