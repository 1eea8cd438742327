"""The preference study's page in a real browser: choices, orders, phones, memory, and no other address."""

import contextlib
import json
import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.browser import start_browser, wait
from tests.test_preference_study import build, run

LONG = "An image of a jade green egg, " + "highly detailed, " * 12 + "x" * 120


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    driver = start_browser(profile)
    driver.profile = profile
    yield driver
    driver.quit()


@pytest.fixture
def browser(one_browser):
    """The module's browser, of ordinary size; what it keeps is by study, and each test has its own."""
    one_browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return one_browser


class Participant:
    """Somebody before the page, who notes what was shown and what was meant to be chosen."""

    def __init__(self, browser, place):
        """place: a study's folder, or an address."""
        self.browser, self.noted = browser, []
        browser.get(place if isinstance(place, str) else (place / "index.html").as_uri())

    def find(self, id):
        return self.browser.find_element("id", id)

    def click(self, id):
        self.find(id).click()

    def key(self, key):
        self.browser.switch_to.active_element.send_keys(key)

    def ready(self):
        """Wait for the next pair -> (prompt, first name, second name), as on the screen."""
        wait(self.browser, "screen() === 'pair' && !busy")
        names = self.browser.execute_script("return Array.from(pictures, p => p.src.split('/').pop())")
        return self.find("prompt").text, *names

    def choose(self, side, how):
        """side: 0 or 1; how: an id to click, or a key."""
        _, *names = self.ready()
        self.noted.append(dict(first=names[0], second=names[1], chosen=names[side]))
        (self.click if how in ("first", "second") else self.key)(how)

    def kept(self):
        return self.browser.execute_script("return state.chosen")

    def export(self):
        return json.loads(self.find("answers").get_property("value"))


def test_a_whole_study_in_the_browser(browser, tmp_path, capsys):
    from selenium.webdriver.common.keys import Keys

    out, key = build(
        tmp_path, n=6, prompts=["a cat", "</script><b>bold", "", "ein Fjörd", "猫 & <i>", LONG, "f"]
    )
    of = {pair[s]: pair for pair in key["pairs"] for s in "ab"}
    person = Participant(browser, out)
    assert browser.title == "Which picture is better?" and "You will see 6 pairs" in person.find("start").text
    person.click("begin")
    seen = []
    ways = [(0, "1"), (1, Keys.ARROW_RIGHT), (0, "first"), (1, "second"), (1, "2"), (0, Keys.ARROW_LEFT)]
    for i, (side, how) in enumerate(ways):
        prompt, first, second = person.ready()
        seen.append(of[first])
        assert of[first] is of[second] and first != second and " ".join(of[first]["prompt"].split()) == prompt
        assert person.find("progress").text == f"Pair {i + 1} of 6"
        person.choose(side, how)
        if i == 2:  # take it back, by key and by button; do it again; come back another day
            for undo in (lambda: person.key(Keys.BACKSPACE), lambda: person.click("undo")):
                person.ready()
                undo()
            assert person.find("progress").text == "Pair 2 of 6" and len(person.kept()) == 1
            redone, person.noted[1:] = person.noted[1:], []
            for answer, side in zip(redone, (1, 0)):
                assert list(person.ready()[1:]) == [answer["first"], answer["second"]]  # the same sides again
                person.choose(side, "12"[side])
            browser.refresh()
            assert person.ready() and person.find("progress").text == "Pair 4 of 6"
    assert sorted(p["prompt"] for p in seen) == sorted(p["prompt"] for p in key["pairs"])

    assert "You answered 6 of 6 pairs" in person.find("end").text
    export = person.export()
    assert export["study"] == key["study"] and export["answers"] == person.noted
    person.click("copy")
    assert person.find("copied").text
    person.click("download")
    file = browser.profile / "downloads" / person.find("download").get_attribute("download")
    end = time.monotonic() + 15
    while not file.exists() or not file.stat().st_size:  # an empty one comes first
        assert time.monotonic() < end
        time.sleep(0.05)
    assert json.loads(file.read_text()) == export
    browser.refresh()
    assert person.export() == export

    capsys.readouterr()
    run("tally", tmp_path / "out.key.json", file)
    a = sum(of[answer["chosen"]]["a"] == answer["chosen"] for answer in person.noted)
    printed = capsys.readouterr().out
    assert "1 participants, 0 of them incomplete\n6 votes of 6, 3 for the first shown" in printed
    assert re.search(rf"^all votes +{a} +{6 - a} ", printed, re.M)


