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
import os
import re
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

from edm import checkpoints, plots
from edm.config import DEVICE, SIGMA_INIT, UserError, command_line, option
from edm.data import one_hot, to_uint8
from edm.device import find_device
from edm.networks import Generator
from edm.sampler import heun, latents

MAX_SEEDS = 10_000_000


@dataclass(frozen=True)
class Settings:
    network: str = option(None, "generator.safetensors, or a teacher: .safetensors or EDM's .pkl",
                          required=True, metavar="FILE")  # fmt: skip
    out: str = option(None, "NAME.png, NAME.npz, or a folder", required=True)
    seeds: str = option("0-63", "one image for each, such as 0-63,100")
    steps: int = option(None, "a teacher's Heun steps (default 18): 2 * steps - 1 evaluations")
    sigma_init: float = option(None, SIGMA_INIT, metavar="SIGMA")
    labels: int = option(None, "class of all images (default: drawn by each seed)", metavar="CLASS")
    batch: int = option(64, "images made before any is written; does not change them")
    device: str = option(*DEVICE)
    precision: str = option("fp32", "what the network computes in", ("fp32", "bf16"))


def parse_seeds(text):
    """ "0-3,7" -> [0, 1, 2, 3, 7].  Raises UserError."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if not match:
            raise UserError(f"--seeds: {part!r} is neither a seed nor a range of seeds, such as 0-63")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds: the range {part} is empty")
        if last - first + len(seeds) >= MAX_SEEDS:
            raise UserError(f"--seeds {text}: more than {MAX_SEEDS:,} images at a time")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed occurs twice")
    return seeds


# ----------------------------------------------------------------------------------------------
# Sampling.


def make_sampler(network, about, steps=18):
    """-> (sample(z, class_labels) -> images (B, C, H, W), float; evaluations of the network per image).

    about: the notes beside the weights; with a sigma_init among them the network is a one-step
    generator, and steps mean nothing; otherwise a denoiser, for `heun`.  class_labels: (B, label_dim),
    one-hot; without classes they have no columns.
    """
    if "sigma_init" not in about:
        return lambda z, class_labels: heun(network, z, steps, class_labels=class_labels), 2 * steps - 1
    sigma_init = about["sigma_init"]
    if type(sigma_init) not in (int, float) or not 0 < sigma_init < math.inf:
        raise UserError(f"the network's sigma_init must be a positive number, got {sigma_init!r}")
    generator = Generator(network, sigma_init)
    return lambda z, class_labels: generator(z, class_labels=class_labels), 1


def sample_batches(sample, network, seeds, batch, label=None, device="cpu"):
    """Yield (seeds, images (B, C, H, W) uint8, class indices (B,) or None), all on the CPU.

    sample: of `make_sampler`, with its network on the device.  label: class of all, else by seed.

    The bits of a convolution depend on how many images go in together (on a CPU by 1e-6, so that of
    1e5 pixels a few truncate to another value).  That number is therefore fixed, 64, or 8 for images of
    32x32 and more on a CPU, where that is as fast; the last call is filled up with zeros.  An image so
    depends on neither batch nor company.  It may still differ between machines and numbers of threads;
    and with a number of threads that does not divide 8 (3 was tried) in its last bits also by its place
    in the call.
    """
    device = torch.device(device)
    size = 8 if device.type == "cpu" and network.img_resolution >= 32 else 64
    for start in range(0, len(seeds), batch):
        some = seeds[start : start + batch]
        z, labels = latents(some, network.shape, network.label_dim)
        if label is not None:
            labels = torch.full((len(z),), label)
        cond = z.new_zeros(len(z), 0) if labels is None else one_hot(labels, network.label_dim)
        chunks = zip(z.split(size), cond.split(size))
        x = torch.cat([fixed_size(sample, *chunk, size, device) for chunk in chunks])
        try:
            images = to_uint8(x).cpu()
        except ValueError as error:
            raise UserError(f"seeds {some[0]} to {some[-1]}: {error}") from None
        yield some, images, labels


@torch.no_grad()
def fixed_size(sample, z, cond, size, device):
    """sample(z, cond) by a call with `size` images: the missing ones are zeros."""
    z_full, cond_full = (torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) for x in (z, cond))
    return sample(z_full.to(device), cond_full.to(device))[: len(z)]


# ----------------------------------------------------------------------------------------------
# What is written.


def kind_of(out):
    return {".png": "grid", ".npz": "arrays"}.get(Path(out).suffix.lower(), "folder")


def save_folder(out, seeds, images):
    """PNGs in folders of a thousand seeds, named as EDM does."""
    for seed, image in zip(seeds, images):
        path = Path(out) / f"{seed - seed % 1000:06d}" / f"{seed:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(path)


def save_file(out, seeds, images, labels):
    """One file of everything, atomically."""
    with checkpoints.replacing(out) as path:
        if kind_of(out) == "grid":
            plots.grid(images, columns=math.ceil(math.sqrt(len(images)))).save(path)
        else:
            arrays = {"images": images.permute(0, 2, 3, 1).numpy(), "seeds": np.array(seeds)}
            np.savez(path, **arrays, **({} if labels is None else {"labels": labels.numpy()}))


# ----------------------------------------------------------------------------------------------


def check(cfg):
    """What can be refused before anything is read."""
    out, processes = Path(cfg.out), int(os.environ.get("WORLD_SIZE", 1))
    if out.exists() and not (kind_of(out) == "folder" and out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already, and nothing is overwritten; choose another --out")
    for name in ("batch", "steps"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(cfg, name)}")
    find_device(cfg.device)
    if processes > 1 and kind_of(out) != "folder":
        raise UserError(f"{out}: {processes} processes write into a folder only")


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
