"""Look at runs of toy/train_2d.py as one looks at a film: one HTML file that needs nothing else.

    python toy/explore.py out/toy/ring                              # out/toy/ring/explore.html
    python toy/explore.py out/toy/ring out/toy/ring-distance_l1 --out sim-and-l1.html

A slider over training moves the samples, the arrows of target, teacher and online network at a noise
level, and a cursor on the log's curves; several runs stand beside each other, at the same step.
Frames are those of the log, read from the run's checkpoint: so also of a run that is still training.
"""

import base64
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch

from toy import command, plots
from toy.config import Config
from toy.files import UserError, check_ours, naming, replacing
from toy.folder import Folder
from toy.logbook import N_LOG
from toy.metrics import SIGMAS, energy_floor, mean_distance
from toy.mixtures import make_target
from toy.train_2d import make_denoiser

TEMPLATE, SCRIPT = (Path(__file__).with_suffix(suffix) for suffix in (".html", ".js"))
SCALE = 8192  # positions are sixteen-bit integers: steps of 1 / SCALE, and what is beyond +-4 stays there
COLUMNS = "step energy_distance high_quality modes_covered modes generator_gradient fake_gradient".split()
COLUMNS += [f"{name}_{sigma:g}" for name in ("divergence", "gap", "fake_error") for sigma in SIGMAS]
SHOWN = ("target", "method", "distance", "seed")  # of one run's settings; of several, where they differ


def packed(positions):
    """A tensor -> text."""
    whole = (positions.detach().cpu() * SCALE).round().clamp(-(2**15), 2**15 - 1)
    return base64.b64encode(whole.numpy().astype("<i2").tobytes()).decode()


def short(value):
    """Four digits, or nothing: JSON has no nan."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def read(folder):
    """A run's folder -> (its Config, its checkpoint).  UserError of one line for anything else."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: not the folder of a run of toy/train_2d.py")
    with naming(folder / "config.json"):
        cfg = Config(**json.loads((folder / "config.json").read_text("utf-8")) | {"device": "cpu"})
        command.check_ranges(cfg)
    state = Folder(folder, {}).load(say=lambda text: print(text, file=sys.stderr))
    if state is None:
        raise UserError(f"{folder} has no checkpoint, which keeps the frames: nothing to look at yet")
    return cfg, state


@torch.no_grad()
def film(cfg, state):
    """What the page shows of a run, for JSON."""
    target = make_target(cfg.target)
    network = make_denoiser(cfg, target)
    network.load_state_dict(state["teacher"])
    points = plots.field_points()
    field = lambda denoiser: torch.stack([denoiser(points, torch.full((len(points),), s)) for s in SIGMAS])
    data = target.sample(N_LOG, torch.Generator().manual_seed(cfg.seed + 1))  # the log's own, on a CPU
    exact, frames = field(target.denoiser), state["snapshots"]
    if not all("fields" in frame for frame in frames):
        raise UserError("of an older toy/train_2d.py, which kept no arrows: make the run again")
    return {
        "steps": cfg.steps,
        "floor": energy_floor(N_LOG, N_LOG, mean_distance(data, data)),
        "rows": {name: [short(row[name]) for row in state["history"]] for name in COLUMNS},
        "data": packed(data),
        "target": packed(exact),
        "teacher": packed(exact if cfg.teacher == "exact" else field(network)),
        "samples": packed(torch.stack([frame["samples"] for frame in frames])),
        "online": packed(torch.stack([frame["fields"] for frame in frames])),
    }


def page(folders):
    """Folders of runs -> the page's text."""
    runs = [read(folder) for folder in folders]
    names = [Path(folder).resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    settings = [vars(cfg) for cfg, _ in runs]
    shown = [k for k in settings[0] if len({str(s[k]) for s in settings}) > 1 and k != "out"] or SHOWN
    about = ["; ".join(f"{k.replace('_', ' ')} {s[k]}" for k in shown) for s in settings]
    content = {"sigmas": SIGMAS, "limit": plots.LIMIT, "scale": SCALE, "runs": []}
    for folder, run, name, words in zip(folders, runs, names, about):
        with naming(Path(folder) / "checkpoints"):
            content["runs"].append({"name": name, "about": words} | film(*run))
    noise = torch.randn(N_LOG, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    content |= {"points": packed(plots.field_points()), "noise": packed(noise)}
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # no </script> in a name
    template, script = TEMPLATE.read_text("utf-8"), SCRIPT.read_text("utf-8")
    return template.replace("@SCRIPT@", script).replace("@FILM@", text)


def main(argv=None):
    parser = command.Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder; several are compared")
    parser.add_argument("--out", metavar="FILE.html", help="(default explore.html in the first folder)")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.folders[0]) / "explore.html")
    text = page(args.folders)
    check_ours(out, 'content="toy/explore.py"')
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text) / 1e6:.1f} MB; open it in a browser")


def cli(argv=None):
    """The command line: returns the exit code."""
    return command.run(lambda: main(argv))


if __name__ == "__main__":
    sys.exit(cli())
