"""How well images follow their prompts, and how they please: CLIP score and LAION's aesthetic score.

    python edm/evaluate.py --student generator.safetensors --prompts prompts.txt \\
        --clip openai/clip-vit-large-patch14 --aesthetic sac+logos+ava1-l14-linearMSE.pth

Prompt i is drawn once, from seed i, by the student in one step and by its teacher's own sampler.
"""

import math
import sys
from collections import defaultdict

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from edm import pixart_files, sample_pixart
from edm.checkpoints import naming
from edm.config import UserError
from edm.device import Single
from edm.pixart import PixArtDenoiser
from edm.prompts import DTYPES, TextEncoder, exists_here, quiet
from edm.pth import read_pth

LAYERS = (0, 2, 4, 6, 7)  # of the aesthetic head; those between are dropout, for its training


def pretrained(cls, source, **how):
    try:
        return cls.from_pretrained(source, **how)
    except Exception as error:  # damaged files can raise nearly anything, in many lines
        line = " ".join(str(error).split())[:200]
        raise UserError(f"its {cls.__name__} cannot be loaded ({type(error).__name__}: {line})") from None


class Clip:
    """texts(prompts), images((N, 1 or 3, H, W) uint8) -> embeddings (N, width), float32, of length 1.

    source: a CLIPModel's folder or hub name, in transformers' layout.  Images are resized and cropped as its
    preprocessor_config.json says, by Pillow.  Raises UserError for what is missing, damaged or does not fit.
    """

    def __init__(self, source, device="cpu"):
        exists_here(source)
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer  # takes seconds

        with naming(source):
            model, found = pretrained(CLIPModel, source, dtype=torch.float32, output_loading_info=True)
            if missing := sorted(found["missing_keys"]):  # transformers would make them up
                raise UserError(f"missing {pixart_files.some(missing)}")
            self.model = model.to(device).eval().requires_grad_(False)
            self.tokenizer = pretrained(CLIPTokenizer, source)
            self.processor = pretrained(CLIPImageProcessorPil, source)
            self.width, text = model.config.projection_dim, model.config.text_config
            self.max_tokens = text.max_position_embeddings
            if (size := len(self.tokenizer)) != text.vocab_size:  # without its files it would be an empty one
                raise UserError(f"its tokenizer has {size} tokens, its model {text.vocab_size}")
            if not (self.images(torch.zeros(1, 3, 8, 8).byte()) * self.texts(["a"])).isfinite().all():
                raise UserError("its embeddings are not finite")

    @torch.no_grad()
    def texts(self, prompts):
        how = dict(padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        tokens = self.tokenizer(prompts, **how).to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)

    @torch.no_grad()
    def images(self, images):
        pixels = self.processor(list(images), input_data_format="channels_first", return_tensors="pt")
        return F.normalize(self.model.get_image_features(**pixels.to(self.model.device)).pooler_output, dim=1)


def clip_score(images, texts):
    """100 max(cos, 0) of each pair of embeddings, (N, width) of length 1 -> (N,).

    Source: CLIPScore, arXiv:2104.08718, eq. 1, whose factor is 2.5.
    """
    return 100 * (images * texts).sum(1).clamp(min=0)


