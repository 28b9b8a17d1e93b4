"""Runs and exports from before the modules moved: they load, evaluate, export and go on as then."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vistok
from helpers import ROOT, losses_of, needs_lite0
from vistok.cli import evaluate, export, train

ASSETS = Path(__file__).parent / "assets" / "before_move"
EXPECTED = json.loads((ASSETS / "expected.json").read_text())
IMAGES = load_file(ASSETS / "images.safetensors")

#: Runs that read another one when they go on.
SOURCES = {"proxy": ["vqgan"], "decoder": ["proxy"]}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder that the runs were made in, with their data: they know it by relative paths."""
    shutil.copytree(ASSETS / "photos", tmp_path / "photos")
    shutil.copy(ASSETS / "texts.tar", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_looks(pictures, expected):
    """Compare the mean and 16 values of pictures."""
    flat = pictures.flatten()
    places = torch.linspace(0, len(flat) - 1, 16).long()
    assert flat.double().mean().item() == pytest.approx(expected["mean"], abs=1e-5)
    assert flat[places].tolist() == pytest.approx(expected["pixels"], abs=1e-4)


@pytest.mark.parametrize("name", EXPECTED["tokenizers"])
def test_ids_and_pictures_are_what_they_were(name):
    """The images are such that noise of 1e-4 leaves every id as it is."""
    expected = EXPECTED["tokenizers"][name]
    folder, _, weights = name.partition(" ")
    tok = vistok.load(ASSETS / folder, weights=weights or "ema")
    ids = torch.tensor(expected["ids"])
    assert torch.equal(tok.tokenize(IMAGES[expected["size"]][expected["images"]]), ids)
    given = {"text": IMAGES["text"]} if "ta_titok" in name else {}
    assert_looks(tok.detokenize(ids, **given), expected)
    if "three_tokens" in expected:
        assert_looks(tok.detokenize(ids, 3, **given), expected["three_tokens"])


def test_every_file_is_looked_at():
    folders = {f"{path.parent.name}/{path.name}" for path in ASSETS.glob("*s/*") if path.is_dir()}
    assert folders == {name.partition(" ")[0] for name in EXPECTED["tokenizers"]}
    assert {f"runs/{name}" for name in EXPECTED["resumed"]} == {f for f in folders if "runs" in f}


@pytest.mark.parametrize("name", EXPECTED["exported"])
def test_an_export_made_now_holds_the_same_codes(name, tmp_path):
    assert export([f"run={ASSETS / 'runs' / name}", f"out={tmp_path / 'out'}"]) == 0
    then = load_file(ASSETS / "exports" / name / "codebook.safetensors")
    now = load_file(tmp_path / "out" / "codebook.safetensors")
    assert then.keys() == now.keys()
    for key, value in then.items():
        torch.testing.assert_close(now[key], value, rtol=0, atol=1e-5)
    expected = EXPECTED["tokenizers"][f"runs/{name}"]
    images, ids = IMAGES[expected["size"]][expected["images"]], torch.tensor(expected["ids"])
    assert torch.equal(vistok.load(tmp_path / "out").tokenize(images), ids)


@pytest.mark.parametrize("name", EXPECTED["evaluated"])
def test_an_evaluation_measures_what_it_did(name, work):
    words = ["data=folder", "data.val=photos"] if name.startswith("exports") else []
    assert evaluate([f"run={ASSETS / name}", "out=out", "num_pictures=2", *words]) == 0
    found = json.loads(Path("out/metrics.json").read_text())
    for key, value in EXPECTED["evaluated"][name].items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


def resumed(name, goes_on):
    """Copy a run and what it reads, let it go on to step 6, and compare what it writes."""
    for run in [name, *SOURCES.get(name, [])]:
        shutil.copytree(ASSETS / "runs" / run, run)
    # The learning rate of that time ran over all steps, however often there came more.
    words = ["trainer.max_steps=6", "optimizer.on_extend=stretch"]
    assert goes_on([f"resume={name}", *words]) == 0
    expected, losses = EXPECTED["resumed"][name], losses_of(Path(name))
    assert list(losses) == [5, 6]  # metrics.jsonl begins here; metrics.csv has the steps before
    assert [float(losses[step]) for step in (5, 6)] == pytest.approx(expected["losses"], rel=1e-4)
    summary = json.loads(Path(name, "summary.json").read_text())
    assert summary["val_psnr"] == pytest.approx(expected["val_psnr"], rel=1e-4)
    assert summary["samples_seen"] == 24


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_lite0 if name == "alignment" else ())
        for name in EXPECTED["resumed"]
        if name != "sharded"
    ],
)
def test_a_run_goes_on_as_it_did(name, work):
    resumed(name, train)


@pytest.mark.slow
@pytest.mark.ranks
def test_two_sharded_ranks_go_on_as_they_did(work):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py")]
    resumed("sharded", lambda words: subprocess.run([*command, *words], env=environment).returncode)
