"""Prompts for text-to-image: files of them, the text encoder, and its output kept on disk.

    python edm/prompts.py fetch captions.jsonl --limit 1000000
    python edm/prompts.py encode captions.jsonl captions.safetensors --text-encoder PIPELINE

`fetch` copies the captions that PixArt-alpha was distilled with (SAM-LLaVA-Captions10M, one archive of
ten million small files) once into a file from which any prompt can be drawn.  `encode` stores what the
text encoder makes of prompts, 8 kB for each token with T5-XXL in bf16: training then needs neither the
encoder's 10 GB nor its work, about that of one more pass through PixArt.  Both commands, killed at any
instant, go on when started again.

PIPELINE is a folder, or a name on the hub, in diffusers' layout: with tokenizer/ and text_encoder/.
A prompt is used as it is but for white space at its ends: nothing is lower-cased or cleaned.
"""

import itertools
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import numpy as np
import torch
from tqdm import tqdm

from edm.text.pretrained import exists_here, quiet
from edm.text.prompts import DTYPES, MAX_TOKENS, SOURCE, TextEncoder, header, read_prompts
from toy import command as command_line
from toy.files import UserError, check_new, lock, naming


@contextmanager
def growing(path):
    """Yield PATH.part, open to be appended to: what a killed run left, or nothing.  Then rename it."""
    part = path.with_name(path.name + ".part")
    lock_file = part.with_name(part.name + ".lock")
    held = lock(lock_file, part)
    try:
        check_new(path)
        with open(part, "a+b") as file:
            file.seek(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        if error.filename:
            raise
        raise OSError(f"{part}: cannot be written ({error.strerror}); the same command goes on") from None
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()
        held.release()
        lock_file.unlink(missing_ok=True)


def stream_lines(source, start):
    """Lines of JSON, bytes, one a caption, from the one with this number on."""
    how = ("webdataset", None, None, {"train": source}) if exists_here(source) else (source,)
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("fetch needs a package that is not here: pip install datasets") from None
    with naming(source):
        for sample in load_dataset(*how, split="train", streaming=True).skip(start):
            if not isinstance(sample.get("txt"), str):
                raise UserError(f"{sample.get('__key__')} has no text")
            entry = {"text": sample["txt"].strip(), "key": sample["__key__"]}
            yield json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def fetch(args, file):
    if args.output.suffix != ".jsonl":
        raise UserError(f"{args.output}: the name must end in .jsonl")
    done, size, last = 0, 0, None
    for line in file:
        if line.endswith(b"\n"):
            done, size, last = done + 1, size + len(line), line
    if args.limit and done > args.limit:
        raise UserError(f"{file.name}: holds {done} captions already, more than --limit")
    if done:
        print(f"going on after {done:,} captions, which the source gives once more", flush=True)
    lines = stream_lines(args.source, max(done - 1, 0))
    first = next(lines, None)
    if first is None or (done and first != last):
        raise UserError(f"{args.source}: no captions in it, or not those that {file.name} was begun with")
    lines = lines if done else itertools.chain([first], lines)
    file.truncate(size)  # the half line of a killed run
    with tqdm(total=args.limit, initial=done, unit=" captions") as bar:
        for line in itertools.islice(lines, args.limit and args.limit - done):
            file.write(line)
            bar.update()
    print(f"{bar.n:,} captions")


def encode(args, file):
    prompts = read_prompts(args.prompts)
    quiet()
    dtype, device = DTYPES[args.dtype][1], "cuda" if torch.cuda.is_available() else "cpu"
    encoder = TextEncoder(args.text_encoder, device, dtype)
    texts, lengths = ["", *prompts], []
    for i in tqdm(range(0, len(texts), 1000), "counting tokens", unit=" thousand"):
        lengths += map(len, encoder.tokenize(texts[i : i + 1000]))
    head, offsets = header(encoder, prompts, lengths, args.dtype)
    row = encoder.width * dtype.itemsize
    size, room = len(head) + int(offsets[-1]) * row, shutil.disk_usage(args.output.parent).free
    print(f"{len(prompts):,} prompts, {offsets[-1]:,} tokens, {size / 1e9:.3g} GB", flush=True)
    if encoder.truncated:
        print(f"warning: {encoder.truncated:,} prompts are cut to {MAX_TOKENS} tokens", file=sys.stderr)
    if size - os.fstat(file.fileno()).st_size > room:
        raise UserError(f"{args.output}: needs {size / 1e9:.3g} GB, but {room / 1e9:.3g} GB are free")
    start = resume(file, head, offsets, row, args.batch)
    for i in tqdm(range(start, len(texts), args.batch), "encoding", unit=" batches"):
        caption, mask = encoder(texts[i : i + args.batch]).values()
        rows = caption[mask.bool()]
        if not rows.isfinite().all():
            raise UserError(f"{encoder.name}: not all of its output is finite, in prompts {i} and after")
        file.write(rows.cpu().view(torch.uint8).numpy())


def resume(file, head, offsets, row, batch):
    """Cut file to where a batch begins; -> the number of that batch's first text.  row: bytes of a token."""
    found = file.read(len(head))
    if found == head:
        tokens = (os.fstat(file.fileno()).st_size - len(head)) // row
        start = (int(np.searchsorted(offsets, tokens, "right")) - 1) // batch * batch
        file.truncate(len(head) + int(offsets[start]) * row)
        return start
    if not head.startswith(found):
        raise UserError(f"{file.name}: begun from other prompts, encoder or --dtype; remove it, or use those")
    file.truncate(0)
    file.write(head)
    return 0


def main(argv=None):
    parser = command_line.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="{fetch,encode}")

    def command(function, help):
        added = commands.add_parser(function.__name__, help=help, description=help)
        added.set_defaults(run=function)
        return added

    add = command(fetch, "copy captions into a .jsonl; going on reads past those that are there").add_argument
    add("output", type=Path, metavar="OUT.jsonl", help="file to write; must not exist yet")
    add("--limit", type=int, within="count", metavar="N", help="stop after N (default: all)")
    add("--source", default=SOURCE, help="name on the hub, or a tar or tar.gz of .txt (default %(default)s)")
    add = command(encode, "store what the text encoder makes of prompts").add_argument
    add("prompts", type=Path, metavar="PROMPTS", help=".txt, .jsonl or .csv")
    add("output", type=Path, metavar="OUT.safetensors", help="file to write; must not exist yet")
    add("--text-encoder", required=True, metavar="PIPELINE", help="folder or hub name, diffusers' layout")
    add("--dtype", choices=DTYPES, default="bf16", help="of the encoder and the file (default %(default)s)")
    add("--batch", type=int, within="many", default=64, help="prompts at a time (default %(default)s)")

    def work():
        args = parser.parse_args(argv)
        with growing(args.output) as file:
            args.run(args, file)
        print(f"wrote {args.output}")

    return command_line.run(work, "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
