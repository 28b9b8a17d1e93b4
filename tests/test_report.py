"""`report.html`: what is in it, and what a browser shows of it."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from browser import Browser, needs_browser
from helpers import TINY
from vistok.cli import evaluate, train
from vistok.evaluation.plots import Panel, Series, svg
from vistok.evaluation.report.charts import training_panels, training_rows
from vistok.evaluation.report.page import find_measured, write_report

BUDGETS = ("1", "2", "4")


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    """A flexible run, evaluated at several numbers of tokens."""
    folder = tmp_path_factory.mktemp("report") / "run"
    words = ["experiment=one_d_piece_tiny", *TINY, "data=folder", f"data.train={photos}"]
    words += ["data.val_fraction=0.3", "trainer.max_steps=6", f"hydra.run.dir={folder}"]
    assert train([*words, "data.image_size=16", "callbacks.report=true"]) == 0
    shutil.copy(folder / "report.html", folder / "trained.html")
    words = [f"run={folder}", "eval=pixels", "eval.num_tokens=[1,2,4]", "num_pictures=3"]
    words += ["eval.codec_images=2", "eval.effect_images=2", "data.num_workers=0"]
    assert evaluate([*words, "eval.extremes=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def painted(run, tmp_path_factory):
    """The same page with pictures of one color for each number of tokens, which a test can see."""
    folder = tmp_path_factory.mktemp("painted") / "run"
    shutil.copytree(run, folder)
    results = json.loads((folder / "eval" / "metrics.json").read_text())
    for entry in results["pictures"]:
        for name, color in ((entry["original"], (200, 200, 200)), *(
            (name, COLORS[tokens]) for tokens, name in entry["files"].items()
        )):  # fmt: skip
            picture = Image.new("RGB", (16, 16), color)
            picture.save(folder / "eval" / "pictures" / name, lossless=True, exact=True)
    return write_report(folder / "eval", folder)


COLORS = {"1": (190, 20, 20), "2": (20, 160, 30), "4": (30, 40, 190)}


def share(screen, color):
    """Share of the pixels that have a color, or nearly so."""
    return (np.abs(screen.astype(int) - color).max(-1) <= 3).mean()


# ---------------------------------------------------------------------- the file


@pytest.mark.slow
def test_the_page_holds_everything_and_loads_nothing(run):
    page = (run / "report.html").read_text()
    results = json.loads((run / "eval" / "metrics.json").read_text())
    assert results["protocol_hash"] in page
    assert f"<b>{results['images']} images</b>" in page and results["data"] in page
    for section in ("pictures", "curves", "extremes", "codes", "training", "protocol"):
        assert page.count(f'<section id="{section}">') == 1, section
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(s.startswith(("data:", "#")) for s in sources if s)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    for address in re.findall(r"https?://[^\s\"'<]+", page):
        assert address.startswith("http://www.w3.org/"), address  # names of XML, never fetched


@pytest.mark.slow
def test_the_page_comes_again_without_measuring(run, cli, monkeypatch):
    import vistok.evaluation.run as measuring

    monkeypatch.setattr(measuring, "measure", None)
    page = run / "report.html"
    before = page.read_bytes()
    page.unlink()
    code, _, out = cli("report", run)
    assert code == 0 and str(page) in out and page.read_bytes() == before
    assert find_measured(run / "eval") == (run / "eval", run)


@pytest.mark.slow
def test_a_training_ends_with_a_page(run):
    page = (run / "trained.html").read_text()
    assert '<section id="training">' in page and 'id="budget"' in page
    results = json.loads((run / "validation" / "metrics.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert results["psnr"] == summary["val_psnr"]
    assert [sorted(p["files"]) for p in results["pictures"]] == [list(BUDGETS)] * 2


def test_what_was_not_measured_is_said(fails, tmp_path):
    fails("report", tmp_path / "nope", words=("nope", "no such folder"))
    (tmp_path / "empty").mkdir()
    fails("report", tmp_path / "empty", words=("empty", "nothing was measured"))
    (tmp_path / "empty" / "metrics.json").write_text("{")
    fails("report", tmp_path / "empty", words=("metrics.json", "could not be read"))


def test_training_curves_of_old_and_new_runs(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss/total,step,val/psnr\n2.0,1,\n,2,20.5\n1.0,2,\n")
    torn = '{"step": 3, "loss/total": 0.5, "lr": NaN}\n{"step": 4, "loss/to'
    (tmp_path / "metrics.jsonl").write_text(torn)
    rows = training_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 2, 3]
    panels = training_panels(rows)
    assert list(panels["Losses"].series[0].y) == [2.0, 1.0, 0.5]
    assert list(panels["Validation: PSNR (dB)"].series[0].x) == [2]
    (page := write_report(None, tmp_path)).read_text().index("Validation: PSNR (dB)")
    assert page == tmp_path / "report.html"


def test_charts_take_the_color_of_the_page_and_are_the_same_each_time():
    panel = Panel("x & y", "<z>", [Series("a", [1, 2, 4], [1.0, 3.0, 2.0])])
    text = svg(panel)
    assert text == svg(panel) and text.startswith("<svg") and "currentColor" in text
    assert "<style" not in text and "&lt;z&gt;" in text and "metadata" not in text


# ---------------------------------------------------------------------- in a browser


@needs_browser
@pytest.mark.slow
def test_the_slider_changes_the_pictures(painted):
    with Browser() as browser:
        browser.open(painted)
        seen = browser.seen("#pictures .gallery")
        assert share(seen, COLORS["4"]) > 0.2 and share(seen, (200, 200, 200)) > 0.2
        assert "4 tokens · 2 bytes · PSNR" in browser.value("document.querySelector('#chosen').textContent")  # fmt: skip
        browser.click("#budget")  # its middle
        for key, tokens in (("Home", "1"), ("ArrowRight", "2")):
            browser.press(key)
            seen = browser.seen("#pictures .gallery")
            for other, color in COLORS.items():
                assert (share(seen, color) > 0.2) == (other == tokens), (tokens, other)
            # |200 - color| · 4, at most 255: the difference view follows
            changed = tuple(min(255, 4 * abs(200 - c)) for c in COLORS[tokens])
            assert share(seen, changed) > 0.2
            label = browser.value("document.querySelector('#chosen').textContent")
            assert label.startswith(f"{tokens} token")
        assert browser.value("location.hash") == "#tokens=2"
        best = browser.seen("#extremes .gallery")
        assert share(best, COLORS["4"]) > 0.1  # the worst and best are of all tokens, always
        assert browser.problems == []


@needs_browser
@pytest.mark.slow
def test_zoom_and_tabs(painted):
    with Browser() as browser:
        browser.open(painted)
        browser.click("#pictures .triple")
        browser.wait("document.querySelector('#zoom').open")
        seen = browser.seen()
        half = share(seen, (200, 200, 200)), share(seen, COLORS["4"])
        assert half[0] > 0.1 and half[1] == pytest.approx(half[0], abs=0.02)  # the divider's middle
        browser.click("#apart")
        seen = browser.seen()
        changed = tuple(min(255, 4 * abs(200 - c)) for c in COLORS["4"])
        assert share(seen, changed) > 0.2 and share(seen, COLORS["4"]) < 0.01
        first = browser.value("document.querySelector('#zoom .top span').textContent")
        browser.press("ArrowRight")
        assert browser.value("document.querySelector('#zoom .top span').textContent") != first
        browser.press("Escape")
        browser.wait("!document.querySelector('#zoom').open")
        shown = "[...document.querySelectorAll('[data-tab]')].map((part) => part.hidden)"
        assert browser.value(shown) == [False, True]
        browser.click(".tabs button:last-child")
        assert browser.value(shown) == [True, False]
        assert browser.problems == []


@needs_browser
@pytest.mark.slow
def test_nothing_is_cut_off_on_a_phone(painted):
    with Browser(390, 844, phone=True) as browser:
        browser.open(painted)
        assert browser.value("document.documentElement.scrollWidth") == 390
        assert browser.value("innerWidth") == 390
        wide = browser.value(
            "[...document.querySelectorAll('main *')].filter((part) =>"
            " !part.closest('.scroll') && part.getBoundingClientRect().right > 391).length"
        )
        assert wide == 0
        gallery = browser.seen("#pictures .gallery")
        assert gallery.shape[1] > 340 and share(gallery, COLORS["4"]) > 0.2
        browser.click("#pictures .triple")
        browser.wait("document.querySelector('#zoom').open")
        assert share(browser.seen(), COLORS["4"]) > 0.1
        assert browser.problems == []
