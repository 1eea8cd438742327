"""Captions: the text encoder, the file of its features, and an encoding that is killed or refused."""

import fcntl
import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from edm import prompts as module
from edm.text.prompts import CaptionFile, TextEncoder, digest, encode_by_index, pad
from tests.snapshots import Reduced
from tests.test_prompts import fails, in_form, kill_when, refused, write

PIECES = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzABC,.", "▁cat", "▁dog", "▁on"]
PROMPTS = ["a cat", "a dog on a cat, on a dog.", "A", "zebra", "the quick brown fox", "on on on on", "ABBA"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a tiny T5 and its tokenizer, random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    vocab = [(piece, 0.0 if i < 3 else -2 - 0.01 * i) for i, piece in enumerate(PIECES)]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=120).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(PIECES) + 3, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def encoder(pipeline):
    return TextEncoder(pipeline)


# --- the text encoder ----------------------------------------------------------------------------


def test_features_are_those_of_transformers_padded_to_120(pipeline, encoder):
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=120, truncation=True, return_tensors="pt")
    model = T5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state
    found, longest = encoder(PROMPTS), int(tokens.attention_mask.sum(1).max())
    assert found["caption"].shape == (len(PROMPTS), longest, 32) and encoder.width == 32
    assert found["mask"].dtype == torch.int64 and found["mask"].equal(tokens.attention_mask[:, :longest])
    kept = found["mask"].bool()
    assert (found["caption"] - expected[:, :longest])[kept].abs().max() < 2e-6
    assert (found["caption"][~kept] == 0).all() and (~kept).any()
    assert not found["caption"].requires_grad and not any(p.requires_grad for p in encoder.model.parameters())


def test_a_prompt_does_not_depend_on_its_company(encoder):
    together = encoder(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        length = alone["mask"].shape[1]
        assert alone["mask"].all() and together["mask"][i].sum() == length
        assert (alone["caption"][0] - together["caption"][i, :length]).abs().max() < 2e-6


def test_text_is_taken_as_it_is(encoder):
    assert encoder.tokenize(["A"]) != encoder.tokenize(["a"])


def test_prompts_that_are_too_long_are_cut_and_counted(pipeline):
    encoder, tokenizer = TextEncoder(pipeline), AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    fits, long, longer = (" ".join(["cat"] * n) for n in (119, 120, 400))  # the end token is one more
    found = encoder([fits, long, longer, "cat"])
    assert encoder.truncated == 2 and found["mask"].sum(1).tolist() == [120, 120, 120, 2]
    assert found["caption"][0].equal(found["caption"][1]) and found["caption"][0].equal(found["caption"][2])
    texts = [fits, long, longer, "cat"]
    assert encoder.tokenize(texts) == tokenizer(texts, truncation=True, max_length=120).input_ids
    short = TextEncoder(pipeline, max_tokens=3)
    assert short(["cat dog", "cat dog cat"])["mask"].shape == (2, 3) and short.truncated == 1


def test_the_null_caption_is_the_end_token_alone(encoder):
    assert encoder.tokenize([""]) == [[1]]
    found = encoder.null
    assert found["caption"].shape == (1, 1, 32) and found["mask"].tolist() == [[1]]
    assert found["caption"].equal(encoder([""])["caption"])


def test_an_encoder_may_compute_in_bfloat16(pipeline, encoder):
    found, exact = TextEncoder(pipeline, dtype=torch.bfloat16)(PROMPTS), encoder(PROMPTS)
    assert found["caption"].dtype == torch.bfloat16
    assert (found["caption"] - exact["caption"]).norm() < 0.03 * exact["caption"].norm()


def damaged(pipeline, folder, part=None, name=None, content=None):
    """A copy of the pipeline with a part missing, or with one file replaced."""
    shutil.copytree(pipeline, folder)
    if name is None:
        shutil.rmtree(folder / part)
    else:
        write(folder / part / name, content)
    return folder


def test_faulty_pipelines_are_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails("none: no such file or folder", TextEncoder, tmp_path / "none")
    fails("missing text encoder", TextEncoder, damaged(pipeline, tmp_path / "a", "text_encoder"))
    fails("missing tokenizer", TextEncoder, damaged(pipeline, tmp_path / "b", "tokenizer"))
    bad = damaged(pipeline, tmp_path / "c", "text_encoder", "model.safetensors", b"junk")
    fails("text encoder cannot be loaded", TextEncoder, bad)
    bad = damaged(pipeline, tmp_path / "d", "tokenizer", "tokenizer.json", b"junk")
    fails("tokenizer cannot be loaded", TextEncoder, bad)
    evil = pickle.dumps(Reduced(os.mkdir, "executed"), 2)
    pickled = damaged(pipeline, tmp_path / "e", "text_encoder", "pytorch_model.bin", evil)
    (pickled / "text_encoder" / "model.safetensors").unlink()
    fails("text encoder cannot be loaded", TextEncoder, pickled)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name, value, message", [
    ("d_ff", 2**22, "its config asks for .* numbers, but its files hold .* bytes"),
    ("vocab_size", 2**40, "vocab_size is 1099511627776, more than 16,777,216"),
    ("num_layers", 10_000, "num_layers is 10000, more than 64"),
])  # fmt: skip
def test_settings_that_ask_for_more_than_the_files_hold(pipeline, tmp_path, name, value, message):
    config = json.loads((pipeline / "text_encoder/config.json").read_text()) | {name: value}
    text = json.dumps(config).encode()
    start = time.perf_counter()
    fails(message, TextEncoder, damaged(pipeline, tmp_path / "a", "text_encoder", "config.json", text))
    assert time.perf_counter() - start < 5


