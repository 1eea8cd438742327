"""Prompts: what each kind of file gives, and captions that are fetched, by commands that may be killed."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edm import prompts as module
from edm.text.prompts import read_prompts
from tests.common import ENVIRONMENT, ROOT, spawn
from toy.files import UserError

SCRIPT = ROOT / "edm/prompts.py"
run = partial(spawn, SCRIPT)


def refused(*words, says):
    """The real command must leave with 2 and one line that holds these words."""
    found = run(*words)
    assert found.returncode == 2, found
    assert found.stderr.count("\n") == 1 and re.search(says, found.stderr), found.stderr


def fails(says, function, *args, **how):
    with pytest.raises(UserError, match=says) as caught:
        function(*args, **how)
    assert "\n" not in str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def kill_when(condition, *words):
    """Start the command and end it with SIGKILL as soon as the condition holds."""
    command = [sys.executable, SCRIPT, *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


# --- files of prompts ----------------------------------------------------------------------------


def in_form(prompts, ending):
    if ending == "txt":
        return "".join(prompt + "\n" for prompt in prompts)
    if ending == "jsonl":
        return "".join(json.dumps({"key": 1, "text": prompt}) + "\n" for prompt in prompts)
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([["id", "text"], *([i, prompt] for i, prompt in enumerate(prompts))])
    return file.getvalue()


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_prompts_come_back_from_every_kind_of_file(ending, data):
    unfit = "\0\ufeff" + "\n" * (ending == "txt")  # a line of .txt cannot hold its own end
    texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=unfit), max_size=30)
    prompts = data.draw(st.lists(texts, max_size=8))
    bom = data.draw(st.sampled_from(["", "\ufeff"]))
    expected = [prompt.strip() for prompt in prompts if prompt.strip()]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"p.{ending}", bom + in_form(prompts, ending))
        if expected:
            assert read_prompts(path) == expected
        else:
            fails("no prompts", read_prompts, path)


def test_lines_may_end_as_on_windows_and_the_last_one_not_at_all(tmp_path):
    for name, content, prompts in (
        ("p.TXT", "\ufeffa cat\r\n\r\n  a dog\t\r\nx", ["a cat", "a dog", "x"]),
        ("p.csv", '\ufefftext,n\r\n"a,\r\nb",1\r\nc,2', ["a,\r\nb", "c"]),
        ("p.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": " b "}', ["a", "b"]),
    ):
        assert read_prompts(write(tmp_path / name, content)) == prompts


BAD_PROMPTS = {
    "empty.txt": ("", "there are no prompts"),
    "blank.txt": (" \n\t\n", "there are no prompts"),
    "empty.jsonl": ("", "there are no prompts"),
    "empty.csv": ("", "there are no prompts"),
    "names.csv": ("text\n", "there are no prompts"),
    "picture.txt": (b"fine\n\x89PNG\0\0", "line 2: a binary file"),
    "latin.txt": ("ok\ncafé\n".encode("latin-1"), "line 2: not UTF-8"),
    "utf16.csv": ("text\na\n".encode("utf-16"), "line 1: a binary file"),
    "half.jsonl": ('{"text": "a"}\n{"text": "\\ud800"}', "line 2: not UTF-8"),
    "prompts.parquet": (b"PAR1", r"prompts are read from \.txt, \.jsonl and \.csv"),
    "prompts": ("a", r"prompts are read from \.txt, \.jsonl and \.csv"),
    "other.jsonl": ('{"text": "a"}\n{"prompt": "b"}', 'line 2: no "text"'),
    "number.jsonl": ('{"text": 3}', 'line 1: no "text", or one that is not a string'),
    "list.jsonl": ('["text"]', 'line 1: no "text"'),
    "broken.jsonl": ('{"text": "a"}\n{"text": ', "line 2: "),
    "deep.jsonl": ("[" * 100_000, "line 1: "),
    "other.csv": ("prompt,n\na,1", 'line 1: there is no column "text"'),
    "short.csv": ("n,text\n1,a\n2\n", 'line 3: no "text"'),
    "quote.csv": ('text\n"a', "line 2: "),
    "long.csv": ("text\n" + "a" * 200_000, "line 2: field larger"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_faulty_prompts_are_named_with_their_line(tmp_path, name):
    content, says = BAD_PROMPTS[name]
    path = write(tmp_path / name, content)
    fails(f"^{re.escape(str(path))}: {says}", read_prompts, path)


def test_no_file_and_a_folder_are_refused(tmp_path):
    fails("none.txt: No such file", read_prompts, tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    fails("folder.txt: Is a directory", read_prompts, tmp_path / "folder.txt")


# --- fetch ---------------------------------------------------------------------------------------


def archive(path, texts, name="./sa_{i}.txt"):
    """As SA1B_caption.tar.gz: a small .txt for each caption."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for i, text in enumerate(texts):
            content = text if isinstance(text, bytes) else text.encode()
            entry = tarfile.TarInfo(name.format(i=i))
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


