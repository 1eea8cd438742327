"""Distil a text-to-image teacher, PixArt-alpha, into a one-step generator: Algorithm 2 as in B.3.

    python edm/distill_pixart.py                         # digits, on a CPU; trains its teacher first
    python edm/distill_pixart.py --preset flow-digits    # the same by a teacher that predicts a velocity
    torchrun --nproc-per-node 4 edm/distill_pixart.py --preset pixart-512 \\
        --teacher PixArt-alpha/PixArt-XL-2-512x512 --prompts captions.jsonl

No images are used, only prompts.  The folder of the run: generator.safetensors (the moving average, what
sample_pixart.py takes and exports), metrics.json, log.csv and curves.png, samples-*.png (the same latents
and prompts every time), panel-*.png (what both networks see), and checkpoints to --resume from.

What a teacher predicts, noise or a velocity, is what the scheduler in its folder says (text/flow.py).
--captions takes features that `prompts.py encode` made, instead of encoding prompts as they are drawn.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import torch

from edm.algorithm2 import Distiller
from edm.config import TEACHERS, TEXT_DISTILLATIONS, TextDistillation, command_line
from edm.device import total_memory
from edm.distill import distil, notes
from edm.images import checkpoints
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.quality import captions
from edm.text import pixart_files
from edm.text.flow import denoiser_of, predictions, told
from edm.text.joint import text_encoder
from edm.text.pixart import Guided, decode, without
from edm.text.pretrained import quiet
from edm.text.prompts import CaptionFile, encode_by_index, read_prompts
from edm.training.plots import Pictures
from edm.training.trainee import compiled
from toy.files import UserError

DROPOUT = 0.1  # share of captions that the online network does without, if it is to be guided


class TextDistiller(Distiller):
    """Algorithm 2 with prompts: captions, guidance, and the latents' sigma_data."""

    def __init__(self, cfg, accelerator, teacher, fake, generator, parts):
        self.captions, self.count, self.null = parts.captions, parts.count, parts.null
        super().__init__(cfg, accelerator, teacher, fake, generator, self.pick)

    def pick(self, rng, n):
        """Which prompts, and which of them the online network is not shown."""
        prompt = torch.randint(self.count, (n,), generator=rng, device=rng.device)
        hidden = torch.rand(n, generator=rng, dtype=torch.float32, device=rng.device) < DROPOUT
        return {"prompt": prompt, "hidden": hidden}

    def draw(self, *numbers):
        parts = super().draw(*numbers)
        parts["hidden"] = [cond["hidden"] for cond in parts["cond"]]
        parts["cond"] = [self.captions(cond["prompt"]) for cond in parts["cond"]]
        return parts

    def fake_cond(self, draw, i):
        cond = draw["cond"][i]
        if self.cfg.fake_guidance == 1:
            return cond
        return without(cond, self.null, draw["hidden"][i])

    def judge(self, network):
        return network if self.cfg.fake_guidance == 1 else Guided(network, self.null, self.cfg.fake_guidance)


# ----------------------------------------------------------------------------------------------
# What goes into it.