def load_aesthetic(path, width):
    """LAION's improved aesthetic predictor: a network, embeddings (N, width) -> scores (N, 1).

    Linear layers, nothing between them.  Raises UserError for a file missing, damaged or of another width.
    """
    with naming(path):
        weights = read_pth(path)
        names = [f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")]
        if wrong := sorted(weights.keys() ^ set(names)):
            raise UserError(f"not an aesthetic head: missing or unknown {pixart_files.some(wrong)}")
        if (given := weights["layers.0.weight"].shape[-1]) != width:
            raise UserError(f"it takes embeddings {given} wide, but the CLIP's are {width} wide")
        outs = [len(weights[f"layers.{i}.weight"]) for i in LAYERS]
        if outs[-1] != 1 or not all(tensor.isfinite().all() for tensor in weights.values()):
            raise UserError("not an aesthetic head: not one number comes out, or a weight is not finite")
        with Single():
            network = nn.Sequential(*map(nn.Linear, [width, *outs], outs))
        network.load_state_dict(dict(zip(network.state_dict(), map(weights.get, names))))
    return network.eval().requires_grad_(False)


def drawn(cfg, prompts, state):
    """The batches of sample_pixart.draw: prompt i from seed i, of which this process has its share."""
    student, about = pixart_files.load_transformer(cfg.student, like=cfg.teacher or None)
    if not (source := cfg.teacher or about.get("teacher")):
        raise UserError(f"{cfg.student}: notes no teacher, so --teacher must be given")
    folder = pixart_files.find_pipeline(source, student.config.caption_channels)
    encoder = TextEncoder(folder, state.device, DTYPES[cfg.precision][1])
    vae = pixart_files.load_vae(folder).to(state.device)
    samplers = sample_pixart.make_samplers(cfg, student, about, folder, vae, encoder.null)
    pairs = [(prompt, prompt[0]) for prompt in prompts[state.process_index :: state.num_processes]]
    shape, encode = PixArtDenoiser(student).shape, sample_pixart.make_encode(encoder)
    bar = dict(total=2 * math.ceil(len(pairs) / cfg.batch), disable=not state.is_main_process, leave=False)
    yield from tqdm(sample_pixart.draw(samplers, encode, vae, shape, pairs, cfg.batch), "images", **bar)
    if encoder.truncated:
        print(f"warning: {encoder.truncated} prompts cut at {encoder.max_tokens} tokens", file=sys.stderr)


def compare(cfg, state):
    """Filled settings of evaluate.py, with prompts -> {"student": numbers, "teacher": numbers}."""
    quiet()
    same = "student sigma_init prompts steps guidance batch precision out".split()
    drawing = sample_pixart.Settings(teacher=cfg.teacher or "", **{k: getattr(cfg, k) for k in same})
    sample_pixart.check(drawing)
    prompts = sample_pixart.find_prompts(cfg.prompts)[: cfg.samples]
    if len(prompts) < 2:
        raise UserError(f"--prompts: {len(prompts)} is too few for a standard error")
    clip = Clip(cfg.clip, state.device)
    aesthetic = cfg.aesthetic and load_aesthetic(cfg.aesthetic, clip.width).to(state.device)
    cut = sum(len(ids) > clip.max_tokens for ids in clip.tokenizer([text for _, text in prompts]).input_ids)
    if cut and state.is_main_process:
        print(f"warning: CLIP sees {cut} prompts cut at {clip.max_tokens} tokens", file=sys.stderr)
    scores, seconds, rows = defaultdict(list), defaultdict(list), {}
    for name, pairs, images, took in drawn(drawing, prompts, state):
        embeddings = clip.images(images)
        found = [clip_score(embeddings, clip.texts([text for (_, text), _ in pairs]))]
        found += [aesthetic(embeddings)[:, 0]] if aesthetic else []
        scores[name] += zip([seed for _, seed in pairs], torch.stack(found, 1).tolist())
        seconds[name].append(took)
    for name, steps in (("student", 1), ("teacher", cfg.steps)):
        values = torch.tensor([row for _, row in sorted(gather_object(scores[name]))], dtype=torch.float64)
        row = rows[name] = {"steps": steps, "images": len(values)}
        for key, column in zip(("clip_score", "aesthetic"), values.T):
            row |= {key: column.mean().item(), f"{key}_error": column.std().item() / len(column) ** 0.5}
        calls = gather_object(seconds[name][1:] or seconds[name])  # of each process the first warms up
        row["images_per_second"] = state.num_processes * cfg.batch * len(calls) / sum(calls)
    return rows
