"""CLIP score and aesthetic score against hand computations, and evaluate.py --prompts as a whole."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from edm import evaluate, sample_pixart
from edm.images.checkpoints import save
from edm.quality.text_metrics import Clip, clip_score, load_aesthetic
from tests.common import ROOT, spawn, start, words_of
from tests.pixart import make_pipeline, tiny
from tests.snapshots import Reduced
from toy.files import UserError

PROMPTS = ["a red fox", "the blue boat", "in the snow, a fox", "a boat", "the red snow"]
WIDTH, PIXELS, LONGEST = 16, 12, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def make_clip(folder):
    """A whole CLIP of random weights, in transformers' layout."""
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(TOKENS), max_position_embeddings=LONGEST, bos_token_id=len(TOKENS) - 2,
                eos_token_id=len(TOKENS) - 1)  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=tower | text, projection_dim=WIDTH,
                                 vision_config=tower | dict(image_size=PIXELS, patch_size=4)))  # fmt: skip
    for weight in model.parameters():  # as it is made, what it says depends on little
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]).save_pretrained(folder)
    square = dict(height=PIXELS, width=PIXELS)
    CLIPImageProcessorPil(size=dict(shortest_edge=PIXELS), crop_size=square).save_pretrained(folder)
    return folder


def head(width=WIDTH, sizes=(12, 8, 6, 4, 1)):
    rng = torch.Generator().manual_seed(0)
    weights = {}
    for i, given, out in zip((0, 2, 4, 6, 7), (width, *sizes), sizes):
        weights[f"layers.{i}.weight"] = torch.randn(out, given, generator=rng)
        weights[f"layers.{i}.bias"] = torch.randn(out, generator=rng)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read only: a CLIP, a head, a teacher's pipeline, students of it, prompts."""
    folder = tmp_path_factory.mktemp("text_metrics")
    make_clip(folder / "clip")
    torch.save(head(), folder / "head.pth")
    make_pipeline(folder / "teacher")
    save(folder / "student.safetensors", tiny(seed=5), sigma_init=2.5, teacher=str(folder / "teacher"))
    save(folder / "alone.safetensors", tiny(seed=5), sigma_init=2.5)
    save(folder / "foreign.safetensors", tiny(seed=5))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "one.txt").write_text(PROMPTS[0])
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return Clip(str(folder / "clip"))


def pictures(n=5, channels=3, height=20, width=15):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, height, width), generator=rng).byte()


# ----------------------------------------------------------------------------------------------
# The embeddings and the two scores.