def test_missing_weights_are_not_made_up(pipeline, tmp_path):
    bad = damaged(pipeline, tmp_path / "a", "tokenizer", "x", b"")
    weights = load_file(bad / "text_encoder/model.safetensors")
    last = weights.pop("encoder.final_layer_norm.weight")
    save_file(weights, bad / "text_encoder/model.safetensors", {"format": "pt"})
    fails("text encoder cannot be loaded .missing tensor encoder.final_layer_norm.weight", TextEncoder, bad)
    weights["encoder.final_layer_norm.weight"] = last[:16].clone()
    save_file(weights, bad / "text_encoder/model.safetensors", {"format": "pt"})
    fails("text encoder cannot be loaded", TextEncoder, bad)


def test_another_models_tokenizer_is_refused(pipeline, tmp_path):
    bad = damaged(pipeline, tmp_path / "a", "text_encoder", "x", b"")
    vocab = [(piece, -1.0) for piece in [*PIECES, *map(str, range(20))]]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(bad / "tokenizer")
    fails("tokenizer is not that of its text encoder", TextEncoder, bad)


# --- features on disk ----------------------------------------------------------------------------


def prompt_file(folder, prompts=PROMPTS):
    return write(folder / "prompts.txt", in_form(prompts, "txt"))


@pytest.fixture(scope="module")
def files(pipeline, tmp_path_factory):
    """{"fp32": path, "bf16": path} of PROMPTS, by the command."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for dtype in ("fp32", "bf16"):
        found[dtype] = folder / f"{dtype}.safetensors"
        words = prompt_file(folder), found[dtype], "--text-encoder", pipeline, "--dtype", dtype, "--batch", 3
        module.main(["encode", *map(str, words)])
    assert sorted(p.name for p in folder.iterdir()) == ["bf16.safetensors", "fp32.safetensors", "prompts.txt"]
    return found


@pytest.mark.parametrize("indices", [[0], [4, 1], [6, 6, 2], torch.tensor([5, 3, 0, 1]), range(7)])
def test_a_file_gives_what_the_encoder_gives(encoder, files, indices):
    online = encode_by_index(PROMPTS, encoder, 32)
    stored = encode_by_index(PROMPTS, CaptionFile(files["fp32"]), 32)
    expected, found = online(indices), stored(indices)
    assert found["mask"].equal(expected["mask"]) and found["mask"].dtype == torch.int64
    assert found["caption"].shape == expected["caption"].shape and found["caption"].dtype == torch.float32
    assert (found["caption"] - expected["caption"]).abs().max() < 2e-6


def test_in_the_same_company_the_file_is_exact(pipeline, encoder, files):
    """Three at a time, the null caption first, as the file was made."""
    for dtype, kind in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        expected = TextEncoder(pipeline, dtype=kind)(["", *PROMPTS[:2]])
        captions = CaptionFile(files[dtype], dtype=kind)
        assert captions([0, 1])["caption"].equal(expected["caption"][1:])
        assert captions.null["caption"].equal(expected["caption"][:1, :1])
        assert captions.null["mask"].tolist() == [[1]]
        assert len(captions) == 7 and captions.width == 32


def test_a_file_in_bfloat16_is_read_in_any_type(files, encoder):
    found, exact = CaptionFile(files["bf16"])(range(7)), encoder(PROMPTS)
    assert found["caption"].dtype == torch.float32 and found["mask"].equal(exact["mask"])
    assert found["caption"].equal(found["caption"].bfloat16().float())
    assert (found["caption"] - exact["caption"]).norm() < 0.03 * exact["caption"].norm()
    assert CaptionFile(files["fp32"], dtype=torch.float64).null["caption"].dtype == torch.float64


def test_the_file_is_ordinary_safetensors(files):
    for name, kind in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        content = load_file(files[name])
        assert content["features"].dtype == kind
        assert content["features"].shape == (int(content["offsets"][-1]), 32)


def test_what_does_not_belong_together_is_refused(files, encoder):
    captions = CaptionFile(files["fp32"])
    assert captions.prompts_digest == digest(PROMPTS)
    fails("not made of these 7 prompts", encode_by_index, PROMPTS[::-1], captions, 32)
    fails("not made of these 6 prompts", encode_by_index, PROMPTS[1:], captions, 32)
    for source in captions, encoder:
        fails("captions of width 32, but the denoiser takes 4096", encode_by_index, PROMPTS, source, 4096)
    for index in -1, 7:
        with pytest.raises(IndexError, match=f"no prompt {index} among 7"):
            captions([0, index])


def test_damaged_caption_files_are_refused(files, tmp_path):
    good, tensors = files["fp32"].read_bytes(), load_file(files["fp32"])
    about = {"prompts": "x", "encoder": "x", "max_tokens": "120"}
    path = tmp_path / "bad.safetensors"
    fails("none: No such file", CaptionFile, tmp_path / "none")
    for content in b"", b"junk", good[:-1], good + b"x", good[:100], struct.pack("<Q", 2**60) + good[8:]:
        fails(f"^{path}: ", CaptionFile, write(path, content))
    offsets, features = tensors["offsets"], tensors["features"]
    bad = offsets.clone()
    bad[2] = bad[1]
    for change in (
        {"offsets": bad}, {"offsets": offsets + 1}, {"offsets": offsets[:-1].clone()},
        {"offsets": offsets[:0]},
        {"offsets": offsets.float()}, {"offsets": offsets.int()}, {"offsets": offsets[None]},
        {"offsets": torch.tensor([0, len(features)])},
        {"features": features.half()}, {"features": features[0]}, {"features": features[1:].clone()},
        {"more": offsets.clone()},
    ):  # fmt: skip
        save_file(tensors | change, path, about)
        fails(f"^{path}: ", CaptionFile, path)
    save_file(tensors, path, about | {"max_tokens": "x"})  # only a note
    assert len(CaptionFile(path)) == 7
    save_file(tensors, path)
    fails("not one of captions", CaptionFile, path)
    save_file({"features": features}, path, about)
    fails("not one of captions", CaptionFile, path)


def test_a_file_may_be_larger_than_the_memory(tmp_path):
    """100 GB of zeros that take no room on the disk."""
    encoder = type("Encoder", (), {"name": "x", "max_tokens": 120, "width": 4096})
    head, offsets = module.header(encoder, ["a"] * 100_000, [122] * 100_001, "bf16")
    with open(path := tmp_path / "large.safetensors", "wb") as file:
        file.write(head)
        try:
            file.truncate(len(head) + int(offsets[-1]) * 8192)
        except OSError:
            pytest.skip("this disk's file system does not take a sparse file of 100 GB")
    assert path.stat().st_size > 99e9
    captions = CaptionFile(path)
    assert len(captions) == 100_000 and captions([99_999, 0])["caption"].shape == (2, 122, 4096)


# --- encode: killed, refused ---------------------------------------------------------------------


def test_an_encoding_goes_on_from_wherever_it_was_killed(pipeline, files, tmp_path):
    """A killed run leaves the beginning of the file, of any length: here every 331st, and the last two."""
    whole, path = files["fp32"].read_bytes(), tmp_path / "c.safetensors"
    part = path.with_name("c.safetensors.part")
    words = ["encode", str(prompt_file(tmp_path)), str(path), "--text-encoder", str(pipeline)]
    words += ["--dtype", "fp32", "--batch", "3"]
    for length in (*range(0, len(whole), 331), len(whole) - 1, len(whole)):
        write(part, whole[:length])
        module.main(words)
        assert path.read_bytes() == whole and not part.exists()
        path.unlink()


def test_what_was_encoded_is_not_encoded_again(pipeline, files, tmp_path, monkeypatch):
    """Eight texts, three at a time; the part ends within the second three."""
    path, whole, calls = tmp_path / "c.safetensors", files["fp32"].read_bytes(), []
    offsets = CaptionFile(files["fp32"]).offsets
    write(Path(f"{path}.part"), whole[: len(whole) - int(offsets[-1] - offsets[5]) * 32 * 4 + 1])
    call = TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, texts: calls.append(texts) or call(self, texts))
    words = prompt_file(tmp_path), path, "--text-encoder", pipeline, "--dtype", "fp32", "--batch", 3
    module.main(["encode", *map(str, words)])
    assert calls == [PROMPTS[2:5], PROMPTS[5:]] and path.read_bytes() == whole


def test_an_encoding_that_is_killed_goes_on(pipeline, tmp_path):
    many = [
        f"{a} {b} {c}" for a in "abcdefghijklmnop" for b in "abcdefghijklmnop" for c in ("cat", "dog") * 4
    ]
    words = "encode", prompt_file(tmp_path, many), tmp_path / "c.safetensors", "--text-encoder", pipeline
    words += "--dtype", "fp32", "--batch", 1
    part = tmp_path / "c.safetensors.part"
    kill_when(lambda: part.exists() and part.stat().st_size > 100_000, *words)
    left = part.read_bytes()
    assert len(left) > 100_000 and not (tmp_path / "c.safetensors").exists()
    module.main(list(map(str, words)))
    assert not part.exists()
    content = (tmp_path / "c.safetensors").read_bytes()
    row = 32 * 4
    assert content[: len(left) - row * 120] == left[: len(left) - row * 120]
    found, expected = CaptionFile(tmp_path / "c.safetensors")(range(2048)), TextEncoder(pipeline)(many)
    assert found["mask"].equal(expected["mask"]) and len(many) == 2048
    assert (found["caption"] - expected["caption"]).abs().max() < 2e-6


def test_faulty_encodings_are_refused(pipeline, files, tmp_path, monkeypatch, capsys):
    def refuses(says, *words):
        with pytest.raises(SystemExit) as caught:
            sys.exit(module.main(["encode", *map(str, words)]))
        assert caught.value.code == 2
        lines = capsys.readouterr().err.splitlines()  # the last one: a progress bar may come before
        assert re.search(says, lines[-1]), lines

    prompts, out, how = prompt_file(tmp_path), tmp_path / "c.safetensors", ("--text-encoder", pipeline)
    write(out, "precious")
    refuses("exists already", prompts, out, *how)
    assert out.read_text() == "precious" and not Path(f"{out}.part").exists()
    out.unlink()
    refuses("No such file", tmp_path / "none.txt", out, *how)
    refuses("--batch must be at least 1, got 0", prompts, out, *how, "--batch", 0)
    refuses("No such file", prompts, tmp_path / "none" / "c.safetensors", *how)
    write(part := Path(f"{out}.part"), files["bf16"].read_bytes()[:-9])
    refuses("begun from other prompts, encoder or --dtype", prompts, out, *how, "--dtype", "fp32")
    assert part.read_bytes() == files["bf16"].read_bytes()[:-9]
    with open(f"{part}.lock", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # ours must be the only one
        refuses("in use by another process", prompts, out, *how)
    part.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    refuses(r"needs 4\.\d+e-06 GB, but 1e-06 GB are free", prompts, out, *how)
    monkeypatch.undo()
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, texts: pad([torch.full((1, 32), torch.nan)]))
    refuses("not all of its output is finite", prompts, out, *how)
    assert not out.exists()


def test_commands_refuse_with_one_line(pipeline, tmp_path):
    """By the real command line."""
    prompts, out = prompt_file(tmp_path), tmp_path / "c.safetensors"
    bad = damaged(pipeline, tmp_path / "bad", "text_encoder")
    refused("encode", prompts, out, "--text-encoder", bad, says="bad: missing text encoder")
    refused("encode", tmp_path / "p.doc", out, "--text-encoder", bad, says=r"p\.doc: prompts are read from")
    refused("encode", prompts, out, says="required: --text-encoder")
    refused("fetch", tmp_path / "c.jsonl", "--source", tmp_path / "no.tar", says="no.tar: no such file")
    refused("fetch", tmp_path / "c.jsonl", says="PixArt-alpha/SAM-LLaVA-Captions10M: .*(offline|reach)")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "prompts.txt"]


def test_the_size_is_told_first_and_long_prompts_are_counted_once(pipeline, tmp_path, capsys):
    prompts, out = prompt_file(tmp_path, ["cat " * 130, "cat", "dog " * 200]), tmp_path / "c.safetensors"
    module.main(["encode", str(prompts), str(out), "--text-encoder", str(pipeline)])
    found = capsys.readouterr()
    assert found.out.startswith("3 prompts, 243 tokens, 1.59e-05 GB\n"), found.out
    assert "warning: 2 prompts are cut to 120 tokens\n" in found.err
    assert CaptionFile(out)([0])["caption"].shape == (1, 120, 32)
