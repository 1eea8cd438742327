"""Train a teacher: denoising score matching (B.2), with a moving average of the weights.

    python edm/train_teacher.py --preset digits
    python edm/train_teacher.py --preset fashion-mnist --precision bf16 --compile
    torchrun --nproc-per-node 4 edm/train_teacher.py --preset cifar10-cond --data cifar-10-batches-bin
    python edm/train_teacher.py --preset pixart-digits             # text to image, small enough for a CPU
    python edm/train_teacher.py --preset flow-digits               # the same, predicting a velocity

Leaves teacher.safetensors (the moving average) in its folder, with the log, its curves, sample grids by
35 evaluations, and checkpoints to --resume from.  Ctrl-C and SIGTERM save first.

pixart-digits leaves pipeline/ instead, in diffusers' layout like the big one's: tokenizer, T5 encoder (of
random weights: frozen random features tell words apart), VAE and transformer (both trained on
scikit-learn's digits, 16x16 pixels, with captions such as "a handwritten seven"), scheduler, prompts.txt.
flow-digits is its rectified-flow twin: network and data are the same, and the scheduler says flow matching.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch

import sim_core as sim
from edm.config import PRESETS, TEACHERS, TEXT_PRESETS, TeacherTraining, check, command_line
from edm.device import Single
from edm.images import checkpoints
from edm.images.data import load_fitting, one_hot, to_network
from edm.images.networks import EDMPrecond
from edm.images.sampler import fixed_latents, heun, latents
from edm.text import digits
from edm.text.flow import denoiser_of
from edm.text.pixart import decode
from edm.text.pixart_files import load_vae
from edm.text.pretrained import quiet
from edm.text.prompts import TextEncoder
from edm.training import plots
from edm.training.denoising import TeacherTask
from edm.training.loop import complete
from edm.training.run import Run
from edm.training.trainee import compiled, make_accelerator
from toy.files import UserError, write_json


def image_examples(cfg, device, network, data):
    """Images of the data at p_EDM's noise levels, weighted by lambda_EDM: `examples` of a TeacherTask."""
    images, labels, sigma_data = data.images.to(device), None, network.sigma_data
    if not 0.4 < (spread := to_network(data.images[:2000]).std().item() / sigma_data) < 2.5:
        words = f"warning: the images' std is {spread:.2g} times the network's sigma_data, {sigma_data:g}"
        print(f"{words}: the noise levels may not fit", file=sys.stderr)
    if network.label_dim:
        labels = one_hot(data.labels, network.label_dim).to(device)

    def examples(rng, n):
        index = torch.randint(len(images), (n,), generator=rng, device=device)
        x0 = to_network(images[index])
        if cfg.flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=rng, dtype=torch.float32, device=device) < 0.5
            x0 = torch.where(mirrored, x0.flip(3), x0)
        sigma = sim.SIGMA_DISTRIBUTIONS["edm"](n, generator=rng, dtype=torch.float32)
        cond = {} if labels is None else {"class_labels": labels[index]}
        return x0, sigma, sim.edm_weight(sigma, sigma_data), cond

    return examples


class ImageTeacher:
    """EDM's U-Net, on images."""

    file = "teacher.safetensors"

    def __init__(self, cfg, accelerator):
        if cfg.vae_steps is not None:
            raise UserError("--vae-steps is for the preset pixart-digits, and for flow-digits")
        if not cfg.data:
            raise UserError(
                f"preset {cfg.preset} needs --data: a folder with CIFAR-10's batches, or EDM's zip"
            )
        self.cfg, self.device = cfg, accelerator.device
        torch.manual_seed(cfg.seed)
        self.network = EDMPrecond(**PRESETS[cfg.preset]["network"]).to(memory_format=torch.channels_last)
        self.data = load_fitting(cfg.data, self.network.shape, self.network.label_dim)

    def start(self, run):
        self.z, self.cond = fixed_latents(self.network, self.device)
        return self.network, image_examples(self.cfg, self.device, self.network, self.data)

    def samples(self, network):
        return heun(network, self.z, **self.cond)

    def write(self, path, network):
        images = self.cfg.steps * self.cfg.batch
        checkpoints.save(path, network, kind="teacher", preset=self.cfg.preset, images=images)


class TextTeacher:
    """PixArt of the digits, on latents; its VAE and its text encoder come first."""

    file = "pipeline"

    def __init__(self, cfg, accelerator):
        if cfg.data or cfg.flip:
            raise UserError(f"preset {cfg.preset} has data of its own: no --data, no --flip")
        quiet()
        self.cfg, self.accelerator, self.device = cfg, accelerator, accelerator.device
        self.predicts = TEXT_PRESETS[cfg.preset].get("predicts", "noise")

    def start(self, run):
        from diffusers import PixArtTransformer2DModel

        self.frozen = run.path / "frozen"
        if run.first:
            digits.make_frozen(self.frozen, self.cfg.seed, self.cfg.vae_steps)
        self.accelerator.wait_for_everyone()
        self.vae = load_vae(self.frozen).to(self.device)
        encoder = TextEncoder(self.frozen, self.device)
        torch.manual_seed(self.cfg.seed)
        with Single():
            network = PixArtTransformer2DModel(**digits.TRANSFORMER)
        network = denoiser_of(network, {"predicts": self.predicts}).to(self.device)
        self.z = latents(range(40), network.shape)[0].to(self.device)
        self.caption = encoder(digits.grid_prompts())
        return network, digits.text_examples(digits.pictures(), self.vae, encoder, network.draw_levels)

    def samples(self, network):
        return decode(self.vae, heun(network, self.z, **digits.SAMPLER, **self.caption))

    def write(self, path, network):
        if not path.exists():
            digits.save_pipeline(path, self.frozen, network.transformer, self.predicts)


def main(cfg):
    """Train; the teacher's file is in cfg.out at the end.  Returns the exit code."""
    check(cfg)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"out/edm/{cfg.preset}-teacher-{cfg.seed}")
    accelerator = make_accelerator(cfg)
    kind = (TextTeacher if cfg.preset in TEXT_PRESETS else ImageTeacher)(cfg, accelerator)
    run = Run(cfg, accelerator.is_main_process)
    network, examples = kind.start(run)
    task = TeacherTask(cfg, accelerator, network, examples)
    if cfg.compile:
        compiled([network], accelerator.device, accelerator.print)

    def picture(step):
        samples = kind.samples(task.ema.network)
        if run.first:
            plots.save_grid(run.path / f"samples-{step:07d}.png", samples)

    code = complete(cfg, accelerator, task, run, dict, picture, "teacher")
    if code is None and run.first:
        write_json(run.path / "metrics.json", {"steps": cfg.steps, "seconds": run.history[-1]["seconds"]})
        kind.write(run.path / kind.file, task.ema.network)
        print(f"wrote {run.path}/{kind.file}; look at its samples-*.png and curves.png")
    return code or 0


if __name__ == "__main__":
    sys.exit(command_line(main, TeacherTraining, __doc__, presets=TEACHERS))
