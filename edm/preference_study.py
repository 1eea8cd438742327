"""Ask people which of two systems makes the better images (B.4, Figure 4), not telling them which is which.

    python edm/preference_study.py build prompts.txt out/student out/teacher out/study
    python edm/preference_study.py tally out/study.key.json answers/*.json --out table.csv --figure table.png

build writes a folder with the page index.html, which needs no server: zip it, or put it on a web space.
Each participant sees the pairs in an order of their own, either image first, chooses one of each, and
sends back the file that the last page offers.  tally counts these; A is the first of the two folders.
Which image is whose stands in the key, outside the folder: keep it.  Look at all images before you share.
"""

import csv
import hashlib
import json
import os
import random
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy.stats import binomtest

from edm.images.foreign import read_json
from edm.text.prompts import read_prompts
from toy import command
from toy.files import UserError, check_apart, check_new, naming, replacing

SUFFIXES, FORMATS = (".png", ".jpg", ".jpeg", ".webp"), ("PNG", "JPEG", "WEBP")  # others run Ghostscript
MAX_PIXELS = 2**24  # of an image
DATE = 946_684_800  # the year 2000; zip files know none before 1980


def image_files(folder):
    """The images below a folder, hidden ones aside, in natural order: 2.png comes before 10.png."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES]
    natural = lambda name: [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", name)]
    return [folder / name for name in sorted(names, key=natural) if not re.search(r"(^|/)\.", name)]


def read_image(path):
    """-> (H, W, 3), uint8: the pixels as viewers show them, and nothing else of what is in the file."""
    bomb = dict(action="error", category=Image.DecompressionBombWarning)
    with naming(path), warnings.catch_warnings(**bomb), Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
        if image.mode not in ("L", "RGB"):
            raise UserError(f"need 8 bits, grey or RGB, not an image of Pillow's mode {image.mode}")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def write_study(folder, title, pairs):
    """pairs: [(prompt, {hidden name: path of an image, of the other})] -> the study's id.

    Everything is in the order of the hidden names, in the page as on the disk.  The id is a digest of
    what participants see: answers to another version of a study are not taken for answers to this one.
    """
    shown, digest = [], hashlib.sha256()
    for prompt, files in sorted(pairs, key=lambda pair: min(pair[1])):
        pixels = {name: read_image(files[name]) for name in sorted(files)}
        if len({x.shape for x in pixels.values()}) > 1:
            raise UserError("{} and {}: unequal sizes would tell them apart".format(*files.values()))
        for name, x in pixels.items():
            digest.update(x.tobytes())
            Image.fromarray(x).save(folder / name, compress_level=0)  # so that files are equally long,
            os.utime(folder / name, (DATE, DATE))  # and equally old
        shown.append({"prompt": prompt, "images": list(pixels)})
    digest.update(json.dumps([title, shown]).encode())
    study = {"id": digest.hexdigest()[:16], "title": title, "pairs": shown}
    text = json.dumps(study).replace("<", r"\u003c")  # or a prompt could close the page's script
    page = Path(__file__).with_suffix(".html").read_text("utf-8").replace("@STUDY@", text)
    (folder / "index.html").write_text(page, "utf-8")
    return study["id"]


def build(args):
    out, key = args.out, args.key or args.out.with_name(args.out.name + ".key.json")
    if key.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{key}: the key must not lie in the folder that participants get")
    check_new(out), check_new(key)
    prompts, a, b = read_prompts(args.prompts), image_files(args.folder_a), image_files(args.folder_b)
    if not 0 < len(prompts) == len(a) == len(b):
        folders = f"{len(a)} images in {args.folder_a} and {len(b)} in {args.folder_b}"
        raise UserError(f"{args.prompts}: {len(prompts)} prompts, but {folders}")
    if args.folder_a.resolve() == args.folder_b.resolve():
        raise UserError(f"{args.folder_a}: is compared with itself")
    rng = random.SystemRandom() if args.seed is None else random.Random(args.seed)
    names = [[f"{rng.getrandbits(64):016x}.png" for _ in "ab"] for _ in prompts]
    pairs = [(prompt, dict(zip(hidden, files))) for prompt, hidden, *files in zip(prompts, names, a, b)]
    with replacing(key) as temporary_key, replacing(out) as folder:
        folder.mkdir()
        record = {"study": write_study(folder, args.title, pairs), "a": str(args.folder_a)}
        record |= {"b": str(args.folder_b), "pairs": [dict(prompt=p, a=x, b=y) for p, (x, y) in pairs]}
        temporary_key.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"wrote {out}, {len(pairs)} pairs, for the participants, and {key}, for you alone")


def fields(record, **kinds):
    """The values of a JSON record's named fields.  Raises UserError if one is missing or of another kind."""
    for name, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind) or record[name] == "":
            raise UserError(f'"{name}" is missing, or not of the right kind')
    return [record[name] for name in kinds]


