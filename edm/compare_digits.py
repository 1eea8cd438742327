"""Figure 2's comparison on real images, small enough for a CPU: SIM and SiD, two noise levels, w_SiD or not.

    python edm/compare_digits.py                                   # 13 arms, 3 seeds; 11 take 40 minutes
    python edm/compare_digits.py --arms default bf16 --steps 760   # these arms, as long as the preset takes
    python edm/compare_digits.py --jobs 0                          # train nothing, report on what there is

An arm is the digits preset of distill.py, shorter, with the settings that it names and no others: no
learning rate is tuned for it.  All arms of a seed start from one teacher, and see the same latents.  The
score is the Fréchet distance of the moving average's one-step samples in the features of evaluate.py's
classifier, at a few instants of the training.  A study that was stopped, or killed, goes on where it was.
"""

import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from accelerate import PartialState
from tqdm import tqdm

from edm import distill, evaluate, train_teacher
from edm.config import (
    DISTILLATIONS,
    LEAST_IMAGES,
    TEACHERS,
    Distillation,
    TeacherTraining,
    check,
    fitting,
    settings,
)
from edm.images import checkpoints
from edm.images.data import load_images
from edm.images.sampler import fixed_latents, heun
from edm.quality.judge import Judge
from edm.quality.study_report import SCORES, figure_of, final, table
from edm.training import plots
from edm.training.loop import Diverged, train
from edm.training.run import Run
from edm.training.trainee import make_accelerator
from toy import command
from toy.files import UserError, lock, replacing, versions, write_json, write_rows

