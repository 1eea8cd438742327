"""Prompts for text-to-image: files of them, the text encoder, and its output kept on disk.

A prompt is used as it is but for white space at its ends: nothing is lower-cased or cleaned.
"""

import csv
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edm.images.checkpoints import open_safetensors
from edm.text.pretrained import exists_here, pretrained
from toy.files import UserError, naming

SOURCE = "PixArt-alpha/SAM-LLaVA-Captions10M"
MAX_TOKENS = 120  # PixArt-alpha's, the end token among them
MAX_LINE, MAX_PROMPT = 2**20, 2**14  # bytes, characters: far above MAX_TOKENS
DTYPES = {"bf16": ("BF16", torch.bfloat16, np.int16), "fp32": ("F32", torch.float32, np.float32)}


def read_prompts(path: str | Path) -> list[str]:
    """-> list of str, without white space at the ends; empty ones are left out.

    path: .txt, a prompt a line; .jsonl, an object with "text" a line; .csv with a column "text".  UTF-8.
    Raises UserError naming the file, and the line where there is one, for anything else.
    """
    path = Path(path)
    read = {".txt": lambda lines: lines, ".jsonl": json_texts, ".csv": csv_texts}.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: prompts are read from .txt, .jsonl and .csv")
    number = 0  # of the line that was last asked for

    def lines(file):
        nonlocal number
        while line := file.readline(MAX_LINE + 1):  # bytes, so that it ends at \n only, and can be named
            number += 1
            if b"\0" in line:
                raise UserError("a binary file, not text")
            if len(line) > MAX_LINE:
                raise UserError(f"of more than {MAX_LINE:,} bytes")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    prompts = []
    with naming(path), open(path, "rb") as file:
        try:
            for text in read(lines(file)):
                if not isinstance(text, str):
                    raise UserError('no "text", or one that is not a string')
                text.encode()  # JSON can hold half a character, which no tokenizer takes
                prompts.append(text.strip())
                if len(prompts[-1]) > MAX_PROMPT:
                    raise UserError(f"a prompt of more than {MAX_PROMPT:,} characters")
        except UnicodeError:
            raise UserError(f"line {number}: not UTF-8") from None
        except (UserError, ValueError, csv.Error, RecursionError) as error:
            raise UserError(f"line {number}: {error}") from None
        prompts = [prompt for prompt in prompts if prompt]
        if not prompts:
            raise UserError("there are no prompts in it")
    return prompts


def json_texts(lines: Iterable[str]) -> Iterator[Any]:
    for line in lines:
        if line.strip():
            entry = json.loads(line)
            yield entry.get("text") if isinstance(entry, dict) else None


def csv_texts(lines: Iterable[str]) -> Iterator[str | None]:
    rows = csv.reader(lines, strict=True)  # a DictReader fills up every short row, of a million columns too
    names = next(filter(None, rows), ["text"])  # none at all: an empty file
    if "text" not in names:
        raise UserError('there is no column "text"')
    column = names.index("text")
    for row in filter(None, rows):
        yield row[column] if column < len(row) else None


