"""The preference study: what build hides, and what tally counts and refuses."""

import csv
import json
import re
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edm import preference_study as study
from tests.common import ROOT, spawn
from toy import files


def write_images(folder, n, seed, size=(24, 16)):
    """n images whose names, metadata and dates all tell whose they are."""
    folder.mkdir(parents=True)
    rng, text = np.random.default_rng(seed), PngInfo()
    levels = (256, 8)[seed]  # the second compresses better
    text.add_text("parameters", f"made by {folder.name}")
    for i in range(n):
        image = Image.fromarray(rng.integers(0, levels, (size[1], size[0], 3), dtype=np.uint8))
        image.save(folder / f"{folder.name}-{i + 8}.png", pnginfo=text, dpi=(72 + seed, 72))  # 8, 9, 10, ...


def inputs(root, n=4, prompts=None):
    """-> the first arguments of build."""
    for seed, name in enumerate(("student", "teacher")):
        write_images(root / "runs" / name, n, seed)
    prompts = prompts or [f"prompt number {i}" for i in range(n)]
    (root / "prompts.txt").write_text("\n".join(prompts), "utf-8")
    return ["build", root / "prompts.txt", root / "runs/student", root / "runs/teacher"]


def run(*args):
    if code := study.main([str(arg) for arg in args]):
        raise SystemExit(code)


def build(root, *options, **more):
    """-> (the study's folder, its key)."""
    run(*inputs(root, **more), root / "out", *options)
    return root / "out", json.loads((root / "out.key.json").read_text())


def refused(capsys, *args):
    """Run, see exit code 2 and one line on stderr only -> the line."""
    with pytest.raises(SystemExit) as exit:
        run(*args)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pixels(path):
    return np.asarray(Image.open(path))


def chunks(data):
    """The types of a PNG's chunks."""
    types, place = [], 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        types.append(data[place + 4 : place + 8])
        place += 12 + length
    return types


# ----------------------------------------------------------------------------------------------
# build


def test_a_seed_fixes_the_study_and_no_seed_does_not(tmp_path):
    args = inputs(tmp_path)
    for words in ("a --seed 5", "b --seed 5", "c --seed 6", "d", "e"):
        name, *options = words.split()
        run(*args, tmp_path / name, *options)
    a, b, c, d, e = (everything(tmp_path / name) for name in "abcde")
    assert a == b and a.keys() != c.keys() and d.keys() != e.keys()
    assert (tmp_path / "a.key.json").read_text() == (tmp_path / "b.key.json").read_text()


def test_the_folder_does_not_tell_which_is_which(tmp_path):
    out, key = build(tmp_path)
    files = everything(out)
    assert sorted(p.suffix for p in files) == [".html"] + 8 * [".png"]
    for path, data in files.items():
        assert re.fullmatch(r"index\.html|[0-9a-f]{16}\.png", str(path))
        for word in (b"student", b"teacher", b"runs", b"made by", bytes(tmp_path)):
            assert word not in data.lower()
    pngs = [path for path in out.iterdir() if path.suffix == ".png"]
    assert all(set(chunks(path.read_bytes())) == {b"IHDR", b"IDAT", b"IEND"} for path in pngs)
    assert len({path.stat().st_size for path in pngs}) == len({path.stat().st_mtime for path in pngs}) == 1
    shown = json.loads(re.search(r'id="study">(.*)</script>', (out / "index.html").read_text())[1])
    assert shown.keys() == {"id", "title", "pairs"}
    assert all(pair.keys() == {"prompt", "images"} for pair in shown["pairs"])
    assert [pair["images"] for pair in shown["pairs"]] == sorted(
        sorted([p["a"], p["b"]]) for p in key["pairs"]
    )


def test_neither_system_tends_to_the_front(tmp_path):
    _, key = build(tmp_path, n=100)
    assert 25 < sum(pair["a"] < pair["b"] for pair in key["pairs"]) < 75  # else: once in two million builds