def test_participants_see_different_orders(browser, tmp_path):
    out, _ = build(tmp_path, n=24)
    plans = []
    other = start_browser(tmp_path / "other")
    try:
        for one in (browser, other):
            person = Participant(one, out)
            assert one.execute_script("return localStorage.getItem(slot)") is None
            person.click("begin")
            plans.append(one.execute_script("return [state.participant, pairs]"))
            assert list(person.ready()[1:]) == plans[-1][1][0]["images"]
            one.refresh()
            assert one.execute_script("return [state.participant, pairs]") == plans[-1]
    finally:
        other.quit()
    (id, pairs), (other_id, other_pairs) = plans
    assert id != other_id and re.fullmatch("[0-9a-f]{32}", id)
    assert [p["prompt"] for p in pairs] != [p["prompt"] for p in other_pairs]
    sides = [{p["prompt"]: p["images"] for p in plan} for plan in (pairs, other_pairs)]
    assert sides[0].keys() == sides[1].keys() and sides[0] != sides[1]  # alike once in 16 million runs


def test_orders_and_sides_are_fair(browser, tmp_path):
    """Of 4,000 participants: every pair at every place, and with either image first, equally often."""
    out, _ = build(tmp_path, n=4)
    Participant(browser, out)
    rng = np.random.default_rng(0)
    ids = [rng.bytes(16).hex() for _ in range(4000)]
    plans = browser.execute_script("return arguments[0].map(plan)", ids)
    names = sorted(p["prompt"] for p in plans[0])
    place = np.array([[names.index(p["prompt"]) for p in pairs] for pairs in plans])
    first = np.array([[p["images"] == sorted(p["images"]) for p in pairs] for pairs in plans])
    for i in range(4):
        counts = np.bincount(place[:, i], minlength=4)
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)
        assert abs(first[place == i].sum() - 2000) < 5 * np.sqrt(4000 * 0.25)
    orders = {tuple(row) for row in np.hstack([place, first]).tolist()}
    assert len(orders) == 24 * 16  # all there are


def test_one_gesture_is_one_vote(browser, tmp_path):
    from selenium.webdriver import ActionChains

    person = Participant(browser, build(tmp_path)[0])
    person.click("begin")
    person.ready()
    ActionChains(browser).double_click(person.find("first")).perform()
    person.ready()
    assert len(person.kept()) == 1
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', bubbles: true, ...arguments[0]}))"
    for held in ({"repeat": True}, {"ctrlKey": True}, {"altKey": True}, {"metaKey": True}, {"key": "3"}):
        browser.execute_script(press, held)
        assert len(person.kept()) == 1, held
    browser.execute_script(press, {})
    browser.execute_script(press, {})  # too soon for anybody who looks
    assert len(person.kept()) == 2


def test_stopping_early_and_going_on(browser, tmp_path, capsys):
    person = Participant(browser, build(tmp_path)[0])
    person.click("begin")
    person.ready()
    assert not person.find("undo").is_enabled()
    for side, how in (0, "1"), (1, "2"):
        person.choose(side, how)
    person.click("stop")
    assert (
        "You answered 2 of 4 pairs" in person.find("end").text and person.export()["answers"] == person.noted
    )
    (tmp_path / "p.json").write_text(json.dumps(person.export()))
    capsys.readouterr()
    run("tally", tmp_path / "out.key.json", tmp_path / "p.json")
    assert "1 participants, 1 of them incomplete\n2 votes of 4" in capsys.readouterr().out
    person.click("back")
    assert person.ready() and person.find("progress").text == "Pair 3 of 4"
    for side, how in (0, "1"), (1, "2"):
        person.choose(side, how)
    person.click("back")  # from the end, it takes the last choice back
    assert person.ready() and person.find("progress").text == "Pair 4 of 4"


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (844, 390)])
def test_phones(browser, tmp_path, width, height):
    metrics = dict(width=width, height=height, deviceScaleFactor=2, mobile=True)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    person = Participant(browser, build(tmp_path, n=2, prompts=[LONG, "short"])[0])
    script = """
        const element = document.getElementById(arguments[0]);
        element.scrollIntoView({block: "nearest"});
        return element.getBoundingClientRect().toJSON();
    """
    box = lambda id: browser.execute_script(script, id)

    def fits(*ids):
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for b in map(box, ids):  # once scrolled to, all of it is on the screen, but for rounding
            assert b["left"] >= 0 and b["right"] <= width and b["top"] > -1 and b["bottom"] < height + 1, b
            assert b["width"] >= 44 and b["height"] >= 40  # a fingertip's

    fits("begin")
    person.click("begin")
    for side in (0, 1):
        prompt, *_ = person.ready()
        fits("first", "second", "undo", "stop")
        first, second = box("first"), box("second")
        assert (first["x"] == second["x"]) == (height > width)  # one above the other, or side by side
        assert min(first["width"], first["height"]) > 130 and first["width"] == second["width"]
        if prompt == "short":
            assert browser.execute_script("return document.documentElement.scrollHeight") <= height
        person.choose(side, ("first", "second")[side])
    fits("download", "copy", "back", "answers")
    assert person.export()["answers"] == person.noted