def read_key(path):
    """-> the record that build wrote."""
    with naming(path):
        key = read_json(path)
        pairs = fields(key, pairs=list, study=str, a=str, b=str)[0]
        hidden = [name for pair in pairs for name in fields(pair, a=str, b=str, prompt=str)[:2]]
        if not hidden or len(set(hidden)) < len(hidden):
            raise UserError("no pairs in it, or an image twice")
    return key


def read_answers(path, key):
    """-> (participant, {index of a pair: (A was chosen, the image shown first was chosen)}).

    Raises UserError, naming the file, for anything that the page of this study does not write.
    """
    place = {pair[system]: (i, system) for i, pair in enumerate(key["pairs"]) for system in "ab"}
    with naming(path):
        export, votes = read_json(path), {}
        study, participant, answers = fields(export, study=str, participant=str, answers=list)
        if study != key["study"]:
            raise UserError(f"of study {study[:40]!r}, but the key is of {key['study']!r}")
        for answer in answers:
            names = first, second, chosen = fields(answer, first=str, second=str, chosen=str)
            if unknown := [name for name in names if name not in place]:
                raise UserError(f"image {unknown[0][:40]!r} is not of this study")
            pair, system = place[chosen]
            if {place[first], place[second]} != {(pair, "a"), (pair, "b")}:
                raise UserError(f"{first}, {second} and {chosen} are not a pair and one of the two")
            if pair in votes:
                raise UserError(f"answers {first} and {second} twice")
            votes[pair] = system == "a", chosen == first
        return participant, votes


def table(key, everyone):
    """-> [(prompt, votes for A, votes for B, share of A, low, high)], at last that of all votes.

    low, high: Wilson's 95 % interval of the share; without votes, all three are nan.
    """
    rows = [(p["prompt"], [v[i][0] for v in everyone if i in v]) for i, p in enumerate(key["pairs"])]
    rows.append(("all votes", [vote for _, votes in rows for vote in votes]))
    share = lambda a, n: (a / n, *binomtest(a, n).proportion_ci(0.95, "wilson")) if n else (np.nan,) * 3
    return [(prompt, sum(v), len(v) - sum(v), *share(sum(v), len(v))) for prompt, v in rows]


def sign_test(everyone):
    """Do more participants prefer A, by most of their votes, than B?  Those who are even do not count.

    -> (for A, for B, even, exact two-sided p under the hypothesis that either is as likely).
    """
    leads = [sum(1 if a else -1 for a, _ in votes.values()) for votes in everyone]
    a, b = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    return a, b, len(leads) - a - b, binomtest(a, a + b).pvalue if a + b else 1.0