def test_the_ith_prompt_belongs_to_the_ith_image_in_natural_order(tmp_path):
    out, key = build(tmp_path, n=5)
    for i, pair in enumerate(key["pairs"]):
        assert pair["prompt"] == f"prompt number {i}"
        for system, name in ("a", "student"), ("b", "teacher"):
            original = tmp_path / "runs" / name / f"{name}-{i + 8}.png"
            assert np.array_equal(pixels(out / pair[system]), pixels(original))


def test_formats_folders_and_orientation(tmp_path):
    """Grey, JPEG, images in subfolders as edm/sample.py writes them, and one that a camera turned."""
    args = inputs(tmp_path, n=3)
    student = tmp_path / "runs/student"
    grey = Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24).astype(np.uint8))
    grey.save(student / "student-8.png")
    (student / "student-9.png").unlink()
    turned, exif = Image.new("RGB", (16, 24), "red"), Image.Exif()
    exif[0x0112] = 6
    turned.save(student / "student-9.JPG", exif=exif)
    (student / "student-10").mkdir()
    (student / "student-10.png").rename(student / "student-10/3.png")
    (student / ".hidden.png").write_bytes(b"")
    (student / "notes.txt").write_text("no image")
    run(*args, tmp_path / "out")
    key = json.loads((tmp_path / "out.key.json").read_text())
    shown = [pixels(tmp_path / "out" / pair["a"]) for pair in key["pairs"]]
    assert all(x.shape == (16, 24, 3) for x in shown)
    assert np.array_equal(shown[0], np.repeat(np.asarray(grey)[..., None], 3, 2))
    assert np.array_equal(shown[2], pixels(student / "student-10/3.png"))


def test_bombs_and_programs_are_no_images(tmp_path, monkeypatch):
    for name, size, kind in ("large", 9600, "PNG"), ("program", 8, "EPS"), ("small", 8, "PNG"):
        Image.new("L", (size, size)).save(tmp_path / name, kind)
    monkeypatch.setattr(study, "MAX_PIXELS", 63)
    for name, words in ("large", "Bomb"), ("program", "cannot identify"), ("small", "8x8 pixels are more"):
        with pytest.raises(files.UserError, match=f"{name}: .*{words}"):
            study.read_image(tmp_path / name)


def test_another_title_prompt_or_pixel_makes_another_study(tmp_path):
    args, ids = inputs(tmp_path), []

    def add(name, *options):
        run(*args, tmp_path / name, "--seed", 0, *options)
        ids.append(json.loads((tmp_path / f"{name}.key.json").read_text())["study"])

    add("a")
    add("b", "--title", "Other")
    (tmp_path / "prompts.txt").write_text("1\n2\n3\n4")
    add("c")
    Image.new("RGB", (24, 16)).save(tmp_path / "runs/teacher/teacher-9.png")
    add("d")
    assert len(set(ids)) == 4


def image(name, mode="RGB", size=(24, 16)):
    """Put another image in the place of one."""
    return lambda root: Image.new(mode, size).save(root / "runs" / name)


