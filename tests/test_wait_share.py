"""Training says how much of its time it waited for data, and lists what it had to skip."""

import time

import pytest

from helpers import TINY, make_photos, metrics_of
from vistok.cli import train
from vistok.data.dataset import ImageDataset


def shares(run):
    return [float(row["data/wait_share"]) for row in metrics_of(run) if row.get("data/wait_share")]


@pytest.mark.parametrize("slow", [False, True])
def test_wait_share_is_logged(tmp_path, monkeypatch, slow):
    if slow:
        original = ImageDataset._load
        monkeypatch.setattr(ImageDataset, "_load", lambda *args: time.sleep(0.3) or original(*args))
    photos = make_photos(tmp_path / "photos")
    (photos / "bad.png").write_bytes(b"hello")
    (photos / "000.png").unlink()
    options = ["data=folder", f"data.train={photos}", f"data.val={photos}", "data.image_size=16"]
    run = tmp_path / "run"
    assert train([*TINY, *options, "trainer.max_steps=8", f"hydra.run.dir={run}"]) == 0
    found = shares(run)
    assert found and all(0 <= share <= 1 for share in found)
    assert max(found) > 0.6 if slow else min(found) < 0.5, found
    assert (run / "skipped.tsv").read_text().startswith("bad.png\tnot an image\t")
