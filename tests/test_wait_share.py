"""Training says how much of its time it waited for data, and lists what it had to skip."""

import pytest

from helpers import TINY, Clock, make_photos, metrics_of
from vistok.cli import train
from vistok.data import dataset
from vistok.tasks.reconstruction import Reconstruction
from vistok.training import callbacks


@pytest.mark.parametrize(("loading", "share"), [(0.0, 0.0), (0.1, 0.25), (0.9, 0.75)])
def test_wait_share_is_logged(tmp_path, monkeypatch, loading, share):
    """By a clock that goes while images are loaded, and for 0.3 s in each step.

    The validation after the fourth one is left out, with the pictures that it draws.
    """
    clock = Clock()
    monkeypatch.setattr(dataset, "time", clock)
    monkeypatch.setattr(callbacks, "time", clock)
    load, step = dataset.ImageDataset._load, Reconstruction.training_step
    monkeypatch.setattr(
        dataset.ImageDataset, "_load", lambda *args: clock.sleep(loading) or load(*args)
    )
    monkeypatch.setattr(
        Reconstruction, "training_step", lambda *args: clock.sleep(0.3) or step(*args)
    )
    photos = make_photos(tmp_path / "photos")
    (photos / "bad.png").write_bytes(b"hello")
    (photos / "000.png").unlink()
    options = ["data=folder", f"data.train={photos}", f"data.val={photos}", "data.image_size=16"]
    run = tmp_path / "run"
    assert train([*TINY, *options, "trainer.max_steps=8", f"hydra.run.dir={run}"]) == 0
    found = [float(row["data/wait_share"]) for row in metrics_of(run) if row["data/wait_share"]]
    assert len(found) == 8 and found == pytest.approx([share] * 8, abs=1e-6)
    assert (run / "skipped.tsv").read_text().startswith("bad.png\tnot an image\t")