BAD_INPUTS = {  # what is done to good inputs -> words of the refusal
    "an image too few": (lambda r: (r / "runs/teacher/teacher-9.png").unlink(), r"4 prompts, but 4 .* and 3"),
    "a prompt too many": (lambda r: (r / "prompts.txt").write_text("a\nb\nc\nd\ne"), "5 prompts, but 4"),
    "no folder": (lambda r: shutil.rmtree(r / "runs/student"), "runs/student: no such folder"),
    "no prompts": (lambda r: (r / "prompts.txt").unlink(), "prompts.txt: No such file"),
    "damaged": (
        lambda r: (r / "runs/teacher/teacher-10.png").write_bytes(b"\x89PNG"),
        r"teacher-10\.png: \w",
    ),
    "sizes": (
        image("teacher/teacher-9.png", size=(16, 24)),
        "student-9.png and .*teacher-9.png: unequal sizes",
    ),
    "16 bits": (image("student/student-8.png", "I;16"), "student-8.png: need 8 bits"),
    "transparency": (image("student/student-8.png", "RGBA"), "student-8.png: need 8 bits, .* mode RGBA"),
    "the folder exists": (lambda r: (r / "out").mkdir(), "out: exists already"),
    "the key exists": (lambda r: (r / "out.key.json").touch(), "out.key.json: exists already"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_build_refuses_and_leaves_nothing(case, tmp_path, capsys):
    args = inputs(tmp_path)
    spoil, words = BAD_INPUTS[case]
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert re.search(words, refused(capsys, *args, tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_build_refuses_a_key_inside_the_folder_and_a_folder_against_itself(tmp_path, capsys):
    args = inputs(tmp_path)
    assert "must not lie in" in refused(capsys, *args, tmp_path / "out", "--key", tmp_path / "out/key.json")
    assert "must not lie in" in refused(capsys, *args, tmp_path / "out", "--key", tmp_path / "x/../out/key")
    assert "compared with itself" in refused(capsys, *args[:3], args[2], tmp_path / "out")
    run(*args, tmp_path / "out", "--key", tmp_path / "elsewhere.json")
    assert (tmp_path / "elsewhere.json").exists() and not (tmp_path / "out.key.json").exists()


# ----------------------------------------------------------------------------------------------
# tally


def make_key(n, prompts=None):
    pairs = [dict(prompt=p, a=f"a{i}", b=f"b{i}") for i, p in enumerate(prompts or map(str, range(n)))]
    return {"study": "s", "a": "out/student", "b": "out/teacher", "pairs": pairs}


def make_answers(participant, choices, swapped=()):
    """choices: {pair: "a" or "b"}; swapped: the pairs that showed b first."""
    answers = []
    for i, system in choices.items():
        first, second = "ba" if i in swapped else "ab"
        answers.append(dict(first=f"{first}{i}", second=f"{second}{i}", chosen=f"{system}{i}"))
    return {"study": "s", "participant": participant, "answers": answers}


def write_tally(root, key, exports):
    """-> the arguments of tally."""
    (root / "key.json").write_text(json.dumps(key))
    for i, export in enumerate(exports):
        (root / f"p{i}.json").write_text(export if isinstance(export, str) else json.dumps(export))
    return ["tally", root / "key.json", *(root / f"p{i}.json" for i in range(len(exports)))]


def test_wilsons_interval_by_hand():
    # 8 of 10, z = 1.959964: (0.8 + z^2 / 20 -+ z sqrt(0.8 * 0.2 / 10 + z^2 / 400)) / (1 + z^2 / 10)
    everyone = [{0: (i < 8, True)} for i in range(10)] + [{}]
    prompt, total = study.table(make_key(1), everyone)
    assert prompt[1:] == total[1:] and total[0] == "all votes" and total[1:4] == (8, 2, 0.8)
    assert total[4:] == pytest.approx((0.4901625, 0.9433178), abs=1e-7)
    # 0 of n: from 0 to z^2 / (n + z^2)
    assert study.table(make_key(1), [{0: (False, True)}] * 4)[1][3:] == pytest.approx(
        (0, 0, 0.4898909), abs=1e-7
    )
    assert np.isnan(study.table(make_key(1), [])[1][3:]).all()


def test_the_sign_test_by_hand():
    one = lambda a, b: {i: (i < a, True) for i in range(a + b)}
    # five prefer A, one B, one is even: 2 (1 + 6) / 2^6
    everyone = [one(3, 0), one(2, 1), one(1, 0), one(3, 1), one(4, 0), one(0, 4), one(2, 2)]
    assert study.sign_test(everyone) == (5, 1, 1, pytest.approx(0.21875, abs=1e-12))
    assert study.sign_test([one(9, 0)]) == (1, 0, 0, 1)  # nine votes of one person are one person
    assert study.sign_test([one(1, 1), {}]) == (0, 0, 2, 1)


def test_tally_of_files(tmp_path, capsys):
    key = make_key(3, ["a $10 cat, not $5", "two\nlines, " + "long " * 20, "nobody"])
    exports = [make_answers("p", {0: "a", 1: "a"}, swapped=[1]), make_answers("q", {0: "b", 1: "a"}),
               make_answers("r", {0: "a"}), "\ufeff" + json.dumps(make_answers("s", {}))]  # fmt: skip
    run(*write_tally(tmp_path, key, exports), "--out", tmp_path / "t.csv", "--figure", tmp_path / "f.png")
    printed = capsys.readouterr().out
    assert (
        "A: out/student\nB: out/teacher\n4 participants, 4 of them incomplete\n5 votes of 12, 3 for"
        in printed
    )
    lines = printed.splitlines()
    assert lines[6].split("  ")[0] == "a $10 cat, not $5" and re.search(
        r"2 +1 +66.7% +20.8% to 93.9%", lines[6]
    )
    assert re.match(r"two lines, long .*\.\.\. +2 +0 +100.0% +34.2% to 100.0%$", lines[7])
    assert re.match(r"nobody +0 +0 +no votes$", lines[8])
    assert re.match(r"all votes +4 +1 +80.0% +37.6% to 96.4%$", lines[9])
    assert "2 prefer A, 0 prefer B, 2 are even; exact two-sided sign test p = 0.5" in printed
    rows = list(csv.reader((tmp_path / "t.csv").read_text("utf-8").splitlines(keepends=True)))
    assert rows[0] == ["prompt", "a", "b", "preference", "low", "high"]
    assert [r[0] for r in rows[1:]] == [*(p["prompt"] for p in key["pairs"]), "all votes"]
    assert [float(x) for x in rows[1][1:]] == pytest.approx([2, 1, 2 / 3, 0.2076596, 0.9385081], abs=1e-6)
    assert rows[3][1:] == ["0", "0", "nan", "nan", "nan"]
    assert Image.open(tmp_path / "f.png").width == 700


def test_the_figure_shows_shares_and_intervals():
    rows = study.table(make_key(2), [{0: (True, True), 1: (i > 0, True)} for i in range(4)])
    ax = study.figure(make_key(2), rows).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [1, 0.75, 0.875]
    (intervals,) = ax.collections
    for (prompt, *_, low, high), line in zip(rows, intervals.get_segments()):
        assert line[:, 0] == pytest.approx([low, high]), prompt
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "all votes"]
    assert not any(label.get_parse_math() for label in [*ax.get_yticklabels(), ax.title])


def with_answer(**change):
    export = make_answers("p", {0: "a", 1: "b"})
    export["answers"][1] |= change
    export["answers"][1] = {k: v for k, v in export["answers"][1].items() if v is not None}
    return export


GOOD = make_answers("q", {0: "a", 1: "a"})
BAD_EXPORTS = {  # a file -> words of the refusal
    "other study": (GOOD | {"study": "x"}, "of study 'x'"),
    "other study's images": (with_answer(first="c1"), "image 'c1' is not of this study"),
    "unknown choice": (with_answer(chosen="c1"), "image 'c1'"),
    "choice of another pair": (with_answer(chosen="a0"), "not a pair and one of the two"),
    "two pairs mixed": (with_answer(first="a0"), "not a pair"),
    "the same twice": (with_answer(first="b1", second="b1"), "not a pair"),
    "a pair twice": (GOOD | {"answers": GOOD["answers"] + GOOD["answers"][:1]}, "answers a0 and b0 twice"),
    "no choice": (with_answer(chosen=None), '"chosen" is missing'),
    "no first": (with_answer(first=None), '"first" is missing'),
    "a number": (with_answer(chosen=1), '"chosen" is missing, or'),
    "no participant": (GOOD | {"participant": ""}, '"participant" is missing'),
    "no answers": ({"study": "s", "participant": "p"}, '"answers" is missing'),
    "answers of another kind": (GOOD | {"answers": {"0": "a"}}, '"answers" is missing, or'),
    "an answer of another kind": (GOOD | {"answers": [["a0", "b0"]]}, '"first" is missing'),
    "a list": ([GOOD], '"study" is missing'),
    "half a file": (json.dumps(GOOD)[:40], "JSONDecodeError"),
    "nothing": ("", "JSONDecodeError"),
    "very deep": ("[" * 100_000, "RecursionError"),
    "lines in names": (with_answer(first="x\ny"), r"image 'x\\ny'"),
}


@pytest.mark.parametrize("case", BAD_EXPORTS)
def test_tally_refuses_and_names_the_file(case, tmp_path, capsys):
    export, words = BAD_EXPORTS[case]
    args = write_tally(tmp_path, make_key(2), [make_answers("z", {0: "b"}), export])
    error = refused(capsys, *args, "--out", tmp_path / "t.csv", "--figure", tmp_path / "f.png")
    assert re.search(rf"error: \S*p1\.json: .*{words}", error), error
    assert not (tmp_path / "t.csv").exists() and not (tmp_path / "f.png").exists()


def test_tally_refuses_a_participant_twice_missing_files_and_overwriting(tmp_path, capsys):
    args = write_tally(tmp_path, make_key(2), [GOOD, make_answers("p", {0: "b"}), GOOD])
    assert re.search(r"p2\.json: participant 'q' is in \S*p0\.json already", refused(capsys, *args))
    assert "p7.json: No such file" in refused(capsys, *args[:3], tmp_path / "p7.json")
    (tmp_path / "t.csv").write_text("kept")
    assert "t.csv: exists already" in refused(capsys, *args[:3], "--out", tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "kept"


@pytest.mark.parametrize("change", [{"pairs": []}, {"study": None}, {"pairs": [{"a": "x", "b": "y"}]},
                                    {"pairs": [dict(prompt="p", a="x", b="x")]}])  # fmt: skip
def test_tally_refuses_what_is_no_key(change, tmp_path, capsys):
    assert "key.json: " in refused(capsys, *write_tally(tmp_path, make_key(2) | change, [GOOD]))


def test_as_a_command_from_any_folder(tmp_path):
    args = write_tally(tmp_path, make_key(2), [GOOD, "{"])
    done = spawn(ROOT / "edm/preference_study.py", *args, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "p1.json" in done.stderr and "Traceback" not in done.stderr


choices = st.dictionaries(st.integers(0, 4), st.sampled_from("ab"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(choices, st.sets(st.integers(0, 4))), max_size=7), st.randoms())
def test_random_exports_add_up(tmp_path_factory, people, random):
    root, key = tmp_path_factory.mktemp("tally"), make_key(5)
    exports = [make_answers(f"p{i}", *person) for i, person in enumerate(people)]
    for export in exports:
        random.shuffle(export["answers"])
    paths = write_tally(root, key, exports)[2:]
    everyone = [study.read_answers(path, key)[1] for path in paths]
    *rows, total = study.table(key, everyone)
    given = [(i, c) for chosen, _ in people for i, c in chosen.items()]
    assert [r[1:3] for r in rows] == [(given.count((i, "a")), given.count((i, "b"))) for i in range(5)]
    assert total[1:3] == tuple(sum(r[k] for r in rows) for k in (1, 2)) and sum(total[1:3]) == len(given)
    first = sum((c == "b") == (i in swapped) for chosen, swapped in people for i, c in chosen.items())
    assert f"{len(given)} votes of {5 * len(people)}, {first} for" in "\n".join(
        study.report(key, everyone, [total])
    )
    for _, a, b, share, low, high in [*rows, total]:
        assert np.isnan(low) if a + b == 0 else 0 <= low <= share == a / (a + b) <= high <= 1
    # exchanging the systems mirrors everything
    mirrored = {**key, "pairs": [p | {"a": p["b"], "b": p["a"]} for p in key["pairs"]]}
    others = [study.read_answers(path, mirrored)[1] for path in paths]
    back = study.table(mirrored, others)[-1]
    assert back[1:3] == total[2:0:-1] and (
        not given or back[3:] == pytest.approx([1 - total[k] for k in (3, 5, 4)])
    )
    (a, b, even, p), (b2, a2, even2, p2) = study.sign_test(everyone), study.sign_test(others)
    assert (
        (a, b, even, p) == (a2, b2, even2, pytest.approx(p2)) and a + b + even == len(people) and 0 < p <= 1
    )