METHODS = {"sim": {}, "sid": dict(method="sid")}  # SiD with its alpha of 1.2
FIGURE2 = {  # title of the panel -> its arms
    title: {
        f"{method}-{levels}{mark}": METHODS[method] | dict(sigma_distribution=sigma) | weighting
        for method in METHODS
        for mark, weighting in (("", {}), ("-w", dict(weighting="sid")))
    }
    for levels, sigma, title in (("lognormal", "sim", "log-normal levels (B.10)"),
                                 ("karras", "karras", "Karras' levels (SiD)"))
}  # fmt: skip
ARMS = {arm: changes for arms in FIGURE2.values() for arm, changes in arms.items()}
ARMS |= {"default": {}, "bf16": dict(precision="bf16"), "no-share": dict(share=False)}
ARMS |= {"full": dict(method="full"), "full-l2": dict(method="full", distance="l2")}
LOOKS = 6  # scores of a run


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM",
        help="of %(choices)s (default: all); -w is with w_SiD")  # fmt: skip
    add("--seeds", type=int, within="many", default=3, help="how many: 0 to SEEDS - 1 (default %(default)s)")
    add("--steps", type=int, within="count", default=300, help="of every distillation (default %(default)s)")
    teachers, behind = (
        f"{what} (default %(default)s)" for what in ("of every teacher", "behind every score")
    )
    add("--teacher-steps", type=int, within="count", default=1000, help=teachers)
    add("--samples", type=int, within=command.at_least(LEAST_IMAGES), default=1797, help=behind)
    workers = "worker processes of one thread each; 0: only report (default: as many as cores)"
    add("--jobs", type=int, within="threads", default=os.cpu_count(), help=workers)
    add("--out", default="out/edm/study", help="folder of the study (default %(default)s)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# The runs.


def plan(args):
    """{(arm, seed): Distillation} and {seed: TeacherTraining}.  UserError for what no run can have."""
    out, common = Path(args.out), dict(threads=1, resume=True, keep=1)
    teacher, student = TEACHERS["digits"], DISTILLATIONS["digits"]
    teachers, students = {}, {}
    for seed in range(args.seeds):
        given = teacher | common | dict(seed=seed, steps=args.teacher_steps)
        teachers[seed] = TeacherTraining(**given, out=str(out / f"teacher-{seed}"))
        check(teachers[seed])
        for arm in dict.fromkeys(args.arms):
            given = fitting(student, **ARMS[arm]) | common | ARMS[arm]
            given |= dict(seed=seed, steps=args.steps, samples=args.samples)
            given["every"] = max(1, args.steps // LOOKS) * given["batch"]
            given |= dict(teacher=str(out / f"teacher-{seed}/teacher.safetensors"))
            students[arm, seed] = Distillation(**given, out=str(out / f"runs/{arm}-{seed}"))
            check(students[arm, seed])
    return students, teachers


def scores_path(cfg):
    return Path(cfg.out) / "scores.json"


def read_scores(cfg):
    """{"settings": ..., "status": ..., "scores": {step: numbers}} of a run that ended, or None."""
    path = scores_path(cfg)
    try:
        record = json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        raise UserError(f"{path} is damaged; remove {cfg.out}, and its run will be repeated") from None
    if record and any(record["settings"].get(k) != v for k, v in recorded(cfg).items()):
        raise UserError(f"{cfg.out} holds a run of other settings; choose another --out")
    return record if record and record["status"] != "training" else None


def make_judge(study, samples):
    """Scores of a network's samples against the digits."""
    kept = dict(classifier=str(study / "classifier.safetensors"), samples=samples)
    cfg = evaluate.filled(evaluate.Settings(data="digits", **kept))
    return Judge(cfg, load_images("digits"), PartialState())


def recorded(cfg):
    """What decides a run's scores, ready for JSON."""
    samples = {"samples": cfg.samples} if isinstance(cfg, Distillation) else {}
    return json.loads(json.dumps(settings(cfg) | samples))


def judged_teacher(cfg, samples):
    """Train the teacher, then score it and the data's two halves."""
    if train_teacher.main(cfg) not in (0, 130):
        raise UserError(f"the teacher in {cfg.out} failed")
    path = Path(cfg.out) / "teacher.safetensors"
    if path.exists():  # else a signal came
        judge, (network, about) = make_judge(Path(cfg.out).parent, samples), checkpoints.load(path)
        scores = {cfg.steps: judge("teacher", network, about)}
        z, cond = fixed_latents(network, "cpu", rows=1)
        plots.save_grid(Path(cfg.out) / "ten.png", heun(network, z, **cond))
        record = {"settings": recorded(cfg), "status": "finished", "scores": scores}
        write_json(scores_path(cfg), record | {"floor_fd": judge.floor()["fd"]})


def judged_student(cfg):
    """Distil as distill.py does, and score the moving average wherever that would draw pictures."""
    accelerator = make_accelerator(cfg)
    run = Run(cfg)
    task = distill.build(cfg, accelerator, checkpoints.load(cfg.teacher)[0].without_augmentation())
    pictures = plots.Pictures(run, task, *fixed_latents(task.teacher, task.device, rows=1))
    judge = make_judge(Path(cfg.out).parents[1], cfg.samples)
    path, record = scores_path(cfg), {"settings": recorded(cfg), "status": "training", "scores": {}}
    if path.exists():
        record = json.loads(path.read_text())

    def picture(step):
        if step % (cfg.every // cfg.batch) and step != cfg.steps:
            return  # stopped in between: no run has a score that the others lack
        about = {"sigma_init": cfg.sigma_init}
        try:
            record["scores"][str(step)] = judge("student", task.ema.network.denoiser, about)
        except UserError as error:  # not a picture: what `train` takes for divergence
            raise ValueError(str(error)) from None
        write_json(path, record)
        plots.save_grid(run.path / "ten.png", pictures.samples())

    try:
        status = train(cfg, accelerator, task, run, pictures.look, picture, "distil")
    except Diverged as error:
        status, record["error"] = "diverged", str(error)
    if status != "interrupted":
        write_json(path, record | {"status": status, "versions": versions()})


class Stopped(UserError):
    """A worker ended with an exit code, having said why if it could."""

    code = 1


def quietly(work, *args):
    """What a worker process does: the work without its progress bars.  Errors of the user's: one line."""

    def end_with_parent():  # a worker whose study was killed must not train on beside the next one
        multiprocessing.parent_process().join()
        os._exit(1)

    def silent():
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, as long as the process
        with redirect_stderr(nowhere), redirect_stdout(nowhere):
            work(*args)

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(command.run(silent))


def in_a_process(*work):
    """Each in a fresh one: accelerate's state lasts as long as its process.  Returns the exit code."""
    process = multiprocessing.get_context("spawn").Process(target=quietly, args=work)
    process.start()
    process.join()
    return process.exitcode


def work_off(jobs, name, todo):
    """Do todo, a list of (function, *arguments), `jobs` at a time.  Raises Stopped where one fails."""
    bar = tqdm(total=len(todo), desc=name, unit="run", smoothing=0, disable=not todo)
    with bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(in_a_process, *work) for work in todo]):
                if code := future.result():
                    raise Stopped(f"a run failed ({code}); the same command goes on")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # SIGTERM: they save, and end
            raise


# ------------------------------------------------------------------------------------------------
# The report.


def rows_of(students, teachers):
    """Lines of study.csv, one for each score, of the runs that ended."""
    rows = []
    for (arm, seed), cfg in ({("teacher", s): c for s, c in teachers.items()} | students).items():
        if record := read_scores(cfg):
            for step, scores in record["scores"].items():
                row = {"arm": arm, "seed": seed, "status": record["status"], "step": int(step)}
                rows.append(row | {name: scores[name] for name in SCORES})
    return rows


def report(args, students, teachers):
    """Write study.csv, study.md and study.png from the records there are; return `final`'s numbers."""
    out, rows = Path(args.out), rows_of(students, teachers)
    if not {row["arm"] for row in rows} > {"teacher"}:
        raise UserError(f"nothing is recorded in {out} for these settings")
    floor = json.loads(scores_path(teachers[0]).read_text())["floor_fd"]
    write_rows(out / "study.csv", rows)
    found = final(rows)
    with replacing(out / "study.md") as path:
        path.write_text(table(found, floor, args))
    folders = {arm: Path(cfg.out) for (arm, seed), cfg in students.items() if seed == 0}
    folders |= {"teacher": Path(teachers[0].out)}
    pictures = {arm: folder / "ten.png" for arm, folder in folders.items() if (folder / "ten.png").exists()}
    with replacing(out / "study.png") as path:
        figure_of(rows, floor, pictures, FIGURE2).savefig(path, format="png")
    done = len({(row["arm"], row["seed"]) for row in rows if row["arm"] != "teacher"})
    print(f"{done} of {len(students)} runs; look at {out}/study.png, study.md and study.csv")
    return found


def main(args):
    """Train what is missing, report on all.  Returns `final`'s numbers."""
    students, teachers = plan(args)
    if args.jobs:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        held = lock(Path(args.out) / ".lock")  # noqa: F841, until the end
        todo = [(judged_teacher, cfg, args.samples) for cfg in teachers.values() if not read_scores(cfg)]
        work_off(args.jobs, "teachers", todo)
        work_off(args.jobs, "study", [(judged_student, c) for c in students.values() if not read_scores(c)])
    return report(args, students, teachers)


def cli(argv=None):
    """The command line: returns the exit code."""
    return command.run(lambda: main(parse_args(argv)) and 0, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(cli())