class Prompts:
    """PixArt and its prompts, in the place of distill.py's `Images`.

    captions   captions(indices) -> {"caption", "mask"}, for `count` prompts
    source     the TextEncoder or CaptionFile behind them
    """

    shared, teacher_file, data = "preset seed device threads", "pipeline", "scikit-learn's digits"

    def __init__(self, cfg, accelerator):
        quiet()
        self.cfg, self.accelerator = cfg, accelerator
        if cfg.fake_guidance != 1:
            words = f"the online network learns {DROPOUT:.0%} of its samples without their caption"
            words = f"warning: --fake-guidance {cfg.fake_guidance:g}: {words}; B.3 does not"
            accelerator.print(words, file=sys.stderr)
        if cfg.teacher:
            return self.load(cfg.teacher)
        if cfg.preset not in TEACHERS:
            raise UserError(f"preset {cfg.preset} needs --teacher, such as PixArt-alpha/PixArt-XL-2-512x512")
        # What a run without --teacher would read only after its training.
        if cfg.prompts:
            read_prompts(cfg.prompts)
        if cfg.captions:
            CaptionFile(cfg.captions, "cpu")
        if cfg.transformer:
            pixart_files.load_transformer(cfg.transformer)

    def load(self, pipeline):
        """The teacher's pipeline and the prompts, if there is the memory for all that they become."""
        cfg, device = self.cfg, self.accelerator.device
        self.path = str(pipeline)
        self.transformer, about = self.load_teacher()
        self.predicts = predictions(about)
        for line in told(self.predicts):
            self.accelerator.print(line)
        self.vae = pixart_files.load_vae(self.path).to(device)
        if cfg.captions:
            if pixart_files.is_joint(self.transformer):
                raise UserError(f"{cfg.captions}: holds no pooled captions, which {self.path} needs")
            self.source = CaptionFile(cfg.captions, device)
        else:
            dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
            self.source = text_encoder(self.transformer, self.path, device, dtype)
        path = cfg.prompts or Path(self.path) / "prompts.txt"
        if not cfg.prompts and not path.exists():
            raise UserError(f"preset {cfg.preset} needs --prompts: FILE.txt, .jsonl or .csv")
        prompts = read_prompts(path)
        width = pixart_files.caption_width(self.transformer)
        self.captions, self.null = encode_by_index(prompts, self.source, width), self.source.null
        self.count = len(prompts)
        self.accelerator.print(f"{self.count:,} prompts; memory:")
        plan = memory_plan(cfg, self.transformer, self.frozen_bytes(), self.accelerator.num_processes)
        tell_memory(plan, device, self.accelerator.print)

    def load_teacher(self):
        return pixart_files.load_transformer(self.cfg.transformer or self.path, like=self.path)

    def frozen_bytes(self):
        """Of the text encoder and the VAE."""
        networks = [self.vae, *getattr(self.source, "networks", [])]
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())

    def build(self):
        """The three networks, all starting as the teacher, and the task that trains two of them."""
        cfg, device = self.cfg, self.accelerator.device
        if cfg.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        fake = denoiser_of(self.transformer, self.predicts).to(device).requires_grad_(True)
        generator = Generator(copy.deepcopy(fake), cfg.sigma_init)
        teacher = copy.deepcopy(fake)
        if cfg.precision == "bf16":  # the frozen one alone: in bf16 a weight cannot take steps of 5e-6
            teacher.to(torch.bfloat16)
        task = TextDistiller(cfg, self.accelerator, self.guided(teacher), fake, generator, self)
        if cfg.compile:
            compiled([task.teacher, fake, generator], device, self.accelerator.print)
        return task

    def guided(self, teacher):
        return teacher if self.cfg.guidance == 1 else Guided(teacher, self.null, self.cfg.guidance)

    def pictures(self, run, task):
        """Some prompts spread over all of them, with the latents of the first seeds."""
        n, columns = (40, 8) if task.shape[1] <= 16 else (8, 4)
        z, _ = latents(range(n), task.shape)
        cond = self.captions(torch.linspace(0, self.count - 1, n, dtype=torch.float32).long())
        return Pictures(run, task, z.to(task.device), cond, lambda x: decode(self.vae, x), columns)

    def score(self, run, task):
        return None

    def finish(self, run, task, path):
        """Write the moving average; of digits, what a classifier reads from its samples -> numbers."""
        cfg, weights = self.cfg, task.ema.state_dict()  # by every process, if sharded
        if cut := getattr(self.source, "truncated", 0):
            self.accelerator.print(
                f"warning: {cut:,} of the prompts drawn were cut to {self.source.max_tokens} tokens"
            )
        if not run.first:
            return {}
        teacher, _ = self.load_teacher()
        student = copy.deepcopy(teacher)
        student.load_state_dict({k.removeprefix("denoiser.transformer."): v for k, v in weights.items()})
        checkpoints.save(path, student, **notes(cfg, self.path, cfg.steps), **self.predicts)
        if cfg.preset not in TEACHERS or isinstance(self.source, CaptionFile):
            return {}
        student, teacher = (denoiser_of(net, self.predicts).to(task.device) for net in (student, teacher))
        generator, denoiser = Generator(student, cfg.sigma_init), self.guided(teacher)
        reader = self.reader(task.shape, run.path / "classifier.safetensors")
        return captions.compare(reader, generator, denoiser)

    def reader(self, shape, cache):
        return captions.Reader(shape, self.vae, self.source, self.cfg.samples, cache)

    def words(self, m):
        if "student_follows" in m:
            yield (
                f"the digit of the prompt is read from {m['student_follows']:.1%} of {m['samples']} one-step "
                f"samples, and from {m['teacher_follows']:.1%} of the teacher's (35 evaluations)"
            )
            yield (
                f"Frechet distance: student {m['student_fd']:.3f}, teacher {m['teacher_fd']:.3f}, "
                f"halves of the data {m['floor_fd']:.3f}"
            )


# ----------------------------------------------------------------------------------------------
# Memory.


def memory_plan(cfg, transformer, frozen, processes):
    """Bytes on each device: {what: bytes}.  frozen: parameters of the text encoder and the VAE.

    Activations are estimates: a block keeps its input if it is made again, else about 20 numbers for each
    of those; the generator's, the online network's and the teacher's (twice, if guided) are all alive.
    """
    config, one = transformer.config, transformer.num_parameters()
    shares = processes if cfg.sharding == "fsdp" else 1
    low = 2 if cfg.precision == "bf16" else 4
    numbers = (config.sample_size // config.patch_size) ** 2 * transformer.inner_dim  # of a block's input
    kept = config.num_layers + 20 if cfg.checkpointing else 20 * config.num_layers
    graphs = 2 + (cfg.fake_guidance != 1) + 1 + (cfg.guidance != 1)
    images = min(cfg.micro_batch or cfg.batch, cfg.batch // processes)
    return {
        "generator and online network: weights, gradients, Adam's two moments": 2 * 16 * one // shares,
        "moving average": 4 * one // shares,
        "teacher": low * one // shares,
        "text encoder and VAE": frozen,
        f"activations of {images} images (estimated)": low * graphs * images * numbers * kept,
    }


def tell_memory(plan, device, say):
    """Print the plan.  Raises UserError if the device is too small for it."""
    total = sum(plan.values())
    for what, size in plan.items():
        say(f"  {size / 1e9:7.2f} GB  {what}")
    fits = ", ".join(f"{'fits' if total < 0.95e9 * size else 'too much for'} {size} GB" for size in (40, 80))
    say(f"  {total / 1e9:7.2f} GB  on each device: {fits}")
    if total > (there := total_memory(device)):
        raise UserError(
            f"needs about {total / 1e9:.3g} GB on each device, which has {there / 1e9:.3g} GB: "
            "try a lower --micro-batch, --checkpointing, --sharding fsdp, --captions"
        )


def main(cfg):
    return distil(cfg, Prompts)


if __name__ == "__main__":
    sys.exit(command_line(main, TextDistillation, __doc__, presets=TEXT_DISTILLATIONS))