TEXTS = [f"  Caption {i}, of a café\nin two lines\n" for i in range(40)]


def test_fetch_copies_every_caption(tmp_path):
    pytest.importorskip("datasets", reason="fetch needs the package datasets")
    source, out = archive(tmp_path / "c.tar.gz", TEXTS), tmp_path / "out.jsonl"
    done = run("fetch", out, "--source", source)
    assert done.returncode == 0 and "40 captions" in done.stdout, done
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [{"text": text.strip(), "key": f"./sa_{i}"} for i, text in enumerate(TEXTS)]
    assert read_prompts(out) == [text.strip() for text in TEXTS]
    whole = out.read_bytes()
    refused("fetch", out, "--source", source, says="exists already")
    assert out.read_bytes() == whole and len(list(tmp_path.iterdir())) == 2


def test_a_fetch_goes_on_from_wherever_it_was_killed(tmp_path, capsys):
    pytest.importorskip("datasets", reason="fetch needs the package datasets")
    source, out = archive(tmp_path / "c.tar", TEXTS), tmp_path / "out.jsonl"
    part, words = tmp_path / "out.jsonl.part", ["fetch", str(out), "--source", str(source)]
    module.main([*words, "--limit", "9"])
    whole = out.read_bytes()
    assert whole.count(b"\n") == 9
    out.unlink()
    for length in (0, 1, 30, whole.index(b"\n"), whole.index(b"\n") + 1, 400, len(whole) - 1, len(whole)):
        write(part, whole[:length])
        module.main([*words, "--limit", "9"])
        assert out.read_bytes() == whole and not part.exists()
        out.unlink()
    other = archive(tmp_path / "o.tar", TEXTS[::-1])
    for words, says in (
        (["--source", str(other)], f"not those that {part} was begun with"),
        (["--source", str(archive(tmp_path / "s.tar", TEXTS[:3]))], f"not those that {part} was begun with"),
        (["--source", str(source), "--limit", "8"], "holds 9 captions already, more than --limit"),
    ):
        write(part, whole + b"half")
        fetch_refuses(tmp_path, capsys, says, *words)
        assert part.read_bytes() == whole + b"half" and not out.exists()


def test_a_fetch_that_is_killed_goes_on(tmp_path):
    pytest.importorskip("datasets", reason="fetch needs the package datasets")
    texts = [f"caption {i} " + "word " * 100 for i in range(20_000)]
    source, out, part = archive(tmp_path / "c.tar", texts), tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    words = "fetch", out, "--source", source
    kill_when(lambda: part.exists() and part.stat().st_size > 0, *words)
    left = part.read_bytes()
    assert 0 < left.count(b"\n") < len(texts) and not out.exists()
    part.write_bytes(left[:-7])  # writes go out in blocks, so a line is usually cut; make sure of it
    module.main(list(map(str, words)))
    assert out.read_bytes().startswith(left) and read_prompts(out) == [text.strip() for text in texts]
    assert not part.exists()


@pytest.mark.parametrize("kind", ["junk", "empty", "latin", "pictures"])
def test_faulty_sources_are_refused(tmp_path, kind, capsys):
    pytest.importorskip("datasets", reason="fetch needs the package datasets")
    source = tmp_path / "c.tar"
    if kind == "junk":
        write(source, b"junk" * 1000)
    else:
        content = {"empty": [], "latin": [b"caf\xe9"], "pictures": [b"{}"]}[kind]
        archive(source, content, "{i}.json" if kind == "pictures" else "{i}.txt")
    fetch_refuses(tmp_path, capsys, f"error: {source}: ", "--source", source)
    assert [p.name for p in tmp_path.iterdir()] == ["c.tar"]


def test_faulty_fetches_are_refused(tmp_path, capsys, monkeypatch):
    fetch_refuses(tmp_path, capsys, "--limit must be at least 1, got 0", "--limit", 0)
    fetch_refuses(tmp_path, capsys, "must end in .jsonl", out="c.txt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fetch_refuses(tmp_path, capsys, "pip install datasets")
    assert not list(tmp_path.iterdir())


def fetch_refuses(folder, capsys, says, *words, out="out.jsonl"):
    with pytest.raises(SystemExit) as caught:
        sys.exit(module.main(["fetch", str(folder / out), *map(str, words)]))
    assert caught.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_help_needs_no_heavy_import():
    code = """
import sys
from edm import prompts
try:
    prompts.main(["--help"])
except SystemExit:
    assert not {"transformers", "datasets", "diffusers"} & sys.modules.keys()
"""
    done = spawn("-c", code, cwd=ROOT)
    assert done.returncode == 0 and "{fetch,encode}" in done.stdout, done
