"""The page to explore: what it holds, what is refused, and every control of it in a real browser."""

import base64
import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch

from tests.browser import start_browser, wait
from toy import explore, plots, train_2d
from toy.config import Config, resolve
from toy.files import UserError
from toy.folder import Folder
from toy.metrics import SIGMAS
from toy.mixtures import make_target

SIGMA = "\u03c3"
TINY = dict(teacher_steps=5, warmup=3, batch=16, width=8, samples=50, no_pictures=True)


def train(folder, **changes):
    train_2d.main(resolve(Config(**TINY | {"steps": 12, "out": str(folder)} | changes)))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three of other kinds: SIM; L1, which ends sooner; and a name that would end a script."""
    root = tmp_path_factory.mktemp("runs")
    hostile = train(root / "<script>&<b>", steps=3, network="vp", teacher="exact", fake="exact", bank=16)
    return train(root / "sim"), train(root / "l1", steps=6, distance="l1"), hostile


def content(text):
    return json.loads(re.search(r'<script type="application/json" id="film">(.*?)</script>', text)[1])


def unpacked(text, *shape):
    whole = np.frombuffer(base64.b64decode(text), "<i2").astype(float) / explore.SCALE
    return torch.tensor(whole).view(*shape, 2)


def close(a, b):
    """But for rounding, and for what lies outside."""
    return (a - b.double().clamp(-4, 4)).abs().max() < 1 / explore.SCALE


# ----------------------------------------------------------------------------------------------
# What it holds.


def test_it_holds_the_run_s_frames_arrows_and_log(runs):
    for folder in runs:
        (run,) = content(explore.page([folder]))["runs"]
        state, target = Folder(folder, {}).load(), make_target("ring")
        frames = state["snapshots"]
        assert close(unpacked(run["samples"], len(frames), 2000), torch.stack([f["samples"] for f in frames]))
        cfg = Config(**json.loads((folder / "config.json").read_text()))
        teacher, fake = (train_2d.make_denoiser(cfg, target) for _ in range(2))
        teacher.load_state_dict(state["teacher"])
        fake.load_state_dict(state["fake"])
        online = unpacked(run["online"], len(frames), len(SIGMAS), 169)
        points = plots.field_points()
        for k, sigma in enumerate(SIGMAS):  # the last frame's online network is the checkpoint's
            level = torch.full((169,), sigma)
            with torch.no_grad():
                exact = target.denoiser(points, level)
                learned = exact if cfg.teacher == "exact" else teacher(points, level)
                assert close(unpacked(run["target"], len(SIGMAS), 169)[k], exact)
                assert close(unpacked(run["teacher"], len(SIGMAS), 169)[k], learned)
                assert cfg.fake == "exact" or close(online[-1, k], fake(points, level))
        log = list(csv.DictReader((folder / "log.csv").open(encoding="utf-8")))
        for name, values in run["rows"].items():
            assert values == pytest.approx([float(row[name]) for row in log], rel=1e-3), name


def test_its_frames_are_dense_and_the_page_small(runs):
    cfg, state = explore.read(runs[0])
    for name in ("snapshots", "history"):
        state[name] = (4 * state[name])[:41]  # as many as a default run's
    size = len(json.dumps(explore.film(cfg, state))) + len(explore.page([runs[0]]))
    assert size < 1.5e6


def test_it_says_what_the_runs_are(runs):
    (alone,) = content(explore.page([runs[0]]))["runs"]
    assert (alone["name"], alone["about"]) == (
        "sim",
        "target ring; method sim; distance pseudo_huber; seed 0",
    )
    both = content(explore.page(runs[:2]))["runs"]
    assert [run["about"] for run in both] == ["distance pseudo_huber; steps 12", "distance l1; steps 6"]
    same = content(explore.page([runs[0], runs[0]]))["runs"]
    assert [run["name"] for run in same] == [str(runs[0])] * 2


def test_it_loads_nothing_from_elsewhere(runs):
    text = explore.page(runs)
    assert not re.findall(r"https?:|//\w+\.|\bsrc=|\bhref=|\burl\(|@import|fetch\(|XMLHttp", text)
    assert "<" not in re.search(r'id="film">(.*)</script>\n<script>', text)[1]  # nor in a name
    assert "default-src 'none'" in text and text.count("</script>") == 2
    assert explore.short(float("nan")) is None and explore.short(0.123456) == 0.1235


def test_a_run_that_still_trains_can_be_looked_at(tmp_path, monkeypatch):
    class Stop:
        calls = 0

        def __bool__(self):
            self.calls += 1
            return self.calls > 8

    distill = train_2d.distill
    monkeypatch.setattr(train_2d, "distill", lambda *a: distill(*a[:-1], Stop()))
    (run,) = content(explore.page([train(tmp_path / "run")]))["runs"]
    assert run["steps"] == 12 and run["rows"]["step"] == [0, 1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------------------
# What is refused.


def spoil(folder, change):
    state = Folder(folder, {}).load()
    change(state)
    for old in Folder(folder, {}).files():
        old.unlink()
    Folder(folder, {}, keep=1).save(state["step"], state)


def rewrite(folder, **changes):
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | changes), "utf-8")


BAD = {  # what is done to a good folder -> words of the refusal
    "no folder": (shutil.rmtree, "run has no config.json"),
    "not begun": (lambda f: shutil.rmtree(f / "checkpoints"), "has no checkpoint"),
    "older": (
        lambda f: spoil(f, lambda s: [x.pop("fields") for x in s["snapshots"][:2]]),
        "checkpoints: of an older toy/train_2d.py, which kept no arrows: make the run again",
    ),
    "of images": (
        lambda f: (f / "config.json").write_text('{"resolution": 8}'),
        "config.json: damaged, or of",
    ),
    "too wide": (lambda f: rewrite(f, width=10**9), "--width must be at most 1,000,000"),
    "no text": (lambda f: rewrite(f, target=[1], seed=-1), "--seed must be 0 or more"),
    "damaged": (lambda f: [p.write_bytes(b"x") for p in f.glob("checkpoints/*")], "every checkpoint"),
    "of another kind": (lambda f: spoil(f, lambda s: s.pop("snapshots")), "checkpoints: damaged, or of"),
    "another network": (lambda f: spoil(f, lambda s: s["teacher"].popitem()), "checkpoints: damaged, or of"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_folders_are_refused_in_one_line(case, runs, tmp_path, capsys):
    damage, words = BAD[case]
    shutil.copytree(runs[0], tmp_path / "run")
    damage(tmp_path / "run")
    assert explore.cli([str(runs[0]), str(tmp_path / "run"), "--out", str(tmp_path / "new/page.html")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert words in err[-1] and (len(err) == 1 or case == "damaged")  # which says what it tried
    assert not (tmp_path / "new").exists()


def test_nothing_but_its_own_pages_is_written_over(runs, tmp_path, capsys):
    shutil.copytree(runs[0], tmp_path / "run")
    for _ in range(2):
        assert explore.cli([str(tmp_path / "run")]) == 0
    page = tmp_path / "run/explore.html"
    assert (
        capsys.readouterr().out == 2 * f"{page}: {page.stat().st_size / 1e6:.1f} MB; open it in a browser\n"
    )
    page.write_text("mine")
    for out, words in (page, "is something else"), (tmp_path / "run", "cannot be written"):
        assert explore.cli([str(tmp_path / "run"), "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert page.read_text() == "mine"
    with pytest.raises(UserError, match="out is empty"):
        explore.main([str(tmp_path / "run"), "--out", ""])
    assert explore.cli([str(tmp_path / "run"), "--out", str(tmp_path / "new/page.html")]) == 0


# ----------------------------------------------------------------------------------------------
# In a browser.


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


class Viewer:
    """Somebody before the page, with a keyboard."""

    def __init__(self, driver, folders, place, width=1280, scheme="light", motion="no-preference"):
        self.driver = driver
        place.write_text(explore.page(folders), "utf-8")
        size = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [dict(name=k, value=v) for k, v in media.items()]}
        )
        driver.get(place.as_uri())

    def js(self, expression):
        return self.driver.execute_script(f"return {expression}")

    def press(self, *keys):
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def said(self):
        return [p.text for p in self.driver.find_elements("class name", "now")]

    def pictures(self):
        return self.js("[...document.querySelectorAll('canvas')].map(c => c.toDataURL())")

    def changed(self, act):
        """Which of all panels look otherwise after something."""
        before = self.pictures()
        act()
        return [a != b for a, b in zip(before, self.pictures())]


def test_every_control_by_keyboard(driver, runs, tmp_path):
    from selenium.webdriver import Keys

    page = Viewer(driver, runs[:1], tmp_path / "page.html")
    focus = []
    for _ in range(4):
        page.press(Keys.TAB)
        focus.append(page.js("document.activeElement.id || document.activeElement.tagName"))
    assert focus == ["SUMMARY", "play", "time", "INPUT"]
    page.press(Keys.ARROW_RIGHT)
    assert page.js("[level, time]") == [2, 0] and f"At {SIGMA} = 0.5" in page.said()[0]
    page.press(Keys.END)  # a choice has no use for it
    assert page.js("time === last")
    page.js("document.activeElement.blur()")
    for key, expected in (Keys.HOME, 0), (Keys.ARROW_RIGHT, 1), (Keys.END, 12), (Keys.ARROW_LEFT, 11):
        page.press(key)
        assert page.js("[time, +$('time').value]") == [expected, expected]
    assert page.said()[0].startswith("Step 11 of 12: energy distance")
    page.js("$('time').focus()")
    for key, expected in (Keys.ARROW_LEFT, 10), (Keys.HOME, 0), (Keys.ARROW_LEFT, 0), (Keys.ARROW_RIGHT, 1):
        page.press(key)
        assert page.js("time") == expected
    assert page.js("$('time').getAttribute('aria-valuetext')") == "step 1"
    for place in "document.body", "$('time')", "$('play')":  # space plays wherever one is, once
        page.js(f"({place}.focus(), document.activeElement)")
        page.press(" ")
        wait(driver, "playing && time % 1 > 0")
        assert page.js("[$('play').textContent, document.querySelector('.now').ariaLive]") == ["Pause", "off"]
        page.press(" ")
        wait(driver, "!playing && time % 1 === 0")
        assert page.js("[$('play').textContent, document.querySelector('.now').ariaLive]") == [
            "Play",
            "polite",
        ]
    page.js("$('play').focus()")
    page.press(Keys.ENTER)
    wait(driver, "!playing && time === last")  # plays to the end, and from there again
    page.press(Keys.ENTER)
    wait(driver, "playing && time < last")
    page.js("(seek(0), document.querySelector('summary').focus())")
    page.press(" ")
    assert page.js("document.querySelector('details').open && !playing")
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []


def test_each_panel_shows_what_it_says(driver, runs, tmp_path):
    page = Viewer(driver, runs[:1], tmp_path / "page.html")
    assert page.changed(lambda: page.js("seek(6)")) == [True, False, False, True]
    assert page.changed(lambda: page.js("$('levels').querySelectorAll('input')[3].click()")) == [
        False,
        *[True] * 3,
    ]
    labels = page.js("[...document.querySelectorAll('canvas')].map(c => c.ariaLabel)")
    assert labels == [
        "sim: One-step samples",
        *(f"sim: {name} at {SIGMA} = 1" for name in ("Target", "Teacher", "Online")),
    ]
    for name, seen_in in (
        ("samples", "1001"),
        ("data", "1110"),
        ("target", "0100"),
        ("teacher", "0011"),
        ("online", "0001"),
    ):
        emptied = page.changed(lambda name=name: page.js(f"(runs[0].{name}.fill(0), render())"))
        assert emptied == [panel == "1" for panel in seen_in], name
    row = list(csv.DictReader((runs[0] / "log.csv").open(encoding="utf-8")))[6]
    said = page.said()[0]
    assert f"{100 * float(row['high_quality']):.1f} % within 3 std" in said
    assert f"energy distance {float(row['energy_distance']):.2g} " in said
    assert float(re.search(r"teacher are (\S+) apart", said)[1]) == pytest.approx(
        float(row["gap_1"]), rel=0.06
    )


def test_a_curve_leads_to_its_step(driver, runs, tmp_path):
    from selenium.webdriver import ActionChains

    page = Viewer(driver, runs[:1], tmp_path / "page.html")
    for svg in driver.find_elements("css selector", "svg"):
        page.js("seek(0)")
        ActionChains(driver).move_to_element(svg).click().perform()
        assert (
            page.js("time") == 2 or page.js("time") == 3
        )  # the middle of the root of 12 is 3, margins aside
        x = page.js("+document.querySelector('.cursor').getAttribute('x1')")
        assert x == pytest.approx(
            page.js("38 + Math.sqrt(time / 12) * (document.querySelector('svg').clientWidth - 48)")
        )


def test_several_runs_with_one_slider(driver, runs, tmp_path):
    page = Viewer(driver, runs, tmp_path / "page.html", width=1440)
    names = [h.text for h in driver.find_elements("tag name", "h2")]
    assert names == ["sim", "l1", "<script>&<b>"] and page.js("marks.length") == 13
    tops = page.js("[...document.querySelectorAll('article')].map(a => a.offsetTop)")
    assert tops[0] == tops[1]
    moved = page.changed(lambda: page.js("seek(5)"))
    assert [any(moved[i : i + 4]) for i in (0, 4, 8)] == [True] * 3
    first, second, third = page.said()
    assert first.startswith("Step 5 of 12") and second.startswith("Step 5 of 6")
    assert third.startswith("Ended at step 3 of 3")


@pytest.mark.parametrize("width", [360, 1440])
def test_it_fits_the_screen_in_light_and_dark(driver, runs, tmp_path, width):
    colours = []
    for scheme in ("light", "dark"):
        page = Viewer(driver, runs[:2], tmp_path / f"{scheme}.html", width=width, scheme=scheme)
        assert (
            page.js("document.documentElement.scrollWidth <= innerWidth") and page.js("innerWidth") == width
        )
        inside = "[...document.querySelectorAll('canvas, svg, button, input, figcaption, p')].every(e => "
        assert page.js(inside + "e.getBoundingClientRect().right <= innerWidth)")
        assert page.js("$('bar').getBoundingClientRect().bottom <= innerHeight + 1")
        assert page.js("performance.getEntriesByType('resource').length") == 0
        colours.append((page.js("getComputedStyle(document.body).backgroundColor"), page.pictures()[1]))
    assert colours[0][0] == "rgb(255, 255, 255)" != colours[1][0] and colours[0][1] != colours[1][1]


def test_who_wants_less_motion_sees_frames_only(driver, runs, tmp_path):
    page = Viewer(driver, runs[:1], tmp_path / "page.html", motion="reduce")
    page.press(" ")
    wait(driver, "time > 0")
    assert page.js("playing && time % 1 === 0")
    page.press(" ")
