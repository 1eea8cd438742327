"""Studies on digits, small enough for a CPU: arms that differ in what they name, on several seeds.

    python edm/compare_digits.py                                   # Figure 2: SIM and SiD, levels, w_SiD
    python edm/compare_digits.py --arms default bf16 --steps 760   # these arms, as long as the preset takes
    python edm/compare_digits.py --task text --arms b3 --steps 900 # B.3's levels, and weight 1 of which loss
    python edm/compare_digits.py --arms means widths               # of log-normal levels
    python edm/compare_digits.py --arms start                      # sigma_init
    python edm/compare_digits.py --seeds 1 --first-seed 7          # another seed than 0, 1, 2
    python edm/compare_digits.py --jobs 0                          # train nothing, report on what there is

An arm is the digits preset of distill.py or, with captions, of distill_pixart.py, shorter, with the settings
that it names and no others: no learning rate is tuned for it.  All arms of a seed start from one teacher, and
see the same latents.  Scores are of the moving average's one-step samples, at a few instants of the training:
the Frechet distance in the features of a classifier of the data, precision, recall, brightness, with captions
how many are read, and how much pictures of fixed latents changed since the score before.  A study that was
stopped, or killed, goes on where it was.
"""

import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import numpy as np
from accelerate import PartialState

from edm import evaluate, train_teacher
from edm.config import (
    DISTILLATIONS,
    LEAST_IMAGES,
    TEACHERS,
    TEXT_DISTILLATIONS,
    Distillation,
    TeacherTraining,
    TextDistillation,
    check,
    fitting,
    settings,
)
from edm.distill import Images
from edm.distill_pixart import Prompts
from edm.images.data import load_images, to_uint8
from edm.images.sampler import heun
from edm.quality.arms import ARMS, GROUPS, PANELS
from edm.quality.captions import by_teacher
from edm.quality.judge import Judge
from edm.quality.study_report import SCORES, figure_of, final, table
from edm.training.loop import Diverged, train
from edm.training.run import Run
from edm.training.trainee import make_accelerator
from edm.training.workers import work_off
from toy import command
from toy.files import UserError, lock, naming, read_record, replacing, versions, write_record, write_rows

LOOKS = 6  # scores of a run

# ------------------------------------------------------------------------------------------------
# What differs from one task to the other.


def study_of(cfg):
    return Path(cfg.out).parents[1]


class ImageTask(Images):
    """judge(task) -> score("student" or "teacher", network); floor: what two halves of the data have."""

    cls, presets, preset, steps, out = Distillation, DISTILLATIONS, "digits", 300, "out/edm/study"
    ten, sample = slice(10), staticmethod(heun)  # of the pictures, one per class; of the teacher

    def judge(self, task):
        kept = dict(classifier=str(study_of(self.cfg) / "classifier.safetensors"), samples=self.cfg.samples)
        cfg = evaluate.filled(evaluate.Settings(data="digits", **kept))
        judge = Judge(cfg, load_images("digits"), PartialState())
        self.floor = judge.floor()["fd"]

        def score(who, network):
            if who == "student":
                return judge(who, network.denoiser, {"sigma_init": network.sigma_init})
            return judge(who, network, {})

        return score


class TextTask(Prompts):
    cls, presets, preset = TextDistillation, TEXT_DISTILLATIONS, "pixart-digits"
    steps, out = 400, "out/edm/study-text"
    ten = slice(None, None, 4)  # of four wordings each

    @staticmethod
    def sample(network, z, **caption):
        return by_teacher(network)(z, **caption)

    def judge(self, task):
        reader = self.reader(task.shape, study_of(self.cfg) / "classifier.safetensors")
        self.floor = reader.floor
        return lambda who, network: reader(network if who == "student" else by_teacher(network))