def by_hand(folder, images, prompts):
    """-> cosines (N,), from the parts of the CLIP, one pair at a time, of unpadded prompts."""
    model = CLIPModel.from_pretrained(folder / "clip").eval()
    mean, std = ([[[v]] for v in values] for values in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    found = []
    for image, prompt in zip(images, prompts):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((PIXELS, PIXELS * picture.height // picture.width), Image.Resampling.BICUBIC)
        top = (picture.height - PIXELS) // 2
        picture = picture.crop((0, top, PIXELS, top + PIXELS))
        pixels = torch.tensor(list(picture.tobytes())).reshape(PIXELS, PIXELS, 3).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)
        words = re.findall(r"[a-z]+|,", prompt)
        letters = [letter + "</w>" * (i == len(word)) for word in words for i, letter in enumerate(word, 1)]
        ids = [TOKENS.index(token) for token in ("<|startoftext|>", *letters, "<|endoftext|>")]
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(pixels[None]).pooler_output)[0]
            hidden = model.text_model(torch.tensor([ids])).last_hidden_state
            b = model.text_projection(hidden[0, -1])
        found.append(torch.dot(a, b) / math.sqrt(a.dot(a) * b.dot(b)))
    return torch.stack(found)


def test_clip_score_is_that_of_a_hand_computation(folder, clip):
    images, expected = pictures(), by_hand(folder, pictures(), PROMPTS)
    assert expected.std() > 0.01, "nothing to tell apart"
    found = clip_score(clip.images(images), clip.texts(PROMPTS))
    assert torch.allclose(found, 100 * expected.clamp(min=0), atol=1e-3)


def test_clip_score_is_of_pairs_and_never_negative(clip):
    x = torch.eye(4)
    assert clip_score(x, x).tolist() == [100] * 4
    assert clip_score(x, x.roll(1, 0)).tolist() == clip_score(x, -x).tolist() == [0] * 4
    slanted = torch.tensor([[0.6, 0.8, 0, 0]])
    assert clip_score(x[:2], slanted.expand(2, -1)).tolist() == pytest.approx([60, 80])


def test_embeddings_have_length_1_and_do_not_depend_on_company(clip):
    images, texts = clip.images(pictures()), clip.texts(PROMPTS)
    assert images.shape == texts.shape == (5, WIDTH) and images.dtype == texts.dtype == torch.float32
    assert torch.allclose(torch.cat([images, texts]).norm(dim=1), torch.ones(10))
    assert torch.allclose(images[2:3], clip.images(pictures()[2:3]), atol=1e-6)
    assert torch.allclose(texts[1:2], clip.texts(PROMPTS[1:2]), atol=1e-6)  # padded, or not


def test_gray_images_are_colour_images_without_colour(clip):
    gray = pictures(channels=1)
    assert torch.equal(clip.images(gray), clip.images(gray.repeat(1, 3, 1, 1)))


def test_long_prompts_are_cut_but_keep_their_end(clip):
    long = "a" + " b" * 50
    assert torch.equal(clip.texts([long]), clip.texts(["a" + " b" * (LONGEST - 3)]))
    assert not torch.allclose(clip.texts([long]), clip.texts(["a" + " b" * (LONGEST - 4)]), atol=1e-4)


def test_aesthetic_is_a_chain_of_five_linear_maps(folder):
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(3))
    network, expected = load_aesthetic(folder / "head.pth", WIDTH), x.double()
    for i in (0, 2, 4, 6, 7):
        weight, bias = (head()[f"layers.{i}.{kind}"].double() for kind in ("weight", "bias"))
        expected = expected @ weight.T + bias
    assert torch.allclose(network(x).double(), expected, rtol=1e-4, atol=1e-4) and expected.std() > 1
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_aesthetic_takes_the_released_sizes(tmp_path):
    torch.save(head(768, (1024, 128, 64, 16, 1)), tmp_path / "large.pth")
    assert load_aesthetic(tmp_path / "large.pth", 768)(torch.ones(2, 768)).shape == (2, 1)


