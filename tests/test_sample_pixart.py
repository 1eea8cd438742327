"""edm/sample_pixart.py through its command line: which image is whose, and what is refused."""

import json
import re
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline
from PIL import Image

from edm import sample, sample_pixart
from edm.images import foreign
from edm.images.checkpoints import save
from edm.images.data import to_uint8
from edm.images.networks import Generator
from edm.images.sampler import latents
from edm.prompts import growing
from edm.text import sampler
from edm.text.pixart import PixArtDenoiser, sigma_of_t
from edm.text.pixart_files import load_transformer
from edm.text.prompts import TextEncoder
from tests.common import ROOT, spawn, start, words_of
from tests.pixart import make_pipeline, tiny
from toy.files import UserError

PROMPTS = ["a red fox", "the blue boat", "in the snow, a fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read only: a teacher's pipeline, students of it, prompts."""
    folder = tmp_path_factory.mktemp("sample")
    make_pipeline(folder / "teacher")
    student = tiny(seed=5)
    save(folder / "student.safetensors", student, sigma_init=2.5, teacher=str(folder / "teacher"))
    save(folder / "alone.safetensors", student, sigma_init=2.5)
    save(folder / "none.safetensors", student, teacher=str(folder / "teacher"))
    save(folder / "moved.safetensors", student, sigma_init=2.5, teacher="gone/far/away")
    narrow = tiny(seed=5, caption_channels=16)
    save(folder / "narrow.safetensors", narrow, sigma_init=2.5, teacher=str(folder / "teacher"))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "empty.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    (folder / "there.png").touch()
    for name in ("no text", "no vae", "large"):
        make_pipeline(folder / name, **(dict(sample_size=16) if name == "large" else {}))
    for path in [*(folder / "no text" / "text_encoder").iterdir(), *(folder / "no vae" / "vae").iterdir()]:
        path.unlink()
    (folder / "no text" / "text_encoder").rmdir()
    return folder


def settings(folder, **changes):
    return dict(student=folder / "student.safetensors", prompts=folder / "prompts.txt", seeds="3,7",
                out="out", device="cpu") | changes  # fmt: skip


def run(folder, **changes):
    return start(sample_pixart.main, sample_pixart.Settings, settings(folder, **changes))


def pictures(out):
    return {path.name: np.asarray(Image.open(path)) for path in Path(out).glob("*.png")}


def by_hand(folder, prompt, seed, source=None, steps=20, guidance=4.5):
    """The image as (H, W, 3) uint8, by Generator, or by diffusers' whole pipeline from a teacher."""
    z, _ = latents([seed], (4, 8, 8))
    vae = AutoencoderKL.from_pretrained(folder / "teacher", subfolder="vae")
    with torch.no_grad():
        if source:
            pipe = PixArtAlphaPipeline.from_pretrained(
                folder / "teacher", transformer=load_transformer(source)[0]
            )
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
            x = pipe(prompt, latents=z, num_inference_steps=steps, guidance_scale=guidance,
                     output_type="latent", use_resolution_binning=False).images  # fmt: skip
        else:
            cond = TextEncoder(folder / "teacher")([prompt])
            x = Generator(PixArtDenoiser(tiny(seed=5)), 2.5)(z, **cond)
        return to_uint8(vae.decode(x / vae.config.scaling_factor).sample)[0].permute(1, 2, 0).numpy()


def assert_close(a, b):
    """But for rounding, at a whole number."""
    gap = np.abs(a.astype(int) - b)
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01


# ----------------------------------------------------------------------------------------------


def test_images_are_those_of_generator_and_pipeline(folder, here, capsys):
    foreign.tell.cache_clear()
    assert run(folder, teacher=True, steps=4, batch=4) == 0
    found = pictures("out")
    assert len(found) == 12
    for number, prompt in enumerate(PROMPTS):
        for seed in (3, 7):
            one, many = found[f"{number:04d}-{seed:06d}.png"], found[f"{number:04d}-{seed:06d}-teacher.png"]
            assert one.shape == many.shape == (16, 16, 3) and (one != many).mean() > 0.1 and one.std() > 5
            assert_close(one, by_hand(folder, prompt, seed))
            assert_close(many, by_hand(folder, prompt, seed, folder / "teacher", 4))
    words = capsys.readouterr().out
    assert re.fullmatch(
        r"\S+/student.safetensors: the teacher that it notes is \S+/teacher\n"
        r"student: \S+ s per image, 4 at a time, without text and VAE\n"
        r"teacher: \S+ s per image, 4 at a time, without text and VAE\n"
        r"the student is \S+ times as fast\nwrote 12 images to out\n", words)  # fmt: skip
    assert [
        json.loads(line)["text"] for line in Path("out/prompts.jsonl").read_text("utf-8").splitlines()
    ] == PROMPTS


def test_one_step_of_the_teacher_is_one_step_to_0(folder, here, capsys, monkeypatch):
    """From the highest sigma, with guidance, in one call; diffusers' solver by itself comes to the same."""
    assert run(folder, teacher=True, steps=1, batch=1, prompts=PROMPTS[0], seeds="3") == 0
    encoder, (z, _) = TextEncoder(folder / "teacher"), latents([3], (4, 8, 8))
    cond, sigma = encoder([PROMPTS[0]]), sigma_of_t()[-1].item()
    denoiser = PixArtDenoiser(load_transformer(folder / "teacher")[0])
    with torch.no_grad():
        plain, null = (denoiser(sigma * z, sigma, **c) for c in (cond, encoder.null))
        x = null + 4.5 * (plain - null)
        vae = AutoencoderKL.from_pretrained(folder / "teacher", subfolder="vae")
        image = to_uint8(vae.decode(x / vae.config.scaling_factor).sample)[0].permute(1, 2, 0).numpy()
    assert_close(pictures("out")["0000-000003-teacher.png"], image)
    solver = DPMSolverMultistepScheduler.from_pretrained(folder / "teacher", subfolder="scheduler")
    solver.set_timesteps(1)
    noise = (sigma * z - x) / sigma
    theirs = solver.step(noise, solver.timesteps[0], z, return_dict=False)[0]
    assert (theirs - x).norm() < 0.01 * x.norm()
    assert run(folder, teacher=True, steps=1, out="grid.png", prompts=PROMPTS[0], seeds="3") == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_depends_on_no_company(folder, here, precision):
    how = dict(precision=precision, batch=3)
    assert (
        run(folder, seeds="0-4", **how) == run(folder, prompts=PROMPTS[1], seeds="4,2", out="two", **how) == 0
    )
    many, few = pictures("out"), pictures("two")
    for seed in (2, 4):
        assert np.array_equal(many[f"0001-{seed:06d}.png"], few[f"0000-{seed:06d}.png"])
    assert len({image.tobytes() for image in many.values()}) == 15


class VAE:
    """Of which every latent is the image."""

    device, dtype, config = torch.device("cpu"), torch.float32, types.SimpleNamespace(scaling_factor=1.0)
    decode = staticmethod(lambda x: types.SimpleNamespace(sample=x))


def test_draw_fills_calls_up_and_hands_over_each_pair(monkeypatch):
    monkeypatch.setattr(sampler, "to_uint8", lambda x: x)
    calls = []
    encode = lambda prompts: {"caption": torch.tensor([[float(len(p))] for p in prompts])}
    sample = lambda z, caption: calls.append(len(z)) or z + caption[:, :, None, None]
    pairs = [((i, "x" * (i + 1)), seed) for i in range(3) for seed in (5, 6, 9)]
    parts = list(sample_pixart.draw({"s": sample}, encode, VAE(), (1, 2, 2), pairs, 4))
    assert calls == [4, 4, 4] and [len(some) for _, some, _, _ in parts] == [4, 4, 1]
    for (number, _), seed, image in [(*p, x) for _, some, images, _ in parts for p, x in zip(some, images)]:
        assert torch.equal(image, latents([seed], (1, 2, 2))[0][0] + number + 1)


def test_nan_is_an_error_that_names_the_seed():
    encode = lambda prompts: {"caption": torch.zeros(len(prompts), 1)}
    sample = lambda z, caption: z * float("nan")
    found = sample_pixart.draw({"s": sample}, encode, VAE(), (1, 2, 2), [((0, "a"), 7)], 2)
    with pytest.raises(UserError, match="s, seed 7 and on: the images contain NaN"):
        next(found)


def test_sheet_has_the_words_above_each_row(folder, here):
    assert run(folder, out="deeper/grid.png", teacher=True, steps=2, prompts="figure3") == 0
    red, dark = torch.zeros(3, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    red[:, 0] = 255
    a = np.asarray(sample_pixart.sheet([("words", red), ("more words " * 9, dark)]))
    b = np.asarray(sample_pixart.sheet([("other", red), ("more words " * 9, dark)]))
    rows = np.nonzero((a != b).any((1, 2)))[0]
    assert a.shape == b.shape and rows.size and rows.max() < 22
    assert (a[22 + 4 : 22 + 68, 4:68] == (255, 0, 0)).all() and (a[-68:-4, 4:68] == 0).all()
    assert a.shape[0] > 2 * (64 + 8) + 22 + 40  # the long words take more than one line
    names = [text.split()[1] for text in sampler.FIGURE3]
    assert names == ["small", "image", "playing"] and "Fabergé" in sampler.FIGURE3[1]
    assert len([*here.rglob("*")]) == 2


def test_a_prompt_that_a_c_locale_has_read():
    assert sampler.find_prompts(" Faberg\udcc3\udca9") == [(0, "Fabergé")]


def test_rows_of_the_sheet(folder, here, monkeypatch):
    rows = []
    monkeypatch.setattr(sample_pixart, "sheet", lambda found: rows.extend(found) or Image.new("RGB", (4, 4)))
    assert run(folder, out="grid.png", teacher=True, steps=2) == 0
    kinds = ("student, 1 step", "teacher, 2 steps")
    assert [words for words, _ in rows] == [f"{kind}: {prompt}" for prompt in PROMPTS for kind in kinds]
    assert_close(rows[2][1][1].permute(1, 2, 0).numpy(), by_hand(folder, PROMPTS[1], 7))


def test_guidance_pipeline_and_another_teacher(folder, here):
    save("other.safetensors", tiny(seed=9), sigma_init=2.5)
    how = dict(
        teacher="other.safetensors", steps=3, guidance=2.0, seeds=3, student=folder / "moved.safetensors"
    )
    assert run(folder, pipeline=folder / "teacher", **how) == 0
    found = pictures("out")["0001-000003-teacher.png"]
    assert_close(found, by_hand(folder, PROMPTS[1], 3, "other.safetensors", 3, 2.0))


def test_a_prompt_too_long_is_cut_with_a_warning(folder, here, capsys):
    assert run(folder, prompts="fox " * 200, seeds="1") == 0
    assert capsys.readouterr().err.endswith("warning: 1 prompts cut at 120 tokens\n")


def test_the_same_prompt_twice_has_images_of_both(folder, here):
    Path("p.txt").write_text("a fox\na fox\n", encoding="utf-8")
    assert run(folder, prompts="p.txt", seeds="1") == 0
    assert sorted(pictures("out")) == ["0000-000001.png", "0001-000001.png"]


def test_export(folder, here, capsys):
    foreign.tell.cache_clear()
    assert run(folder, out=None, export="pipe") == 0
    note = f"{folder}/student.safetensors: the teacher that it notes is {folder}/teacher\n"
    assert capsys.readouterr().out == f"{note}wrote pipe\n"
    pipe = PixArtAlphaPipeline.from_pretrained("pipe")
    z, _ = latents([3], (4, 8, 8))
    image = pipe(PROMPTS[0], latents=z, num_inference_steps=1, guidance_scale=1.0, output_type="np",
                 use_resolution_binning=False).images[0]  # fmt: skip
    assert_close((image * 255).round().astype(np.uint8), by_hand(folder, PROMPTS[0], 3))


WRONG = {  # what is changed -> what is said
    "sigma": (dict(sigma_init=2.0), "--sigma-init 2.0: but {student.safetensors} was distilled at 2.5"),
    "no sigma": (
        dict(student="none.safetensors"),
        "none.safetensors: not a student: its notes have sigma_init=None",
    ),
    "width": (dict(student="narrow.safetensors"), "teacher: its captions are 32 wide, the student's 16"),
    "no teacher": (dict(student="alone.safetensors"), "{alone.safetensors}: notes no teacher, so --pipeline"),
    "gone": (dict(student="moved.safetensors"), "gone/far/away: no such file or folder"),
    "no student": (dict(student="nothing"), "nothing: no such file or folder"),
    "a teacher": (dict(student="teacher"), "teacher: not a student: its notes have sigma_init=None"),
    "no text encoder": (
        dict(pipeline="no text"),
        "{no text}: has no text_encoder, so is not a whole pipeline",
    ),
    "no vae": (dict(pipeline="no vae"), "{no vae}: its vae cannot be loaded"),
    "file": (dict(pipeline="prompts.txt"), "{prompts.txt}: not a folder"),
    "size": (dict(teacher="large"), "{large}: makes images of another size than {student.safetensors}"),
    "empty": (dict(prompts="empty.txt"), "{empty.txt}: there are no prompts in it"),
    "binary": (dict(prompts="binary.txt"), "{binary.txt}: line 1: "),
    "no prompts": (dict(prompts="no.txt"), "{no.txt}: No such file"),
    "blank": (dict(prompts=" "), "--prompts is empty"),
    "bytes": (dict(prompts="a\udcff"), "nor in the terminal's encoding"),
    "seeds": (dict(seeds="0-x"), "--seeds: '0-x' is neither a seed nor a range"),
    "batch": (dict(batch=0), "--batch must be at least 1, got 0"),
    "steps": (dict(steps=0), "--steps must be at least 1, got 0"),
    "too many steps": (dict(steps=1000), "--steps must be at most 999, got 1000"),
    "guidance": (dict(guidance=float("nan")), "--guidance must be at least 1, got nan"),
    "file exists": (dict(out="there.png"), "{there.png}: exists already, and nothing is overwritten"),
    "folder in use": (dict(out="full"), "{full}: exists already"),
    "export in use": (dict(export="full"), "{full}: exists already"),
    "nothing": (dict(out=None), "nothing to do: give --out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_end_with_code_2_and_one_line(folder, here, capsys, case):
    changes, message = WRONG[case]
    paths = ("student", "pipeline", "teacher", "prompts", "out", "export")
    changes = {k: folder / v if k in paths and v and v != " " else v for k, v in changes.items()}
    before = sorted(folder.rglob("*"))
    assert run(folder, **changes) == 2
    err = capsys.readouterr().err
    for name in re.findall(r"{(.*?)}", message):
        message = message.replace(f"{{{name}}}", str(folder / name))
    assert message in err and err.count("\n") == 1, err
    assert sorted(folder.rglob("*")) == before and not [*here.iterdir()]


def test_several_processes_are_refused(folder, here, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, str(6 - ("RANK" in name)))
    assert run(folder) == 2 and not [*here.iterdir()]
    assert "6 processes would draw the same images" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file_s_name(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError(28, "No space left on device")))
    assert run(folder) == 2
    assert re.search(r"error: out/0000-00000\d.png: No space left on device\n\Z", capsys.readouterr().err)
    with pytest.raises(UserError, match=r"out/000000/000007.png: No space left"):
        sample.save_folder("out", [7], torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with (
        pytest.raises(OSError, match=r"a.part: cannot be written \(No space left"),
        growing(Path("a")) as file,
    ):
        file.write(b"a")
        raise OSError(28, "No space left on device")
    assert Path("a.part").read_bytes() == b"a"


def test_as_a_script(folder, here):
    script = ROOT / "edm/sample_pixart.py"
    bad = spawn(script, *words_of(settings(folder, sigma_init=9)))
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not bad.stdout, bad.stderr
    help = spawn(script, "--help")
    assert help.returncode == 0 and "--sigma-init" in help.stdout
    good = spawn(script, *words_of(settings(folder)))
    assert good.returncode == 0 and good.stdout.endswith("wrote 6 images to out\n"), good.stderr


def test_importing_the_script_does_not_import_diffusers():
    code = (
        "import sys, edm.sample_pixart; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    )
    done = spawn("-c", code, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
