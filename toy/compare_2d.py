"""Compare the choices that SIM leaves open, with error bars: Table 4, Figure 2 and the neighbours.

    python toy/compare_2d.py                              # everything: about 40 minutes on two cores
    python toy/compare_2d.py --quick                      # a few arms for a look, a minute or two
    python toy/compare_2d.py --arms default l2 --seeds 9  # these arms, with more seeds
    python toy/compare_2d.py --jobs 0                     # train nothing, report on what there is

An arm changes the settings of toy/train_2d.py that it names and nothing else: all start from the same
teachers and take equally many generator updates of equal batches.  The budget is short, about a third of
the updates that the ring takes by default and a tenth of the grid's.  No learning rate is tuned per arm,
except that `power` comes twice, at the default --lr and, as power-lr, at 0.0005.  Every finished run is a
JSON file in OUT/runs, named by its settings: a study that was stopped, or killed, goes on where it was.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from tqdm import tqdm

from toy import command, train_2d
from toy.config import Config, check, resolve, settings
from toy.files import UserError, lock, read_record, replacing, write_record, write_rows
from toy.mixtures import TARGETS
from toy.study_report import figure_of, row_of, summarise, table

SIM, KARRAS = dict(sigma_distribution="sim"), dict(sigma_distribution="karras")
SID, SIDWGT = dict(method="sid"), dict(weighting="sid")
GROUPS = {  # group -> arm -> what it changes
    "": {"default": {}},
    "distance (default: pseudo-Huber)": {
        "l2": dict(distance="l2"),
        "huber": dict(distance="huber"),
        "exp": dict(distance="exp"),
        "power": dict(distance="power"),
        "power-lr": dict(distance="power", lr=5e-4),
        "l1": dict(distance="l1"),
        "l1-density": dict(distance="l1", method="density"),
    },
    "space (denoised)": {"space-noise": dict(space="noise"), "space-score": dict(space="score")},
    "noise levels (edm)": {
        "sigma-sim": SIM,
        "sigma-karras": KARRAS,
        "sigma-pixart": dict(sigma_distribution="pixart"),
    },
    "weighting (one)": {"weight-sid": SIDWGT, "weight-edm": dict(weighting="edm")},
    "method (SIM)": {
        "full": dict(method="full"),
        "full-l2": dict(method="full", distance="l2"),
        **{f"sid-{alpha:g}": SID | dict(alpha=alpha) for alpha in (0.5, 0.75, 1.0, 1.2)},
        "diff-instruct": dict(method="diff_instruct"),
    },
    "online network (1 update)": {
        "updates-2": dict(fake_updates=2),
        "updates-4": dict(fake_updates=4),
        "exact-fake": dict(fake="exact"),
    },
    "Figure 2, what is not above": {
        "sigma-sim-weight-sid": SIM | SIDWGT,
        "sigma-karras-weight-sid": KARRAS | SIDWGT,
        "sid-sigma-sim": SID | SIM,
        "sid-sigma-karras": SID | KARRAS,
        "sid-sigma-sim-weight-sid": SID | SIM | SIDWGT,
        "sid-sigma-karras-weight-sid": SID | KARRAS | SIDWGT,
        "l2-sigma-sim": SIM | dict(distance="l2"),  # SiD is half of this at alpha = 1
    },
}
ARMS = {arm: changes for arms in GROUPS.values() for arm, changes in arms.items()}
COMMON = dict(width=96, teacher_steps=1500, samples=5000, no_pictures=True)
QUICK = dict(arms=["default", "l2", "sigma-sim", "sid-sigma-sim"], targets=["ring"], seeds=2, steps=150)
QUICK_COMMON = COMMON | dict(teacher_steps=300, samples=1000)
CURVES = ("step", "seconds", "energy_distance")  # what is kept of a run's log


def parse_args(argv=None):
    """Command line -> Namespace.  --quick changes the defaults of the others."""
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="few arms, few steps, one target, small samples")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM",
        help="of %(choices)s (default: all)")  # fmt: skip
    add("--targets", nargs="+", default=["ring", "grid", "letters"], choices=TARGETS, metavar="TARGET",
        help="of %(choices)s (default: ring grid letters)")  # fmt: skip
    add("--seeds", type=int, within="seeds", default=3, help="how many: 0 to SEEDS - 1 (default %(default)s)")
    updates = "generator updates of every run (default %(default)s)"
    add("--steps", type=int, within="count", default=1500, help=updates)
    workers = "worker processes of one thread each; 0: only report (default: as many as cores)"
    add("--jobs", type=int, within="threads", default=os.cpu_count(), help=workers)
    add("--out", default="out/toy/study", help="folder of the study (default %(default)s)")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# The runs.


def plan(args):
    """{(arm, target, seed): Config}, in the order of work: who stops early has whole seeds.

    Raises UserError for settings that no run can have.
    """
    configs, common = {}, QUICK_COMMON if args.quick else COMMON
    for seed in range(args.seeds):
        for target in dict.fromkeys(args.targets):
            for arm in dict.fromkeys(args.arms):
                cfg = resolve(Config(target=target, seed=seed, steps=args.steps, **common | ARMS[arm]))
                name = hashlib.sha256(json.dumps(settings(cfg), sort_keys=True).encode()).hexdigest()[:16]
                cfg = configs[arm, target, seed] = replace(cfg, out=str(Path(args.out) / "runs" / name))
                check(cfg)
    return configs


def record_of(cfg):
    return Path(cfg.out + ".json")


KEPT = {}  # this process's teachers, each with the state in which its training left the random numbers


def kept_teacher(cfg, target, rng):
    """train_2d.train_teacher, once for all arms: none of them changes what it depends on."""
    key = (cfg.target, cfg.seed, cfg.width, cfg.teacher_steps)
    if key not in KEPT:
        KEPT[key] = train_2d.train_teacher(cfg, target, rng), rng.get_state()
    teacher, state = KEPT[key]
    rng.set_state(state)
    return teacher


def run_one(cfg):
    """Train one run and record it: settings, status, and metrics and curves, or why it failed."""
    record = {"settings": settings(cfg)}
    try:
        # One progress bar is enough.
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            metrics = train_2d.main(cfg, kept_teacher)
        with open(Path(cfg.out) / "log.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        log = {name: [float(row[name]) for row in rows] for name in CURVES}
        record |= {"status": metrics["status"], "metrics": metrics, "log": log}
    except OSError:  # a full disk says nothing about the arm
        raise
    except Exception as error:
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    if record["status"] != "interrupted":
        write_record(record_of(cfg), record)
    shutil.rmtree(cfg.out, ignore_errors=True)


def end_with_parent():
    """A worker whose study was killed must not train on beside the next one."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train(configs, jobs):
    """Do the runs that are not recorded yet, in worker processes."""
    todo = [cfg for cfg in configs if not record_of(cfg).exists()]
    if not todo:
        return
    how = {"mp_context": multiprocessing.get_context("spawn"), "initializer": end_with_parent}
    bar = tqdm(total=len(configs), initial=len(configs) - len(todo), desc="study", unit="run", smoothing=0)
    with bar, ProcessPoolExecutor(min(jobs, len(todo)), **how) as pool:
        try:
            for future in as_completed([pool.submit(run_one, cfg) for cfg in todo]):
                future.result()
                bar.update()
        except BrokenProcessPool:
            raise Died("a worker process died; the same command goes on") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():  # their records are whole or absent
                worker.kill()
            raise


