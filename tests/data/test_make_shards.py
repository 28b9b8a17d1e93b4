"""The command: what it writes, that it continues, and what it says."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encode, picture
from PIL import Image

from vistok import cli
from vistok.data.datamodule import VistokDataModule
from vistok.data.index import index_of
from vistok.data.sources import ShardSource

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return cli.make_shards([str(argument) for argument in arguments])


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_labels_and_sizes_come_through(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, f"out={out}", "shard_size=60KB", "workers=2") == 0
    tars = sorted(out.glob("train-*.tar"))
    assert len(tars) > 1 and all(tar.stat().st_size <= 60_000 for tar in tars)
    source = ShardSource(tars)
    originals = {path.read_bytes(): path for path in photos.rglob("*.png")}
    names = []
    for number in range(len(source)):
        _, data, label = source.read(number)
        names.append(originals[data].name)
        assert label == ["birds", "cats"].index(originals[data].parent.name)
    assert len(set(names)) == 24 and names != sorted(names)
    for tar in tars:
        index = index_of(tar)
        for offset, size, h, w in zip(
            index.offsets, index.sizes, index.heights, index.widths, strict=True
        ):
            data = tar.read_bytes()[offset : offset + size]
            assert Image.open(io.BytesIO(data)).size == (w, h)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["classes"] == ["birds", "cats"] and manifest["left_out"] == []
    assert manifest["splits"]["train"]["samples"] == 24
    said = capsys.readouterr().out
    assert "24 images" in said
    pattern = f"{out}/train-{{000000..{len(tars) - 1:06d}}}.tar"
    assert f"data=shards 'data.train={pattern}'\nor, if this is a validation set:\n" in said
    assert said.endswith(f"data=shards 'data.train=...' 'data.val={pattern}'\n")
    datamodule = VistokDataModule("shards", pattern, num_workers=0)
    datamodule.setup()
    assert datamodule.num_train + datamodule.num_val == 24


def test_equal_input_gives_equal_bytes_with_any_workers(photos, tmp_path):
    for name, workers in (("a", 1), ("b", 3)):
        assert run(photos, f"out={tmp_path / name}", "shard_size=60KB", f"workers={workers}") == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert run(photos, f"out={tmp_path / 'c'}", "shard_size=60KB", "seed=1") == 0
    assert tree(tmp_path / "c") != tree(tmp_path / "a")


def test_order_of_names_and_hold_out(photos, tmp_path, capsys):
    assert run(photos, f"out={tmp_path / 'o'}", "shuffle=false", "val_fraction=0.3") == 0
    first, second = (tmp_path / "o" / f"{split}-000000.tar" for split in ("train", "val"))
    said = capsys.readouterr().out
    assert said.endswith(f"data=shards 'data.train={first}' 'data.val={second}'\n")
    contents = {}
    for split in ("train", "val"):
        source = ShardSource([tmp_path / "o" / f"{split}-000000.tar"])
        contents[split] = [source.read(i)[1] for i in range(len(source))]
    paths = sorted(photos.rglob("*.png"), key=lambda p: p.relative_to(photos).as_posix())
    in_order = [path.read_bytes() for path in paths]
    assert contents["train"] == [data for data in in_order if data not in contents["val"]]
    assert sorted(contents["train"] + contents["val"]) == sorted(in_order)


def test_bad_images_are_left_out_and_named(photos, tmp_path, capsys):
    (photos / "cats" / "cut.png").write_bytes(encode(picture(0))[:400])
    (photos / "birds" / "text.jpg").write_bytes(b"hello")
    (photos / "birds" / "wrong.jpg").write_bytes(encode(picture(77)))  # a PNG by its bytes
    assert run(photos, f"out={tmp_path / 'o'}") == 0
    said = capsys.readouterr().out
    assert (
        "left out: 2 images that cannot be used" in said and "birds/text.jpg: not an image" in said
    )
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert manifest["left_out"] == ["birds/text.jpg", "cats/cut.png"]
    assert manifest["splits"]["train"]["samples"] == 25
    import webdataset

    samples = list(
        webdataset.WebDataset(str(tmp_path / "o" / "train-000000.tar"), shardshuffle=False)
    )
    assert all("png" in sample and "jpg" not in sample for sample in samples)


def test_it_continues_after_a_kill(photos, tmp_path, monkeypatch, capsys):
    assert run(photos, f"out={tmp_path / 'whole'}", "shard_size=40KB") == 0
    out = tmp_path / "o"
    assert run(photos, f"out={out}", "shard_size=40KB") == 0
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    # What kills at different moments leave: a part, an index without its tar, no manifest.
    (out / ".train-000002.tar.99.tmp").write_bytes(b"part")
    (out / "train-000001.tar").unlink()
    (out / "train-000002.tar").unlink()
    (out / "train-000002.idx").unlink()
    (out / "manifest.json").unlink()
    assert run(photos, f"out={out}", "shard_size=40KB") == 0
    assert tree(out) == tree(tmp_path / "whole")
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept


def test_a_continued_run_still_counts_what_was_left_out(photos, tmp_path, capsys):
    (photos / "cats" / "cut.png").write_bytes(encode(picture(0))[:400])
    for _ in range(2):
        assert run(photos, f"out={tmp_path / 'o'}") == 0
        assert "left out: 1 image that cannot be used" in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["left_out"] == [
        "cats/cut.png"
    ]


def test_it_does_not_mix_with_other_shards(photos, shards, tmp_path, capsys):
    before = tree(shards)
    assert run(photos, f"out={shards}") == 2
    assert "already holds train-000000.tar, made from other images" in capsys.readouterr().err
    assert tree(shards) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}"], "out= is not set; for example out=/sets/photos"),
        (["out={out}"], "expected one source of images, found none"),
        (["{photos}", "b", "out={out}"], "expected one source of images, found"),
        (
            ["{photos}", "out={out}", "shardsize=1"],
            "shardsize=: no such option (did you mean 'shard_size'?)",
        ),
        (
            ["{photos}", "out={out}", "shard_size=big"],
            "shard_size=big: must be a size, for example 300MB",
        ),
        (["{photos}", "out={out}", "shuffle=maybe"], "shuffle=maybe: must be true or false"),
        (["{photos}", "out={out}", "seed=x"], "seed=x: must be a whole number"),
        (
            ["{photos}", "out={out}", "val_fraction=1"],
            "val_fraction=1: must be at least 0 and below 1",
        ),
        (["{photos}", "out={out}", "workers=0"], "workers=0: must be"),
        (["/nowhere", "out={out}"], "folder=/nowhere: no such folder"),
        (["{out}", "out={out}"], "no such folder"),
    ],
)
def test_errors_are_one_line(photos, tmp_path, capsys, arguments, message):
    filled = [text.format(photos=photos, out=tmp_path / "o") for text in arguments]
    assert run(*filled) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "o").exists()


def test_nothing_decodes(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    for name in "ab":
        (tmp_path / "p" / f"{name}.jpg").write_bytes(b"hello")
    assert run(tmp_path / "p", f"out={tmp_path / 'o'}") == 2
    assert "found 2 images, but none that decodes" in capsys.readouterr().err
    assert list((tmp_path / "o").iterdir()) == []


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no such folder"):
        run("/nowhere", f"out={tmp_path / 'o'}", "debug=true")
    monkeypatch.setenv("VISTOK_DEBUG", "1")
    with pytest.raises(ValueError, match=r"no such folder"):
        run("/nowhere", f"out={tmp_path / 'o'}")


def test_the_script_and_its_help(photos, tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "make_shards.py")]
    helped = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True)
    assert "shard_size=300MB" in helped.stdout
    made = subprocess.run(
        [*script, str(photos), f"out={tmp_path / 'o'}"], capture_output=True, text=True, check=True
    )
    assert "uv run train.py data=shards" in made.stdout
    light = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tokenizers')!r}); sys.argv = ['x', '--help'];"
        "import vistok.cli as c; c.make_shards(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", light], capture_output=True).returncode == 0


def test_shuffling_mixes_the_classes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for number in range(100):
            data = encode(np.full((4, 4, 3), number, np.uint8))
            (tmp_path / "p" / name / f"{number}.png").write_bytes(data)
    assert run(tmp_path / "p", f"out={tmp_path / 'o'}") == 0
    source = ShardSource([tmp_path / "o" / "train-000000.tar"])
    labels = np.array([source.read(i)[2] for i in range(200)])
    assert 30 < labels[:100].sum() < 70
