"""Small image sets made on the spot; nothing here needs anything outside the project."""

import pytest
from data_helpers import encode, picture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has a cache folder of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VISTOK_CACHE", str(folder))
    return folder


@pytest.fixture
def photos(tmp_path):
    """24 images in two class folders."""
    for number in range(24):
        folder = tmp_path / "photos" / ("cats" if number % 3 else "birds")
        folder.mkdir(parents=True, exist_ok=True)
        image = picture(number, 36 + number, 50)
        (folder / f"{number:02d}.png").write_bytes(encode(image))
    return tmp_path / "photos"


@pytest.fixture
def shards(tmp_path):
    """37 images with labels in three shards; returns the folder."""
    from vistok.data.shards import ShardWriter, write_manifest

    folder = tmp_path / "shards"
    with ShardWriter(folder, "train") as writer:
        for number in range(37):
            if number in (15, 30):
                writer.roll()
            writer.write(encode(picture(number, 24, 30)), "png", label=number % 5)
    write_manifest(folder, {"train": writer.shards})
    return folder