# ------------------------------------------------------------------------------------------------
# The report.


def report(args, configs):
    """Write study.csv, study.md and study.png from the records there are; return the summary."""
    out, paths = Path(args.out), {key: record_of(cfg) for key, cfg in configs.items()}
    records = {key: read_record(path) for key, path in paths.items() if path.exists()}
    if not records:
        raise UserError(f"nothing is recorded in {out}/runs for these settings")
    rows = [row_of(key, record) for key, record in records.items()]
    summary = summarise(rows)
    write_rows(out / "study.csv", rows)
    commits = {r["metrics"]["versions"]["commit"] or "unknown" for r in records.values() if "metrics" in r}
    with replacing(out / "study.md") as path:
        path.write_text(table(summary, args.steps, commits), "utf-8")
    with replacing(out / "study.png") as path:
        figure_of(summary, records, GROUPS).savefig(path, dpi=90)
    print(f"{len(rows)} of {len(configs)} runs; look at {out}/study.png, study.md and study.csv")
    return summary


def main(args):
    """Train what is missing, report on all.  Returns `summarise`'s numbers."""
    configs = plan(args)
    if args.jobs:
        (Path(args.out) / "runs").mkdir(parents=True, exist_ok=True)
        held = lock(Path(args.out) / ".lock")  # noqa: F841, until the end
        train(configs.values(), args.jobs)
    return report(args, configs)


class Died(UserError):
    """A worker process ended by a signal of somebody's."""

    code = 1


def cli(argv=None):
    """The command line: returns the exit code."""
    return command.run(lambda: main(parse_args(argv)) and 0, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(cli())
