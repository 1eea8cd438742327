"""Is my teacher plugged in right?  What goes wrong when a network becomes a denoiser, found in a minute.

    python edm/check_teacher.py edm/example_teacher.py               # a file of yours: this one says how
    python edm/check_teacher.py teacher.safetensors --data digits    # of ours, or EDM's .pkl
    python edm/check_teacher.py pipeline --data digits               # text to image: folder or hub name

A line for each check, ok or WRONG with what to do, and a picture of the denoising error.  The exit code is
0 if all is right, 1 if something is wrong.  FILE.py is a program, and is run.  Most checks need data: those
that the teacher was trained on.
"""

import math
import runpy
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from edm.config import DEVICE
from edm.device import find_device
from edm.images import checkpoints
from edm.images.data import load_fitting, load_images, one_hot, to_network
from edm.images.networks import per_sample
from edm.quality import checks, wiring
from edm.text import pixart_files
from edm.text.flow import denoiser_of
from edm.text.joint import text_encoder
from edm.text.pixart import Guided, encode
from edm.text.pretrained import quiet
from edm.text.sampler import FIGURE3, find_prompts
from toy.command import Parser, add_options, check_ranges, option, run
from toy.files import UserError, check_ours, replacing

MOST = 4096  # images that the data's mean and spread are taken from
MARK = "edm/check_teacher.py"  # in the picture


@dataclass(frozen=True)
class Settings:
    data: str = option(None, '"digits", or a data set\'s path; FILE.py may bring its own')
    out: str = option("check_teacher.png", "the picture, written over one of its own", metavar="NAME.png")
    images: int = option(None, "samples per noise level (default: by their size, 8 to 256)", within="many")
    seconds: float = option(120.0, "after which the search for what is wrong begins nothing more",
                            within="positive")  # fmt: skip
    device: str = option("cpu", "where the denoiser computes; FILE.py gets tensors there", DEVICE[2])
    threads: int = option(1, "CPU threads; 0: torch's choice", within="threads")


# --- What is checked.
@dataclass
class Teacher:
    """denoiser(xt, sigma, **cond), and what is known of it.

    x0: (N, *shape), data in a random order, or None.  cond: {name: (N or fewer, ...)}, row i with sample i,
    then again from the first.  other: a cond for the check of captions.  guided: scale -> denoiser.
    """

    denoiser: Any
    shape: tuple
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float | None = None
    x0: torch.Tensor | None = None
    cond: dict | None = None
    other: dict | None = None
    guided: Any = None
    device: str = "cpu"  # the denoiser's; all that is here is on the CPU

    def raw(self, x, sigma, n=None, cond=None, denoiser=None):
        """What it says of float32 x (B, *shape), sigma (B,); row i goes with sample i modulo n."""
        cond, index = self.cond if cond is None else cond, torch.arange(len(x))
        rows = {k: v[index % min(n or len(x), len(v))].to(self.device) for k, v in (cond or {}).items()}
        xt = x.float().to(self.device)
        sigma = per_sample(sigma, xt).contiguous()
        try:
            said = (denoiser or self.denoiser)(xt, sigma, **rows)
            return said.cpu() if torch.is_tensor(said) else said
        except Exception as error:  # anything: it is somebody's program
            words = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            raise checks.Broken(f"it raises at sigma {sigma[0]:.3g}: {words}") from error

    @torch.no_grad()
    def said(self, x, sigma, n=None, **more):
        """The same, float64, without gradient and without the channels of a learned variance."""
        return self.raw(x, sigma, n, **more)[:, : self.shape[0]].double()


def from_images(path, data):
    """EDM's U-Net, of ours or NVlabs' files."""
    network, about = checkpoints.load(path)
    if "sigma_init" in about:
        raise UserError(f"{path}: a one-step generator, not a teacher")
    teacher = Teacher(network, network.shape, sigma_data=network.sigma_data)
    if data:
        read_data(teacher, data, network.label_dim)
    elif network.label_dim:
        teacher.cond = {"class_labels": one_hot(torch.arange(8) % network.label_dim, network.label_dim)}
    return teacher


def read_data(teacher, source, label_dim=0):
    """Images of a data set, shuffled, with their labels one-hot."""
    data = load_fitting(source, teacher.shape, label_dim)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:MOST]
    teacher.x0 = to_network(data.images[order])
    if label_dim:
        teacher.cond = {"class_labels": one_hot(data.labels[order], label_dim)}