def short(text, width=46):
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def report(key, everyone, rows):
    """What tally prints, line by line."""
    pairs, votes = len(key["pairs"]), [vote for one in everyone for vote in one.values()]
    yield f"A: {key['a']}\nB: {key['b']}"
    yield f"{len(everyone)} participants, {sum(len(one) < pairs for one in everyone)} of them incomplete"
    yield f"{len(votes)} votes of {len(everyone) * pairs}, {sum(v[1] for v in votes)} for the first shown\n"
    yield f"{'prompt':48}{'A':>6}{'B':>6}{'prefer A':>10}   95% interval"
    for prompt, a, b, share, low, high in rows:
        numbers = f"{share:10.1%}   {low:.1%} to {high:.1%}" if a + b else f"{'no votes':>10}"
        yield f"{short(prompt):48}{a:6}{b:6}{numbers}"
    yield "\nThe intervals (Wilson's) take votes for independent; those of one person are not. So, by person:"
    a, b, even, p = sign_test(everyone)
    yield f"{a} prefer A, {b} prefer B, {even} are even; exact two-sided sign test p = {p:.3g}"


def figure(key, rows):
    """A bar for each prompt, the share of A, with its interval; the last one is that of all votes."""
    n, (share, low, high) = len(rows) - 1, np.array([row[3:] for row in rows]).T
    fig = Figure(figsize=(7, 1.5 + 0.3 * n), dpi=100, layout="constrained")
    ax, places = fig.subplots(), [*range(n), n + 0.5]
    ax.barh(places, share, xerr=np.abs([share - low, high - share]), color=["C0"] * n + ["C1"], alpha=0.6)
    ax.axvline(0.5, color="grey", lw=1, ls="--")
    ax.set(xlim=(0, 1), ylim=(n + 1, -0.6), xlabel="share of votes for A, 95% interval (Wilson)")
    ax.set_yticks(places, [short(row[0]) for row in rows], fontsize=8, parse_math=False)
    ax.set_title(short(f"A: {key['a']}, B: {key['b']}", 80), fontsize=9, parse_math=False)
    return fig


def tally(args):
    for path in filter(None, (args.out, args.figure)):
        check_new(path)
    check_apart(args.out, args.figure)
    key, everyone, seen = read_key(args.key), [], {}
    for path in args.answers:
        participant, votes = read_answers(path, key)
        if participant in seen:
            raise UserError(f"{path}: participant {participant[:40]!r} is in {seen[participant]} already")
        seen[participant] = path
        everyone.append(votes)
    rows = table(key, everyone)
    print("\n".join(report(key, everyone, rows)))
    if args.out:
        with replacing(args.out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("prompt", "a", "b", "preference", "low", "high"), *rows])
    if args.figure:
        with naming(args.figure), replacing(args.figure) as temporary:
            figure(key, rows).savefig(temporary)
    print("".join(f"wrote {path}\n" for path in (args.out, args.figure) if path), end="")


def main(argv=None):
    parser = command.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build,tally}")
    add = commands.add_parser("build", help="write the folder for participants, and the key").add_argument
    add("prompts", type=Path, help="a .txt with a prompt a line, or a .jsonl or .csv with text")
    add("folder_a", type=Path, help="images of A: in order of their names, those of the prompts")
    add("folder_b", type=Path, help="images of B, likewise, of the same sizes")
    add("out", type=Path, help="folder to write; must not exist yet")
    add("--key", type=Path, help="file for the key (default OUT.key.json)")
    add("--title", default="Which picture is better?", help="heading of the page (default: %(default)s)")
    add("--seed", type=int, within="seed", help="fix the hidden names; who knows it can work out the key")
    add = commands.add_parser("tally", help="count the answers: shares, intervals, a test").add_argument
    add("key", type=Path, help="the key that build wrote")
    add("answers", type=Path, nargs="+", help="files that participants sent")
    add("--out", type=Path, metavar="FILE.csv", help="write the table here too")
    add("--figure", type=Path, metavar="FILE.png", help="draw it")

    def work():
        args = parser.parse_args(argv)
        {"build": build, "tally": tally}[args.command](args)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
