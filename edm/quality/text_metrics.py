"""How well images follow their prompts, and how they please: CLIP score and LAION's aesthetic score.

    python edm/evaluate.py --student generator.safetensors --prompts prompts.txt \\
        --clip openai/clip-vit-large-patch14 --aesthetic sac+logos+ava1-l14-linearMSE.pth

Prompt i is drawn once, from seed i, by the student in one step and by its teacher's own sampler.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm.device import Single
from edm.images.checkpoints import some
from edm.images.pth import read_pth
from edm.text.pretrained import exists_here, pretrained
from toy.files import UserError, naming

LAYERS = (0, 2, 4, 6, 7)  # of the aesthetic head; those between are dropout, for its training


class Clip:
    """texts(prompts), images((N, 1 or 3, H, W) uint8) -> embeddings (N, width), float32, of length 1.

    source: a CLIPModel's folder or hub name, in transformers' layout.  Images are resized and cropped as its
    preprocessor_config.json says, by Pillow.  Raises UserError for what is missing, damaged or does not fit.
    """

    def __init__(self, source: str, device="cpu"):
        exists_here(source)
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer  # takes seconds

        self.model = pretrained(CLIPModel, source, dtype=torch.float32).to(device)
        self.tokenizer = pretrained(CLIPTokenizer, source)
        self.processor = pretrained(CLIPImageProcessorPil, source)
        self.width, text = self.model.config.projection_dim, self.model.config.text_config
        self.max_tokens = text.max_position_embeddings
        with naming(source):
            most, sizes = 4 * self.model.config.vision_config.image_size, self.processor.crop_size
            sizes = [size or 0 for some in (sizes, self.processor.size) for size in dict(some).values()]
            if max(sizes) > most:
                raise UserError(f"its images are resized to {max(sizes):,} pixels, more than {most:,}")
            if (size := len(self.tokenizer)) != text.vocab_size:  # without its files it would be an empty one
                raise UserError(f"its tokenizer has {size} tokens, its model {text.vocab_size}")
            if not (self.images(torch.zeros(1, 3, 8, 8).byte()) * self.texts(["a"])).isfinite().all():
                raise UserError("its embeddings are not finite")

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        how = dict(padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        tokens = self.tokenizer(prompts, **how).to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        pixels = self.processor(list(images), input_data_format="channels_first", return_tensors="pt")
        return F.normalize(self.model.get_image_features(**pixels.to(self.model.device)).pooler_output, dim=1)


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos, 0) of each pair of embeddings, (N, width) of length 1 -> (N,).

    Source: CLIPScore, arXiv:2104.08718, eq. 1, whose factor is 2.5.
    """
    return 100 * (images * texts).sum(1).clamp(min=0)


def load_aesthetic(path: str | Path, width: int) -> nn.Module:
    """LAION's improved aesthetic predictor: a network, embeddings (N, width) -> scores (N, 1).

    Linear layers, nothing between them.  Raises UserError for a file missing, damaged or of another width.
    """
    with naming(path):
        weights = read_pth(path)
        names = [f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")]
        if wrong := sorted(weights.keys() ^ set(names)):
            raise UserError(f"not an aesthetic head: missing or unknown {some(wrong)}")
        if (given := weights["layers.0.weight"].shape[-1]) != width:
            raise UserError(f"it takes embeddings {given} wide, but the CLIP's are {width} wide")
        outs = [len(weights[f"layers.{i}.weight"]) for i in LAYERS]
        if outs[-1] != 1 or not all(tensor.isfinite().all() for tensor in weights.values()):
            raise UserError("not an aesthetic head: not one number comes out, or a weight is not finite")
        with Single():
            network = nn.Sequential(*map(nn.Linear, [width, *outs], outs))
        network.load_state_dict(dict(zip(network.state_dict(), map(weights.get, names))))
    return network.eval().requires_grad_(False)