def digest(prompts: list[str]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def pad(rows: list[Tensor]) -> dict[str, Tensor]:
    """Tensors (L_i, *) -> {"caption": (B, L, *), zeros after L_i, "mask": (B, L) int64, 1 up to there}."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"caption": pad_sequence(rows, batch_first=True), "mask": mask.to(rows[0].device)}


class TextEncoder:
    """encoder(prompts) -> {"caption": (B, L, width), "mask": (B, L) int64, 1 = keep}, no gradients.

    L is the longest prompt's number of tokens, its end token included: padding is cut off, which PixArt's
    result does not depend on.  caption is 0 where mask is.  Prompts of more than max_tokens are cut, and
    counted in `truncated`.  "" gives the end token alone: the null caption of classifier-free guidance.
    Text is taken as it is; diffusers' pipelines would lower-case it, the authors' SIM code does not.

    folder: a path or hub name in diffusers' layout.  UserError if tokenizer/ or text_encoder/ is missing
    there, damaged or incomplete.  Nothing is executed: no remote code, weights only.
    """

    def __init__(self, folder: str | Path, device="cpu", dtype=torch.float32, max_tokens=MAX_TOKENS):
        here = exists_here(str(folder))
        for part in ("tokenizer", "text_encoder") if here else ():
            if not Path(folder, part).is_dir():
                raise UserError(f"{folder}: missing {part.replace('_', ' ')}: there is no {part}/ in it")
        from transformers import AutoTokenizer, T5EncoderModel  # here: importing them takes seconds

        self.tokenizer = pretrained(AutoTokenizer, folder, "tokenizer")
        model = pretrained(T5EncoderModel, folder, "text_encoder", dtype=dtype)
        if len(self.tokenizer) > model.config.vocab_size or not self.tokenizer("").input_ids:
            raise UserError(f"{folder}: its tokenizer is not that of its text encoder")
        self.model = model.to(device)
        self.networks = [self.model]
        self.name, self.width = str(folder), model.config.d_model
        self.max_tokens, self.truncated = max_tokens, 0

    def tokenize(self, prompts: Iterable[str]) -> list[list[int]]:
        """-> lists of at most max_tokens token ids, each with the end token."""
        # one more than allowed, to notice those that are too long
        ids = self.tokenizer(list(prompts), truncation=True, max_length=self.max_tokens + 1).input_ids
        self.truncated += sum(len(row) > self.max_tokens for row in ids)
        return [row if len(row) <= self.max_tokens else row[: self.max_tokens - 1] + row[-1:] for row in ids]

    @torch.no_grad()
    def __call__(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        rows = [torch.tensor(row, device=self.model.device) for row in self.tokenize(prompts)]
        ids, mask = pad(rows).values()
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"caption": (hidden * mask[:, :, None]).to(self.model.dtype), "mask": mask}

    @property
    def null(self) -> dict[str, Tensor]:
        return self([""])


def encode_by_index(prompts: list[str], source: Callable, width: int) -> Callable:
    """-> encode(indices) -> {"caption", "mask"}, the same from a TextEncoder as from a CaptionFile.

    width: what the denoiser takes.  UserError unless the source has it, and, a file, was made of prompts.
    """
    if source.width != width:
        raise UserError(f"{source.name}: captions of width {source.width}, but the denoiser takes {width}")
    if not isinstance(source, CaptionFile):
        return lambda indices: source([prompts[i] for i in indices])
    if source.prompts_digest != digest(prompts):
        raise UserError(f"{source.name}: not made of these {len(prompts)} prompts")
    return source


class CaptionFile:
    """captions(indices) -> {"caption": (B, L, width), "mask": (B, L)}, as TextEncoder's, of `encode`'s file.

    The file has "offsets" (N + 2,) and "features" (tokens, width): the first caption is "", that of prompt i
    is features[offsets[i + 1] : offsets[i + 2]].  Only what is asked for is read: the file may be larger than
    the memory.  UserError if it is damaged.
    """

    def __init__(self, path: str | Path, device="cpu", dtype=torch.float32):
        self.name, self.device, self.dtype = str(path), device, dtype
        # numpy's view is read-only, unlike torch's, for which the system reserves memory
        with naming(path), open_safetensors(path, "np") as file:
            about = file.metadata() or {}
            if not {"prompts", "encoder", "max_tokens"} <= about.keys() or len(file.keys()) != 2:
                raise UserError("a safetensors file, but not one of captions")
            self.offsets, features = file.get_tensor("offsets"), file.get_slice("features")
            (tokens, self.width), kind = features.get_shape(), features.get_dtype()
            kinds = {name: (stored, view) for name, stored, view in DTYPES.values()}
            if kind not in kinds or self.offsets.dtype != np.int64 or self.offsets.ndim != 1:
                raise UserError(f"features of {kind}, offsets of {self.offsets.dtype}")
            ends = [*self.offsets[:1], *self.offsets[-1:]]
            if ends != [0, tokens] or len(self) < 1 or (np.diff(self.offsets) < 1).any():
                raise UserError("damaged: its offsets do not fit its features")
            self.prompts_digest = about["prompts"]
            self.stored, view = kinds[kind]
            with open(path, "rb") as raw:  # safetensors has checked the header
                (length,) = struct.unpack("<Q", raw.read(8))
                start = json.loads(raw.read(length))["features"]["data_offsets"][0]
            self.features = np.memmap(path, view, "r", 8 + length + start, (tokens, self.width))

    def __len__(self):
        return len(self.offsets) - 2

    def __call__(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        indices = torch.as_tensor(indices).tolist()
        if outside := [i for i in indices if not 0 <= i < len(self)]:
            raise IndexError(f"{self.name}: there is no prompt {outside[0]} among {len(self)}")
        return self._read([i + 1 for i in indices])

    def _read(self, rows):
        parts = [np.array(self.features[self.offsets[i] : self.offsets[i + 1]]) for i in rows]
        return pad([torch.from_numpy(x).view(self.stored).to(self.device, self.dtype) for x in parts])

    @property
    def null(self) -> dict[str, Tensor]:
        return self._read([0])


def header(encoder: Any, prompts: list[str], lengths: list[int], dtype: str) -> tuple[bytes, np.ndarray]:
    """All of the safetensors file that comes before the features: bytes; and offsets (N + 2,)."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    size = int(offsets[-1]) * encoder.width * DTYPES[dtype][1].itemsize
    about = {"prompts": digest(prompts), "encoder": encoder.name, "max_tokens": str(encoder.max_tokens)}
    start = offsets.nbytes
    text = json.dumps({
        "__metadata__": about,
        "offsets": {"dtype": "I64", "shape": offsets.shape, "data_offsets": [0, start]},
        "features": {"dtype": DTYPES[dtype][0], "shape": [int(offsets[-1]), encoder.width],
                     "data_offsets": [start, start + size]},
    }).encode()  # fmt: skip
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + offsets.tobytes(), offsets