def from_pipeline(source, data):
    """A text-to-image pipeline, a folder or a name on the hub; its scheduler says what it predicts."""
    quiet()
    transformer, about = pixart_files.load_transformer(source)
    denoiser = denoiser_of(transformer, about)
    folder = pixart_files.find_pipeline(source, transformer)
    encoder, prompts = text_encoder(transformer, folder), Path(folder, "prompts.txt")
    null = encoder.null
    teacher = Teacher(denoiser, denoiser.shape, sigma_data=denoiser.sigma_data, cond=null)
    if hasattr(denoiser, "levels"):
        teacher.sigma_min, teacher.sigma_max = denoiser.levels[[0, -1]].tolist()
    texts = [text for _, text in find_prompts(str(prompts))] if prompts.exists() else FIGURE3
    teacher.other = encoder(texts[:: max(1, len(texts) // 4)])
    teacher.guided = lambda scale: Guided(denoiser, null, scale)
    if data:
        vae = pixart_files.load_vae(folder)
        teacher.x0 = encode(vae, fitted(data, vae, denoiser.shape[-1]))
    return teacher


def fitted(source, vae, size):
    """Images of a data set, as many as are worth encoding, in the colours and the size of the VAE."""
    data = load_images(source).images
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    pixels = size * 2 ** (len(vae.config.block_out_channels) - 1)
    x = to_network(data[order[: MOST if pixels < 64 else 16]]).expand(-1, 3, -1, -1)
    return x if x.shape[-1] == pixels else F.interpolate(x, pixels, mode="bilinear", antialias=True)


def from_python(path, data):
    """A file of the user's, which is run."""
    torch.manual_seed(0)
    try:
        found = runpy.run_path(str(path), run_name="teacher")
        shape = tuple(int(size) for size in found["shape"])
        if not callable(found["denoiser"]):
            raise TypeError("denoiser cannot be called")
        names = {"sigma_min", "sigma_max", "sigma_data"} & found.keys()
        teacher = Teacher(found["denoiser"], shape, **{k: found[k] for k in names})
        teacher.x0, teacher.cond = (found[k](MOST) if k in found else None for k in ("data", "cond"))
        verify(teacher)
    except (Exception, SystemExit) as error:  # anything: it is somebody's program
        words = f"needs a {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: {' '.join(words.split())[:300]}") from None
    if data:
        read_data(teacher, data, found.get("label_dim", 0))
    return teacher


def verify(teacher):
    """Sort out what a user's file says.  Raises ValueError."""
    numbers = (
        teacher.sigma_min,
        teacher.sigma_max,
        1.0 if teacher.sigma_data is None else teacher.sigma_data,
    )
    if not all(0 < float(v) < math.inf for v in numbers) or teacher.sigma_min >= teacher.sigma_max:
        raise ValueError("sigma_min < sigma_max and sigma_data must be positive numbers")
    if teacher.cond is not None and not all(map(torch.is_tensor, dict(teacher.cond).values())):
        raise ValueError("cond(n) must be a dictionary of tensors")
    if (x0 := teacher.x0) is None:
        return
    found = tuple(getattr(x0, "shape", ()))
    if not torch.is_tensor(x0) or found[1:] != teacher.shape or len(x0) < 8:
        raise ValueError(f"data(n) must be 8 samples at least of shape {teacher.shape}, got {found}")
    if not (x0.float().isfinite().all() and x0.float().std() > 0):
        raise ValueError("data(n) is not finite, or all one number")
    order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(0))
    if any(len(rows) != len(x0) for rows in (teacher.cond or {}).values()):
        raise ValueError("cond(n) must have as many rows as data(n)")
    teacher.x0 = x0.detach().float()[order]
    teacher.cond = {name: rows[order] for name, rows in (teacher.cond or {}).items()}


def load(path, data, device):
    read = from_images if Path(path).is_file() else from_pipeline
    teacher = from_python(path, data) if path.endswith(".py") else read(path, data)
    if isinstance(teacher.denoiser, torch.nn.Module):
        teacher.denoiser.to(device)
    teacher.device = device
    return teacher


# --- The picture.
def draw(teacher, samples, found=None):
    """Error over sigma: of D, of D read in every other way, of what needs no network; found: if mended."""
    levels, spread = checks.ladder(teacher), samples.spread
    rows, _ = wiring.tables(teacher.sigma_data)
    wide = wiring.Samples(samples.denoiser, samples.x0, samples.noise, levels, spread)
    grams, others = wide.grams(), dict(color="0.8", lw=0.5)
    figure = Figure(figsize=(7, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    plot = lambda x, y, style, label, **how: axes.plot(x.numpy(), y.numpy(), style, label=label, **how)
    read = wiring.read(grams, rows, levels, levels, 1.0).flatten(0, 1)
    plot(levels, read.T, "-", ["D read in other ways", *["_"] * (len(read) - 1)], **others)
    for label, style, line in (
        ("x itself", ":", levels**2),
        ("the data's mean", "--", torch.full_like(levels, spread**2)),
        ("best linear denoiser", "-.", wide.trivial),
    ):
        plot(levels, line, style, label, color="black", lw=1)
    color = "tab:red" if found else "tab:blue"
    plot(levels, wiring.error(grams), "-", "D as it is wired", color=color, lw=2.5)
    if found:
        errors = (found.errors - 0.01) * samples.trivial
        plot(samples.levels, errors, "o-", "mended: see the verdict", color="tab:green", lw=2, ms=4)
    axes.axvspan(*samples.levels[[0, -1]].tolist(), color="tab:blue", alpha=0.06, lw=0, label="what decides")
    axes.set(xscale="log", yscale="log", xlim=levels[[0, -1]].tolist(), xlabel="sigma")
    axes.set_ylim(0.2 * min(teacher.sigma_min**2, spread**2), 30 * spread**2)
    axes.set_ylabel("denoising error, squared, per coordinate")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def main(argv=None):
    parser = Parser(__doc__)
    add_options(parser, Settings)
    parser.add_argument("teacher", help="FILE.py, .safetensors of ours, .pkl of EDM, or a pipeline")

    def work():
        found = vars(parser.parse_args(argv))
        path, cfg = found.pop("teacher"), Settings(**found)
        check_ranges(cfg)
        if Path(cfg.out).suffix != ".png":
            raise UserError(f"--out {cfg.out}: must be a .png")
        check_ours(cfg.out, MARK)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        teacher = load(path, cfg.data, find_device(cfg.device))
        verdicts, drawn = checks.check(teacher, cfg.images, cfg.seconds)
        for verdict in verdicts:
            print(verdict)
        with suppress(checks.Broken):  # which a verdict has told
            if drawn:
                with replacing(cfg.out) as temporary:
                    draw(teacher, *drawn).savefig(temporary, format="png", metadata={"Title": MARK})
                print(f"wrote {cfg.out}")
        return int(any(verdict.state == "WRONG" for verdict in verdicts))

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
