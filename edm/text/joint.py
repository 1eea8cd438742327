"""The captions of SD3's family: two CLIPs and a T5, put together by diffusers' own pipeline."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from edm.text.pixart_files import is_joint
from edm.text.pretrained import exists_here, pretrained
from edm.text.prompts import TextEncoder
from toy.files import UserError

MAX_TOKENS = 256  # T5's, as in that pipeline; the CLIPs take 77


class JointEncoder:
    """encoder(prompts) -> {"caption": (B, L, width), "pooled": (B, P)}, no gradients; L is always the same.

    As TextEncoder otherwise; `truncated` counts what T5 cuts.
    """

    def __init__(self, folder: str | Path, device="cpu", dtype=torch.float32, max_tokens=MAX_TOKENS):
        from diffusers import StableDiffusion3Pipeline
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

        here, parts = exists_here(str(folder)), {}
        for kind, how, clip, t5 in (
            ("tokenizer", {}, CLIPTokenizer, AutoTokenizer),
            ("text_encoder", {"dtype": dtype}, CLIPTextModelWithProjection, T5EncoderModel),
        ):
            for part, cls in ((kind, clip), (f"{kind}_2", clip), (f"{kind}_3", t5)):
                if here and not Path(folder, part).is_dir():
                    raise UserError(f"{folder}: missing {part}: there is no {part}/ in it")
                parts[part] = pretrained(cls, folder, part, **how)
        self.networks = [part.to(device) for part in parts.values() if isinstance(part, torch.nn.Module)]
        self.pipeline = StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **parts)
        self.name, self.width, self.device = str(folder), self.networks[-1].config.d_model, device
        self.max_tokens, self.truncated = max_tokens, 0

    @torch.no_grad()
    def __call__(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        prompts = list(prompts)
        self.truncated += sum(
            len(ids) > self.max_tokens for ids in self.pipeline.tokenizer_3(prompts).input_ids
        )
        caption, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens,
        )  # fmt: skip
        return {"caption": caption, "pooled": pooled}

    @property
    def null(self) -> dict[str, Tensor]:
        return self([""])


def text_encoder(transformer: Module, *given) -> TextEncoder | JointEncoder:
    """The encoder whose captions a transformer takes."""
    return (JointEncoder if is_joint(transformer) else TextEncoder)(*given)
