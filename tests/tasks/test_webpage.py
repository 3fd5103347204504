# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run on one page: all inside one file, every text escaped, and a browser shows each of its pictures."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fsdet import tasks
from fsdet.cli.main import main
from fsdet.command import typed
from fsdet.errors import UserError
from fsdet.evaluation.outcomes import FALSE, HIT, MISS, Outcome
from fsdet.pictures import Picture
from fsdet.pictures.page import Section, figures, page
from fsdet.tasks.webpage import cards, write_page
from fsdet.tasks.webpage.exhibit import Exhibit
from fsdet.types import ImageRecord
from tasks import others

EVIL = "<script>alert(1)</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Reader(HTMLParser):
    """Tags of a page, what they point at, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "poster")]
        assert not [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


def holds_itself(text: str) -> Reader:
    """No script, no frame, nothing that is fetched."""
    read = Reader(text)
    assert not {"script", "iframe", "link", "object", "embed", "base"} & set(read.tags)
    assert all(source.startswith(("data:image/", "#")) for source in read.sources)
    assert not re.search(r"url\((?!data:)|@import", text)
    return read


@pytest.fixture
def run(best, tmp_path) -> Path:
    """The folder of a small finished run of stage 1."""
    return Path(shutil.copytree(Path(best).parent, tmp_path / "run"))


@pytest.fixture
def exhibit(tmp_path):
    """A hit, a miss and a false positive of a class with a name that is code."""
    from PIL import Image

    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(path)
    box = np.array([5.0, 5, 40, 40], np.float32)
    record = ImageRecord(path, (60, 80), box[None], np.array([0]))
    seen = [Outcome(HIT, 0, 0, box, 0.8), Outcome(FALSE, 0, 0, box, 0.6, "other", 1), Outcome(MISS, 0, 0, box)]
    pixels = np.zeros((20, 20, 3), np.uint8)
    return Exhibit("looked", (EVIL, "W" * 200), [0], [record], seen, supports={0: [Picture(pixels)]},
                   thresholds={0: 0.25}, precision=np.ones((1, 101)), ap50=np.array([0.5]),
                   chosen=[Picture(pixels, title=EVIL)])  # fmt: skip


def test_names_from_data_are_text_and_nothing_else(exhibit):
    text = page(EVIL, EVIL, cards.sections(exhibit), EVIL)
    read = holds_itself(text)
    assert EVIL not in text and any(EVIL in words for words in read.words)
    assert sum(source.startswith("data:image/jpeg") for source in read.sources) >= 5


def test_a_large_figure_is_the_value_and_what_it_is_stands_below():
    assert re.search(r"<b>80\.4</b><span>novel AP50</span>", figures([("80.4", "novel AP50")]))


def test_a_finished_run_is_a_page_that_may_be_written_again_and_over_nothing_else(run, capsys):
    assert main(["report", str(run), "--html", "--images", "4", "--device", "cpu"]) == 0
    assert f"page: {run / 'report.html'}" in capsys.readouterr().out
    read = holds_itself((run / "report.html").read_text(encoding="utf-8"))
    assert {"Classes", "Training", "Configuration and environment"} <= set(read.words)
    write_page(run, run / "report.html", most=4, device="cpu")
    (run / "mine.html").write_text("<p>mine")
    with pytest.raises(UserError, match=r"mine\.html"):
        write_page(run, run / "mine.html")
    assert (run / "mine.html").read_text() == "<p>mine"


def test_figures_of_an_earlier_checkpoint_are_told_as_such(run, capsys):
    """A run that is trained on, or overwritten, after `fsdet eval`."""
    results = run / "results.json"
    argv = ["eval", str(run / "best.pt"), "--shots", "1", "--seeds", "1", "--json", str(results), "--device", "cpu"]
    assert main(argv) == 0 and main(["report", str(run)]) == 0
    assert "earlier checkpoint" not in capsys.readouterr().out
    for saved in run.glob("*.pt"):
        saved.write_bytes(saved.read_bytes() + b" ")
    (run / "manifest.json").unlink()  # of the files of before
    assert main(["report", str(run)]) == 0
    told = "results.json is of an earlier checkpoint, of which nothing is left here. Next: "
    assert f"{told}{typed('fsdet eval {} --json {}', run / 'best.pt', results)}" in capsys.readouterr().out
    read = holds_itself(write_page(run, run / "p.html", device="cpu").read_text(encoding="utf-8"))
    assert any(told in words for words in read.words)


def test_a_damaged_checkpoint_is_told_and_another_advised(run, capsys):
    """With the words of whoever reads it; figures of a checkpoint that was damaged since are as good as before."""
    best, last, results = run / "best.pt", run / "last.pt", run / "results.json"
    figures = {"task": "classifier", "split": "test", "images": 1, "ms_per_image": 1.0, "metrics": {},
               "checkpoint_sha256": hashlib.sha256(best.read_bytes()).hexdigest()}  # fmt: skip
    best.write_bytes(best.read_bytes()[:-1] + b"x")
    told = "best.pt: expected an intact checkpoint, got "
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert told in shown and "Next: the file is damaged: use another checkpoint of the run, or its copy" in shown
    assert typed("fsdet eval {} --json {}", last, results) in shown and "eval " + str(best) not in shown
    assert main(["doctor", str(run)]) == 0 and shown[shown.index(told) :].splitlines()[0] in capsys.readouterr().out
    results.write_text(json.dumps(figures))
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert told in shown and "earlier checkpoint" not in shown and "fsdet eval" not in shown
    results.write_text(json.dumps({**figures, "checkpoint_sha256": "0"}))
    assert main(["report", str(run)]) == 0
    assert f"Next: {typed('fsdet eval {} --json {}', last, results)}" in capsys.readouterr().out
    for saved in run.glob("*.pt"):
        saved.write_bytes(b"x")
    assert main(["report", str(run)]) == 0
    assert "Next: put a copy in the place of best.pt, then " in capsys.readouterr().out


def test_without_a_checkpoint_the_page_says_why_there_are_no_pictures(run, caplog):
    for saved in run.glob("*.pt"):
        saved.unlink()
    read = holds_itself(write_page(run, run / "p.html", device="cpu").read_text(encoding="utf-8"))
    assert any("nothing is saved yet" in words for words in read.words) and "img" not in read.tags
    assert "no pictures on the page" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", others.TASKS)
def test_other_tasks_have_a_page_too(sets, tmp_path, kind):
    tasks.build(others.settings(kind, sets[kind], tmp_path / "run", "optim.epochs=1")).fit()
    read = holds_itself(write_page(tmp_path / "run", tmp_path / "p.html", most=4, device="cpu").read_text("utf-8"))
    assert "img" in read.tags and "Classes" in read.words


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is installed")
    return found


PROBE = """<script>
onload = () => {
  const good = [...document.images].map(i => i.complete && i.naturalWidth > 0);
  const wide = document.documentElement.scrollWidth;
  const asked = performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'));
  document.body.innerHTML = '<pre id=told>' + JSON.stringify({good, wide, asked}) + '</pre>';
}</script>"""


@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_every_picture_asks_for_nothing_and_needs_no_sideways_scrolling(exhibit, tmp_path, width):
    text = page("run", "finished", [*cards.sections(exhibit), Section("Results", figures([("1", "W" * 90)]))], "end")
    place = tmp_path / "page.html"
    place.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text) + PROBE)  # which bars PROBE
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={width},900", "--dump-dom", place.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    told = json.loads(re.search(r'id="told">(.*?)</pre>', shown).group(1))
    assert len(told["good"]) == text.count("<img ") > 4 and all(told["good"])
    assert told["asked"] == [] and told["wide"] <= width
