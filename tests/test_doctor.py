"""`vistok doctor`: what the whole run would need, from a few steps of it."""

import json

import pytest

from helpers import TINY, config_of
from test_adversary import TERM
from vistok.tools.doctor import advice, shortened


@pytest.fixture
def words(photos):
    return [
        *TINY, "data=folder", f"data.train={photos}", "data.image_size=16", "data.val_fraction=0.3",
        "trainer.max_steps=1000", "trainer.val_check_interval=250", "adversary=patch",
        f"{TERM}.discriminator.base_channels=4", f"{TERM}.discriminator.num_layers=2",
    ]  # fmt: skip


def test_it_reports_and_leaves_nothing_behind(cli, words, tmp_path):
    code, lines, out = cli("doctor", *words, "steps=16", "cost_per_hour=2.5", "out=said/d.json")
    assert code == 0, lines
    report = json.loads((tmp_path / "said" / "d.json").read_text())
    assert report["steps"] == 16 and report["images_per_step"] == 4
    assert report["total_samples"] == 4000 and report["late_terms"] == {"adversarial": 800}
    assert report["memory_gib"] > 0 and 0 <= report["data_wait_share"] <= 1
    # The first 800 images at the first speed, the others at that with the adversary.
    slow, fast = report["images_per_second"], report["images_per_second_before_late_terms"]
    assert report["hours"] >= (800 / fast + 3200 / slow) / 3600
    assert report["cost"] == pytest.approx(2.5 * report["hours"])
    assert {"gan/accuracy", "gradient/adversarial", "gradient/reconstruction"} <= (
        report["health"].keys()
    )
    assert isinstance(report["advice"], list) and "report: said/d.json" in out
    assert [p.name for p in tmp_path.iterdir()] == ["said"]  # no run folder


def test_it_keeps_the_run_if_asked(cli, words, tmp_path):
    code, lines, _ = cli("doctor", *words, "steps=16", "keep=short", "out=d.json")
    assert code == 0, lines
    assert json.loads((tmp_path / "short" / "summary.json").read_text())["steps"] == 16


@pytest.mark.parametrize("word", ["steps=8", "steps=x", "cost_per_hour=-1"])
def test_wrong_words(fails, words, word):
    fails("doctor", *words, word, words=(word, "must be"))


def test_a_short_run_is_the_beginning_of_the_long_one():
    config = config_of(*TINY, "trainer.max_steps=1000", "adversary=patch", "data.batch_size=8")
    short, late, total, per_step = shortened(config, 20)
    assert (total, per_step, late) == (8000, 8, {"adversarial": 1600})
    assert (
        short["optimizer"]["total_samples"] == 8000 and config["optimizer"]["total_samples"] is None
    )
    own = short["loss"]["terms"]["adversarial"]
    assert own["start_samples"] == 80 and not own["start"] and not own["warmup"]
    early = config_of(*TINY, "trainer.max_steps=1000", "adversary=patch", f"{TERM}.start=0")
    assert not shortened(early, 20)[1]


def test_advice():
    healthy = {
        "alarms": [], "data_wait_share": 0.01, "skipped_steps": 0, "steps": 20,
        "codebook_usage": 0.9, "health": {},
    }  # fmt: skip
    assert advice(healthy, {}) == []
    sick = healthy | {
        "alarms": ["step 3: the discriminator wins"], "data_wait_share": 0.5, "skipped_steps": 2,
        "codebook_usage": 0.1, "gpu_memory_gib": 79.0, "gpu_memory_of_gib": 80.0,
        "health": {"gradient/reconstruction": 1.0, "gradient/adversarial": 20.0},
    }  # fmt: skip
    found = advice(sick, {"adversarial": 100})
    words = ["wins", "data.num_workers", "2 of 20 steps", "10% of the codes", "data.batch_size"]
    for line, word in zip(found, [*words, "20 times"], strict=True):
        assert word in line
