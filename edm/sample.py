"""Draw images from a one-step generator, or from a teacher by EDM's many-step sampler.

    python edm/sample.py --network out/edm/digits/generator.safetensors --out digits.png
    python edm/sample.py --network generator.safetensors --seeds 0-49999 --out samples
    python edm/sample.py --network edm-cifar10-32x32-cond-vp.pkl --seeds 0-63,100 --labels 3 --out cats.npz
    python edm/sample.py --network sid-cifar10-cond.pkl --sigma-init 2.5 --out sid.png
    torchrun --nproc-per-node 4 edm/sample.py ... --out samples

--out NAME.png is one picture of all images, NAME.npz holds `images` (N, H, W, C) uint8, `seeds` and, if
there are classes, `labels`; any other name is a folder of single PNGs, 000000/000063.png for seed 63.
The image of a seed does not depend on the other seeds, nor on --batch.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from edm.config import DEVICE, SIGMA_INIT, command_line
from edm.device import find_device, processes
from edm.images import checkpoints
from edm.images.sampler import make_sampler, parse_seeds, sample_batches
from edm.training import plots
from toy.command import check_ranges, option
from toy.files import UserError, check_new, naming, replacing


@dataclass(frozen=True)
class Settings:
    network: str = option(None, "generator.safetensors, or a teacher: .safetensors or EDM's .pkl",
                          required=True, metavar="FILE")  # fmt: skip
    out: str = option(None, "NAME.png, NAME.npz, or a folder", required=True)
    seeds: str = option("0-63", "one image for each, such as 0-63,100")
    steps: int = option(None, "a teacher's Heun steps (default 18): 2 * steps - 1 evaluations", within="many")
    sigma_init: float = option(None, SIGMA_INIT, metavar="SIGMA", within="positive")
    labels: int = option(None, "class of all images (default: drawn by each seed)", metavar="CLASS")
    batch: int = option(64, "images made before any is written; does not change them", within="many")
    device: str = option(*DEVICE)
    precision: str = option("fp32", "what the network computes in", ("fp32", "bf16"))


def kind_of(out):
    return {".png": "grid", ".npz": "arrays"}.get(Path(out).suffix.lower(), "folder")


def save_folder(out, seeds, images):
    """PNGs in folders of a thousand seeds, named as EDM does."""
    for seed, image in zip(seeds, images):
        path = Path(out) / f"{seed - seed % 1000:06d}" / f"{seed:06d}.png"
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(path)


def save_file(out, seeds, images, labels):
    """One file of everything, atomically."""
    with replacing(out) as path:
        if kind_of(out) == "grid":
            plots.grid(images, columns=math.ceil(math.sqrt(len(images)))).save(path)
        else:
            arrays = {"images": images.permute(0, 2, 3, 1).numpy(), "seeds": np.array(seeds)}
            np.savez(path, **arrays, **({} if labels is None else {"labels": labels.numpy()}))


def check(cfg):
    """What can be refused before anything is read."""
    check_ranges(cfg)
    out, several = Path(cfg.out), processes()
    check_new(out, folder=kind_of(out) == "folder")
    find_device(cfg.device)
    if several > 1 and kind_of(out) != "folder":
        raise UserError(f"{out}: {several} processes write into a folder only")


def check_network(cfg, network, about):
    """What the network must be for these settings."""
    classes = network.label_dim
    if cfg.labels is not None and not classes:
        raise UserError(f"{cfg.network}: has no classes, so --labels does not apply")
    if cfg.labels is not None and not 0 <= cfg.labels < classes:
        raise UserError(f"--labels must be from 0 to {classes - 1} for {cfg.network}, got {cfg.labels}")
    if cfg.steps is not None and "sigma_init" in about:
        raise UserError(f"{cfg.network}: a one-step generator, so --steps does not apply")
    channels = network.img_channels
    if kind_of(cfg.out) != "arrays" and channels not in (1, 3):
        raise UserError(f"{cfg.out}: a PNG has 1 or 3 channels, but {cfg.network} makes {channels}")


def draw(cfg, batches, total, quiet):
    """Make and write the images -> [(images of a batch, seconds to make them), ...]."""
    pace, all_seeds, all_images, all_labels = [], [], [], []
    with tqdm(total=total, unit="image", disable=quiet) as bar:
        start = time.perf_counter()
        for seeds, images, labels in batches:
            pace.append((len(seeds), time.perf_counter() - start))
            if kind_of(cfg.out) == "folder":
                save_folder(cfg.out, seeds, images)
            else:
                all_seeds += seeds
                all_images.append(images)
                all_labels += [] if labels is None else [labels]
            bar.update(len(seeds))
            start = time.perf_counter()
    if all_seeds:
        save_file(cfg.out, all_seeds, torch.cat(all_images), torch.cat(all_labels) if all_labels else None)
    return pace


def speed(pace):
    """Words for images per second, without the first batch if there are others: it warms up."""
    counted = pace[1:] or pace
    rate = sum(n for n, _ in counted) / sum(seconds for _, seconds in counted)
    if len(pace) == 1:
        return f"{rate:.3g} images/s, warming up included"
    return f"{rate:.3g} images/s after a first batch of {pace[0][0]} in {pace[0][1]:.1f} s"


def main(cfg):
    """Draw the images and write them."""
    check(cfg)
    seeds = parse_seeds(cfg.seeds)
    network, about = checkpoints.load(cfg.network, cfg.sigma_init)
    check_network(cfg, network, about)
    state = PartialState(cpu=find_device(cfg.device) == "cpu")
    state.wait_for_everyone()  # else one could find the folder that another has made
    folder = Path(cfg.out) if kind_of(cfg.out) == "folder" else Path(cfg.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process and not {"sigma_init", "kind"} & about.keys():
        print(f"{cfg.network} names no sigma_init: sampled as a teacher, in many steps; if it is a one-step "
              "generator, it needs --sigma-init", file=sys.stderr)  # fmt: skip
    device = state.device
    sample, evaluations = make_sampler(network.to(device), about, cfg.steps or 18)
    mine = seeds[state.process_index :: state.num_processes]
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        batches = sample_batches(sample, network, mine, cfg.batch, cfg.labels, device)
        pace = draw(cfg, batches, len(mine), not state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        each = " in each process" if state.num_processes > 1 else ""
        print(f"{speed(pace)}{each}; {evaluations} evaluation{'s'[: evaluations > 1]} per image")
        print(f"wrote {len(seeds)} image{'s'[: len(seeds) > 1]} to {cfg.out}")


if __name__ == "__main__":
    sys.exit(command_line(main, Settings, __doc__))
