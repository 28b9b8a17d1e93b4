"""The benchmark runs, and its numbers are rates."""

import json
import subprocess
import sys

from helpers import ROOT, Clock
from vistok import cli
from vistok.data import dataset
from vistok.data.datamodule import VistokDataModule
from vistok.tools import bench_data as bench


def test_it_measures_and_writes(shards, tmp_path, capsys):
    options = ["image_size=16", "workers=1", "batch_size=8", "seconds=0.2", "rounds=1"]
    place = f"{shards}/train-*.tar"
    assert cli.bench_data([place, *options, f"out={tmp_path / 'b.json'}"]) == 0
    said = capsys.readouterr().out
    assert "vistok's stream" in said and "stream/plain = " in said
    result = json.loads((tmp_path / "b.json").read_text())
    rates = result["images_per_second"]
    assert set(rates) == {"raw_alone", "raw", "stream", "plain"} and min(rates.values()) > 0
    assert abs(result["ratios"]["stream/raw"] - rates["stream"] / rates["raw"]) < 0.01
    assert result["options"]["image_size"] == 16 and result["images"] == 36


def test_the_rate_is_that_of_the_clock(monkeypatch):
    """A loader of known speed: a hundred images every twentieth second."""
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)

    def slow():
        while True:
            clock.sleep(0.05)
            yield {"image": [0] * 100}

    rate = bench.loader_rate(slow(), bench.Options(seconds=0.5, workers=1))
    assert abs(rate - 2000) < 1e-6


def test_waiting_is_measured(shards, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(dataset, "time", clock)
    data = VistokDataModule("shards", f"{shards}/*.tar", image_size=16, batch_size=4, num_workers=0)
    data.setup()
    assert data.wait_seconds == 0
    original = data.train_set._load
    data.train_set._load = lambda requests: clock.sleep(0.05) or original(requests)
    loader = data.train_dataloader()
    for number, _ in enumerate(loader, start=1):
        clock.sleep(0.02)  # the step: not waiting
        if number == 6:
            break
    assert data.wait_seconds == loader.wait_seconds and abs(data.wait_seconds - 0.3) < 1e-9


def test_errors_and_help(capsys):
    for arguments, message in [
        (["/nowhere/x.tar"], "no such shard"),
        (["image_size=0"], "image_size=0: must be a whole number"),
        (["sice=3"], "sice=: no such option"),
        (["a.tar", "b.tar"], "expected one pattern or folder"),
        (["crop=middle"], "data.train_crop='middle': must be one of tv_center"),
        (["plain=maybe"], "must be true or false"),
    ]:
        assert cli.bench_data(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    script = [sys.executable, str(ROOT / "scripts" / "bench_data.py"), "--help"]
    assert "seconds=8" in subprocess.run(script, capture_output=True, text=True, check=True).stdout