HEADS = {
    "missing": (None, "No such file"),
    "text": (b"no head", "not a readable pickle"),
    "cut": (lambda content: content[: len(content) // 2], "not a readable pickle"),
    "code": ({"layers.0.weight": Reduced(os.mkdir, "executed")}, "might be code"),
    "list": ([1.0], "holds no tensors by name"),
    "one layer too many": (head() | {"layers.8.bias": torch.zeros(1)}, r"unknown tensor layers\.8\.bias"),
    "one too few": ({k: v for k, v in head().items() if k != "layers.6.bias"}, r"tensor layers\.6\.bias"),
    "another width": (head(768), "768 wide, but the CLIP's are 16 wide"),
    "two numbers": (head(sizes=(12, 8, 6, 4, 2)), "not one number"),
    "broken chain": (head() | {"layers.4.weight": torch.zeros(6, 9)}, "size mismatch"),
    "nan": (head() | {"layers.7.bias": torch.tensor([math.nan])}, "not finite"),
    "scalar": (head() | {"layers.0.weight": torch.tensor(1.0)}, "damaged"),
}


@pytest.mark.parametrize("case", HEADS)
def test_wrong_heads_are_refused_in_one_line(folder, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, message = HEADS[case]
    if callable(content):
        content = content((folder / "head.pth").read_bytes())
    if isinstance(content, bytes):
        Path("bad.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, "bad.pth")
    with pytest.raises(UserError, match=f"^bad.pth: .*{message}") as error:
        load_aesthetic("bad.pth", WIDTH)
    assert "\n" not in str(error.value) and not Path("executed").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def nan(path):
    weights = CLIPModel.from_pretrained(path.parent)
    weights.text_projection.weight.data[0, 0] = math.nan
    weights.save_pretrained(path.parent)


def narrow(path):
    settings = json.loads(path.read_text())
    settings["crop_size"] = dict(height=8, width=8)
    path.write_text(json.dumps(settings))


def widen(path):
    settings = json.loads(path.read_text())
    settings["size"] = dict(shortest_edge=30_000)
    path.write_text(json.dumps(settings))


def deeper(path):
    settings = json.loads(path.read_text())
    settings["vision_config"]["num_hidden_layers"] = 3
    path.write_text(json.dumps(settings))


CLIPS = {
    "no weights": ("model.safetensors", Path.unlink, "CLIPModel cannot be loaded"),
    "no config": ("config.json", Path.unlink, "CLIPModel cannot be loaded"),
    "no tokenizer": ("tokenizer.json", Path.unlink, "its tokenizer has 2 tokens, its model 58"),
    "no processor": ("preprocessor_config.json", Path.unlink, "CLIPImageProcessorPil cannot be loaded"),
    "half the weights": ("model.safetensors", cut, "CLIPModel cannot be loaded"),
    "half a tokenizer": ("tokenizer.json", cut, "CLIPTokenizer cannot be loaded"),
    "a layer missing": ("config.json", deeper, r"missing tensors vision_model\.encoder\.layers\.2"),
    "not finite": ("model.safetensors", nan, "not finite"),
    "other image size": ("preprocessor_config.json", narrow, r"image size"),
    "huge images": ("preprocessor_config.json", widen, "its images are resized to 30,000 pixels"),
}


@pytest.mark.parametrize("case", CLIPS)
def test_wrong_clips_are_refused_in_one_line(folder, tmp_path, case):
    name, damage, message = CLIPS[case]
    bad = shutil.copytree(folder / "clip", tmp_path / "bad")
    damage(bad / name)
    with pytest.raises(UserError, match=f"^{re.escape(str(bad))}: .*{message}") as error:
        Clip(str(bad))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------
# evaluate.py --prompts.


def settings(folder, **changes):
    return dict(student=folder / "student.safetensors", prompts=folder / "prompts.txt",
                clip=folder / "clip", aesthetic=folder / "head.pth", steps=3, batch=2) | changes  # fmt: skip


def run(folder, **changes):
    return start(evaluate.main, evaluate.Settings, settings(folder, **changes))


def drawn_by_sample_pixart(folder, clip):
    """Embeddings of the images that sample_pixart.py draws, prompt i with seed i -> {name: (5, WIDTH)}."""
    sample_pixart.main(sample_pixart.Settings(
        student=str(folder / "student.safetensors"), prompts=str(folder / "prompts.txt"), seeds="0-4",
        teacher="", steps=3, batch=2, out="drawn", device="cpu"))  # fmt: skip
    found = {}
    for name, ending in (("student", ""), ("teacher", "-teacher")):
        files = [Image.open(f"drawn/{i:04d}-{i:06d}{ending}.png") for i in range(5)]
        pixels = [torch.frombuffer(bytearray(file.tobytes()), dtype=torch.uint8) for file in files]
        found[name] = clip.images(torch.stack(pixels).reshape(5, 16, 16, 3).permute(0, 3, 1, 2))
    return found


def test_numbers_are_those_of_the_images_of_sample_pixart(folder, here, clip, capsys):
    assert run(folder) == 0
    out, err = capsys.readouterr()
    assert re.search(r"\nstudent +\d.*\nteacher +\d.*\n\(5 prompts; .*\nwrote metrics.json\n", out)
    assert "warning" not in err and sorted(p.name for p in here.iterdir()) == ["metrics.json"]
    numbers = json.loads(Path("metrics.json").read_text("utf-8"))
    texts, network = clip.texts(PROMPTS), load_aesthetic(folder / "head.pth", WIDTH)
    for name, images in drawn_by_sample_pixart(folder, clip).items():
        row, score = numbers[name], clip_score(images, texts)
        assert row["images"] == 5 and row["images_per_second"] > 0
        for key, each in (("clip_score", score), ("aesthetic", network(images)[:, 0])):
            error = math.sqrt(((each - each.mean()) ** 2).sum() / 4 / 5)
            assert error > 0.01, "nothing to tell apart"
            assert row[key] == pytest.approx(each.mean().item(), abs=1e-3)
            assert row[f"{key}_error"] == pytest.approx(error, abs=1e-3)
        for shift in range(1, 5):  # images and prompts paired otherwise
            assert abs(clip_score(images, texts.roll(shift, 0)).mean() - score.mean()) > 0.01
    assert numbers["student"]["steps"] == 1 and numbers["teacher"]["steps"] == 3
    assert abs(numbers["student"]["clip_score"] - numbers["teacher"]["clip_score"]) > 0.01
    assert numbers["settings"]["guidance"] == 4.5 and numbers["settings"]["batch"] == 2


def test_first_prompts_without_aesthetic_with_the_teacher_named(folder, here, capsys):
    how = dict(aesthetic=None, student=folder / "alone.safetensors", samples=3)
    assert run(folder, teacher=folder / "teacher", **how) == 0
    assert run(folder, teacher=folder / "teacher", guidance=1.5, out="other.json", **how) == 0
    one, other = (json.loads(Path(name).read_text("utf-8")) for name in ("metrics.json", "other.json"))
    assert set(one["teacher"]) == {"steps", "images", "clip_score", "clip_score_error", "images_per_second"}
    assert one["student"]["images"] == 3
    assert one["student"]["clip_score"] == other["student"]["clip_score"]
    assert one["teacher"]["clip_score"] != other["teacher"]["clip_score"]
    assert re.search(r"student .* nan +nan ", capsys.readouterr().out)


def test_a_student_of_others_takes_the_sigma_init_that_is_given(folder, here, capsys):
    how = dict(aesthetic=None, teacher=folder / "teacher", samples=3)
    assert run(folder, student=folder / "foreign.safetensors", **how) == 2
    assert "give its --sigma-init" in capsys.readouterr().err
    found = []
    for name, more in (("alone", {}), ("foreign", dict(sigma_init=2.5)), ("foreign", dict(sigma_init=1.0))):
        more |= dict(student=folder / f"{name}.safetensors", out=f"{len(found)}.json")
        assert run(folder, **more, **how) == 0
        found.append(json.loads(Path(more["out"]).read_text("utf-8"))["student"]["clip_score"])
    assert found[0] == found[1] != found[2]


def test_speed_is_of_all_calls_but_the_first(folder, here, monkeypatch):
    seconds = iter([9, 8, 2, 4, 3, 4])  # of student and teacher in turn

    def draw(*arguments):
        for name, pairs, images, _ in whole(*arguments):
            yield name, pairs, images, next(seconds)

    whole = evaluate.draw
    monkeypatch.setattr(evaluate, "draw", draw)
    assert run(folder) == 0
    numbers = json.loads(Path("metrics.json").read_text("utf-8"))
    assert numbers["student"]["images_per_second"] == pytest.approx(2 * 2 / 5)
    assert numbers["teacher"]["images_per_second"] == pytest.approx(2 * 2 / 8)


def test_prompts_that_are_cut_are_warned_of(folder, here, capsys):
    Path("long.txt").write_text("a red fox\n" + "the blue boat " * 10, encoding="utf-8")
    assert run(folder, prompts="long.txt") == 0
    assert f"warning: CLIP sees 1 prompts cut at {LONGEST} tokens\n" in capsys.readouterr().err


WRONG = {
    "data": (dict(data="digits"), "--data: not with --prompts"),
    "inception": (dict(inception="i.pt"), "--inception: not with --prompts"),
    "reference": (dict(reference="r.npz"), "--reference: not with --prompts"),
    "classifier": (dict(classifier="c.safetensors"), "--classifier: not with --prompts"),
    "clip alone": (dict(prompts=None, aesthetic=None, data="digits"), "--clip: only with --prompts"),
    "head alone": (dict(prompts=None, clip=None, data="digits"), "--aesthetic: only with --prompts"),
    "guidance alone": (dict(prompts=None, clip=None, aesthetic=None, data="digits", guidance=2),
                       "--guidance: only with --prompts"),
    "nothing": (dict(prompts=None, clip=None, aesthetic=None), "one of --data and --prompts is needed"),
    "no clip": (dict(clip=None), "--prompts needs --clip"),
    "clip nowhere": (dict(clip="no/where/at all"), "no/where/at all: no such file or folder"),
    "head nowhere": (dict(aesthetic="nowhere.pth"), "nowhere.pth: No such file"),
    "clip is no clip": (dict(clip="TEACHER"), "teacher: .*cannot be loaded"),
    "student nowhere": (dict(student="nowhere.safetensors"), "nowhere.safetensors: no such file"),
    "no teacher": (dict(student="ALONE"), "alone.safetensors: notes no teacher, so --teacher must be given"),
    "teacher nowhere": (dict(teacher="nowhere.pth"), "nowhere.pth: no such file"),
    "one prompt": (dict(prompts="a red fox"), "--prompts: 1 is too few"),
    "no prompt": (dict(prompts=""), "--prompts is empty"),
    "prompts nowhere": (dict(prompts="nowhere.txt"), "nowhere.txt: No such file"),
    "samples": (dict(samples=1), "--samples must be at least 2, got 1"),
    "steps": (dict(steps=0), "--steps must be at least 1, got 0"),
    "batch": (dict(batch=0), "--batch must be at least 1, got 0"),
    "guidance": (dict(guidance=0.5), "--guidance must be at least 1, got 0.5"),
    "out": (dict(out="no/where.json"), "no: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_end_with_code_2_and_one_line(folder, here, capsys, case):
    changes, message = WRONG[case]
    named = {"ALONE": folder / "alone.safetensors", "TEACHER": folder / "teacher"}
    assert run(folder, **{k: named.get(v, v) for k, v in changes.items()}) == 2
    err = capsys.readouterr().err
    assert re.search(f": error: .*{message}", err) and err.count("\n") == 1
    assert not any(here.iterdir())


def test_as_a_command_an_error_is_one_line_though_transformers_would_say_more(folder, here):
    bad = shutil.copytree(folder / "clip", here / "bad")
    deeper(bad / "config.json")
    done = spawn(ROOT / "edm/evaluate.py", *words_of(settings(folder, clip=bad)))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    words = "its CLIPModel cannot be loaded (missing tensors"
    assert done.stderr.startswith(f"evaluate.py: error: {bad}: {words}")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 6])
def test_processes_give_the_numbers_of_one(folder, here, processes):
    for count, out in ((1, "one.json"), (processes, "many.json")):
        done = spawn(ROOT / "edm/evaluate.py", *words_of(settings(folder, out=out)), processes=count)
        assert done.returncode == 0, done.stderr
    one, many = (json.loads(Path(name).read_text("utf-8")) for name in ("one.json", "many.json"))
    assert many["run"]["processes"] == processes and one["run"]["processes"] == 1
    for name in ("student", "teacher"):
        for key in set(one[name]) - {"images_per_second"}:
            score = abs(one[name][key.removesuffix("_error")])  # by whose rounding its error moves
            assert many[name][key] == pytest.approx(one[name][key], rel=0, abs=1e-6 * score), (name, key)