TASKS = {"image": ImageTask, "text": TextTask}


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="image", help="digits, or digits with captions (default image)")
    add("--arms", nargs="+", default=["figure2"], choices=[*GROUPS, *ARMS], metavar="ARM",
        help=f"groups, {', '.join(GROUPS)}, or arms of edm/quality/arms.py (default figure2)")  # fmt: skip
    add("--seeds", type=int, within="seeds", default=3, help="how many (default %(default)s)")
    add("--steps", type=int, within="count", help="of every distillation (default 300; text: 400)")
    add("--teacher-steps", type=int, within="count", help="of every teacher (default: the preset's)")
    behind = "behind every score (default %(default)s)"
    add("--samples", type=int, within=command.at_least(LEAST_IMAGES), default=1797, help=behind)
    add("--first-seed", type=int, within="seed", default=0, help="of them (default %(default)s)")
    workers = "worker processes of one thread each; 0: only report (default: as many as cores)"
    add("--jobs", type=int, within="threads", default=os.cpu_count(), help=workers)
    add("--out", help="folder of the study (default out/edm/study; text: out/edm/study-text)")
    args = parser.parse_args(argv)
    args.steps, args.out = args.steps or TASKS[args.task].steps, args.out or TASKS[args.task].out
    args.arms = list(dict.fromkeys(arm for name in args.arms for arm in GROUPS.get(name, [name])))
    return args


# ------------------------------------------------------------------------------------------------
# The runs.