def test_names_and_focus_for_those_who_do_not_see_the_page(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    person = Participant(browser, build(tmp_path)[0])
    person.click("begin")
    assert browser.switch_to.active_element == person.find("pair")
    person.ready()
    assert [person.find(i).accessible_name for i in ("first", "second")] == [
        "First picture",
        "Second picture",
    ]
    assert person.find("first").get_attribute("aria-describedby") == "prompt"
    for live in ("progress", "prompt"):
        assert person.find(live).get_attribute("aria-live") == "polite"
    person.key(Keys.TAB)
    assert browser.switch_to.active_element == person.find("first")
    person.key(Keys.TAB)
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    chosen = person.ready()[2]
    person.key(Keys.ENTER)
    assert person.ready() and person.kept() == [chosen]
    person.click("stop")
    assert browser.switch_to.active_element == person.find("end")


def test_nothing_comes_from_or_goes_elsewhere(browser, tmp_path):
    out, _ = build(tmp_path)
    source = (out / "index.html").read_text()
    assert not re.search(
        r"https?:|//[a-z]+\.|<link|\bsrc=|@import|url\(|fetch|XMLHttp|Beacon|WebSocket", source
    )
    person = Participant(browser, out)
    person.click("begin")
    person.ready()
    names = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith(out.as_uri()) for name in names)
    blocked = browser.execute_async_script("""
        const done = arguments[0], seen = [];
        addEventListener("securitypolicyviolation", e => {
          seen.push(e.effectiveDirective);
          if (seen.length === 3) done(seen.sort());
        });
        fetch("http://127.0.0.1:9/").catch(() => 0);
        new Image().src = "http://127.0.0.1:9/x.png";
        document.head.append(Object.assign(document.createElement("script"), {src: "http://127.0.0.1:9/x.js"}));
    """)
    assert blocked == ["connect-src", "img-src", "script-src-elem"]


@contextlib.contextmanager
def web_server(folder, asked):
    """Yield the address of a server; the paths that it was asked for go into a list."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def test_from_a_web_server(browser, tmp_path):
    """It asks for files of its own only, and answers survive that the page is left and opened again."""
    out, _ = build(tmp_path)
    asked = []
    with web_server(out, asked) as address:
        person = Participant(browser, address)
        person.click("begin")
        person.choose(0, "1")
        browser.get("about:blank")
        browser.get(address)
        assert person.ready() and person.kept() == [person.noted[0]["chosen"]]
        assert person.find("progress").text == "Pair 2 of 4"
        browser.get("about:blank")
    own = {"/", "/favicon.ico"} | {
        f"/{path.name}" for path in out.iterdir()
    }  # the icon is the browser's idea
    assert set(asked) <= own and sum(path.endswith(".png") for path in asked) >= 2


def test_the_newer_of_two_memories_counts(browser, tmp_path):
    """Chromium's storage of files is now and then empty after a reload; of a server's pages it is not."""
    out, _ = build(tmp_path)
    with web_server(out, []) as address:
        person = Participant(browser, address)
        person.click("begin")
        person.choose(0, "1")
        person.ready()
        old = browser.execute_script("return JSON.stringify(state)")
        person.choose(1, "2")
        person.ready()
        write = "localStorage.setItem(slot, arguments[0])"
        for storage in ("null", "{}", "[", old):
            browser.execute_script(write, storage)
            browser.refresh()
            assert person.ready() and len(person.kept()) == 2, storage
        other_tab = json.loads(old)
        other_tab["edits"] = 9
        browser.execute_script(write, json.dumps(other_tab))
        browser.refresh()
        assert person.ready() and len(person.kept()) == 1
        browser.get("about:blank")


def test_a_missing_picture_and_a_browser_that_keeps_nothing(browser, tmp_path):
    out, _ = build(tmp_path, n=1)
    person = Participant(browser, out)
    forget = "Storage.prototype.setItem = () => { throw new Error('full'); }"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": forget})
    try:
        browser.refresh()
        person.click("begin")
        assert "before you close the page" in person.find("trouble").text
        browser.refresh()
        person.choose(1, "2")
        browser.refresh()
        assert person.export()["answers"] == person.noted  # it works all the same
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    next(out.glob("*.png")).unlink()
    browser.get("about:blank")
    person = Participant(browser, out)
    person.click("begin")
    wait(browser, "document.getElementById('trouble').textContent")
    assert "did not load" in person.find("trouble").text
    person.key("1")
    assert person.kept() == []