def plan(args):
    """{(arm, seed): settings}, {seed: TeacherTraining}.  UserError for what no run can have."""
    out, task, common = Path(args.out), TASKS[args.task], dict(threads=1, resume=True, keep=1)
    preset, teachers, students = task.preset, {}, {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        given = TEACHERS[preset] | common | dict(preset=preset, seed=seed)
        given |= dict(steps=args.teacher_steps) if args.teacher_steps else {}
        teachers[seed] = TeacherTraining(**given, out=str(out / f"teacher-{seed}"))
        check(teachers[seed])
        for arm in args.arms:
            given = fitting(task.presets[preset], **ARMS[arm]) | common | ARMS[arm]
            given |= dict(preset=preset, seed=seed, steps=args.steps, samples=args.samples)
            given["every"] = math.ceil(args.steps / LOOKS) * given["batch"]  # no short one at the end
            given |= dict(teacher=str(Path(teachers[seed].out) / task.teacher_file))
            students[arm, seed] = task.cls(**given, out=str(out / f"runs/{arm}-{seed}"))
            check(students[arm, seed])
    return students, teachers


def scores_path(cfg):
    return Path(cfg.out) / "scores.json"


def read_scores(cfg):
    """{"settings": ..., "status": ..., "scores": {step: numbers}} of a run that ended, or None."""
    path = scores_path(cfg)
    record = read_record(path, cfg.out) if path.exists() else None
    if record and any(record["settings"].get(k) != v for k, v in recorded(cfg).items()):
        raise UserError(f"{cfg.out} holds a run of other settings; choose another --out")
    return record if record and record["status"] != "training" else None


def recorded(cfg):
    """What decides a run's scores, ready for JSON."""
    samples = {} if isinstance(cfg, TeacherTraining) else {"samples": cfg.samples}
    return json.loads(json.dumps(settings(cfg) | samples))


def read_looks(folder):
    """{step: pictures of fixed latents, (N, C, H, W) uint8}, in the order of the steps."""
    path = Path(folder) / "looks.npz"
    with naming(path):
        return {int(step): images for step, images in np.load(path).items()} if path.exists() else {}


def write_looks(folder, looks):
    with replacing(Path(folder) / "looks.npz") as path:
        np.savez_compressed(path, **{str(step): images for step, images in looks.items()})


def begin(cfg):
    """A distillation with these settings -> accelerator, its parts, its task, score(who, network)."""
    accelerator = make_accelerator(cfg)
    parts = next(task for task in TASKS.values() if task.cls is type(cfg))(cfg, accelerator)
    task = parts.build()
    return accelerator, parts, task, parts.judge(task)


def judged_teacher(cfg, student):
    """Train the teacher, then score it and the data's two halves.  student: settings of one of its own."""
    if train_teacher.main(cfg) not in (0, 130):
        raise UserError(f"the teacher in {cfg.out} failed")
    if Path(student.teacher).exists():  # else a signal came
        _, parts, task, score = begin(student)
        record = {"settings": recorded(cfg), "status": "finished", "floor_fd": parts.floor}
        pictures = parts.pictures(None, task)
        images = pictures.decode(parts.sample(task.teacher, pictures.z, **pictures.cond))
        write_looks(cfg.out, {cfg.steps: to_uint8(images.cpu()).numpy()})
        write_record(scores_path(cfg), record | {"scores": {cfg.steps: score("teacher", task.teacher)}})


def judged_student(cfg):
    """Distil as the command does, and score the moving average wherever that would draw pictures."""
    accelerator, parts, task, score = begin(cfg)
    run = Run(cfg)
    pictures, looks = parts.pictures(run, task), read_looks(cfg.out)
    path, record = scores_path(cfg), {"settings": recorded(cfg), "status": "training", "scores": {}}
    if path.exists():
        record = read_record(path, cfg.out)

    def picture(step):
        if step % (cfg.every // cfg.batch) and step != cfg.steps:
            return  # stopped in between: no run has a score that the others lack
        looks[step] = to_uint8(pictures.decode(pictures.samples()).cpu()).numpy()
        try:
            record["scores"][str(step)] = score("student", task.ema.network)
        except UserError as error:  # not a picture: what `train` takes for divergence
            raise ValueError(str(error)) from None
        write_looks(run.path, looks)
        write_record(path, record)

    try:
        status = train(cfg, accelerator, task, run, pictures.look, picture, "distil")
    except Diverged as error:
        status, record["error"] = "diverged", str(error)
    if status != "interrupted":
        write_record(path, record | {"status": status, "versions": versions()})


# ------------------------------------------------------------------------------------------------
# The report.


def rows_of(students, teachers):
    """Lines of study.csv, one for each score, of the runs that ended."""
    rows = []
    for (arm, seed), cfg in ({("teacher", s): c for s, c in teachers.items()} | students).items():
        if record := read_scores(cfg):
            looks, before = read_looks(cfg.out), None
            for step, scores in record["scores"].items():
                row = {"arm": arm, "seed": seed, "status": record["status"], "step": int(step)}
                row |= {name: scores[name] for name in SCORES if name in scores}
                now = looks[int(step)].astype(float) / 255
                row["change"] = np.nan if before is None else np.square(now - before).mean() ** 0.5
                before = now
                rows.append(row)
    return rows


def report(args, students, teachers):
    """Write study.csv, study.md and study.png from the records there are; return `final`'s numbers."""
    out, rows, first = Path(args.out), rows_of(students, teachers), args.first_seed
    if not {row["arm"] for row in rows} > {"teacher"}:
        raise UserError(f"nothing is recorded in {out} for these settings")
    floor = read_record(scores_path(teachers[first]))["floor_fd"]
    write_rows(out / "study.csv", rows)
    found = final(rows)
    with replacing(out / "study.md") as path:
        path.write_text(table(found, floor, args, teachers[first].steps), "utf-8")
    folders = {"teacher": teachers[first].out}
    folders |= {arm: c.out for (arm, seed), c in students.items() if seed == first}
    looks = {arm: looks for arm, folder in folders.items() if (looks := read_looks(folder))}
    pictures = {arm: [*seen.values()][-1][TASKS[args.task].ten] for arm, seen in looks.items()}
    with replacing(out / "study.png") as path:
        figure_of(rows, floor, pictures, PANELS).savefig(path, format="png")
    done = len({(row["arm"], row["seed"]) for row in rows if row["arm"] != "teacher"})
    print(f"{done} of {len(students)} runs; look at {out}/study.png, study.md and study.csv")
    return found


def main(args):
    """Train what is missing, report on all.  Returns `final`'s numbers."""
    students, teachers = plan(args)
    if args.jobs:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        held = lock(Path(args.out) / ".lock")  # noqa: F841, until the end
        some = {seed: cfg for (_, seed), cfg in students.items()}
        todo = [(judged_teacher, cfg, some[seed]) for seed, cfg in teachers.items() if not read_scores(cfg)]
        work_off(args.jobs, "teachers", todo)
        work_off(args.jobs, "study", [(judged_student, c) for c in students.values() if not read_scores(c)])
    return report(args, students, teachers)


def cli(argv=None):
    """The command line: returns the exit code."""
    return command.run(lambda: main(parse_args(argv)) and 0, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(cli())
