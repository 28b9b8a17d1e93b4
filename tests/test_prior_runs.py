"""Priors through the command line: training, exact resume, ranks, pictures, evaluation, bad input."""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import losses_of, metrics_of, needs_lite0
from ranks import TWO, assert_ended, fork
from same_runs import assert_same, state_of
from token_folders import make_tokens
from vistok.checkpoints.load import load_prior
from vistok.cli import evaluate, main, tokenize, train
from vistok.core.errors import CheckpointError
from vistok.data.token_module import TokenDataModule
from vistok.data.tokens import TokenFolder
from vistok.evaluation.token_statistics import token_statistics

#: A run of a second: a few thousand parameters.
SMALL = [
    "experiment=ar_gpt_tiny",
    "prior.width=16",
    "prior.depth=1",
    "prior.num_heads=2",
    "prior.multiple=8",
    "data.batch_size=4",
    "data.val_fraction=0.3",
    "optimizer.warmup_samples=0",
    "optimizer.lr=1e-2",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.checkpoint_every=2",
    "callbacks.num_pictures=2",
]
MASKGIT = ["experiment=maskgit_prior_tiny", *SMALL[1:]]


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_tokens(tmp_path / "tokens")


def run(words, tokens, name, *more):
    assert train([*words, f"tokens={tokens}", f"hydra.run.dir={name}", *more]) == 0
    return Path(name)


@pytest.mark.parametrize("words", [SMALL, MASKGIT], ids=["gpt", "maskgit"])
def test_an_interrupted_run_is_a_whole_one(tokens, words):
    """Dropout of everything included: its random numbers belong to samples."""
    noisy = [*words, "prior.dropout=0.2", "prior.token_dropout=0.2"]
    whole = run(noisy, tokens, "whole")
    part = run(noisy, tokens, "part", "trainer.max_steps=3", "optimizer.total_samples=24")
    assert train([f"resume={part}", "trainer.max_steps=6"]) == 0
    first, second = state_of(whole), state_of(part)
    for key in ("state_dict", "ema", "optimizer_states", "TokenDataModule"):
        assert_same(first[key], second[key], key)
    losses = losses_of(whole)
    assert losses == losses_of(part) and len(losses) == 6
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["samples_seen"] == 24 and summary["data"]["num_train"] < 40
    assert summary["val_nll"] == pytest.approx(summary["val_nll_per_token"] * 6)
    assert summary["bigram_nll"] < summary["unigram_nll"]


@pytest.mark.ranks
def test_two_ranks_train_as_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = make_tokens(tmp_path / "tokens", (8, 5), grid=None, variable=True, num_tokens=5)
    words = [*SMALL, "prior.dropout=0.1", f"tokens={tokens}"]
    job = fork([*words, *TWO, "hydra.run.dir=two"])
    assert train([*words, "hydra.run.dir=one"]) == 0
    assert_ended(job, 0)
    for column in ("loss/total", "val/nll", "val/nll_per_token", "samples_seen"):
        one, two = (
            [float(r[column]) for r in metrics_of(tmp_path / name) if r.get(column)]
            for name in ("one", "two")
        )
        assert len(one) >= 2 and one == pytest.approx(two, rel=1e-4), column
    one, two = (state_of(tmp_path / name)["ema"]["weights"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_likelihood_and_falls_below_that_of_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = make_tokens(tmp_path / "tokens", count=400, num_tokens=8, grid=None)
    more = ["trainer.max_steps=150", "trainer.val_check_interval=150", "data.batch_size=32"]
    folder = run(SMALL, tokens, "run", *more, "ema.decay=0.9", "trainer.log_every_n_steps=5")
    summary = json.loads((folder / "summary.json").read_text())
    # The label says by how much an id grows, which pairs of neighbours do not tell.
    assert summary["val_nll_per_token"] < summary["bigram_nll"] - 0.1
    prior, config = load_prior(folder)
    data = TokenDataModule(train=str(tokens), **config["data"])
    batch = data.first(data.num_val, training=False)
    with torch.no_grad():
        found = prior(batch["ids"], batch["length"], prior.condition_of(batch))
    assert found.nll.sum(dim=(1, 2)).mean().item() == pytest.approx(summary["val_nll"], rel=1e-4)
    with pytest.raises(CheckpointError, match="not of a tokenizer, but of task=prior"):
        import vistok

        vistok.load(folder)


KINDS = {
    "streams": ({"sizes": (8, 4)}, ["prior.streams=chained"]),
    "flattened": ({"sizes": (8, 4)}, ["prior.streams=flattened"]),
    "captions": ({"captions": True, "classes": 0}, ["prior.condition=caption"]),
    "nothing": ({"classes": 0}, ["prior.condition=none"]),
    "lengths": ({"variable": True, "grid": None}, []),
    "levels": (
        {"num_tokens": 8, "grid": None},
        ["prior.predict=blocks", "prior.levels=[1,1,2,4]"],
    ),
    "scales": (
        {"num_tokens": 7, "scales": [[1, 1], [1, 2], [2, 2]]},
        ["prior.predict=blocks", "prior.streams=heads"],
    ),
    "maskgit": ({"sizes": (8, 4)}, ["prior=maskgit_tiny"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokens_trains_and_is_evaluated(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, words = KINDS[kind]
    tokens = make_tokens(tmp_path / "tokens", **made)
    order = sorted(words, key=lambda word: not word.startswith("prior="))
    folder = run([SMALL[0], *order, *SMALL[1:]], tokens, "run", "trainer.max_steps=3")
    words = ["prior.num_samples=6", "prior.guidance=1.5", "batch_size=4"]
    assert evaluate([f"run={folder}", *words]) == 0
    results = json.loads((folder / "eval" / "metrics.json").read_text())
    assert math.isfinite(results["nll"]) and results["num_samples"] == 6
    assert results["sampling"]["guidance"] == 1.5
    assert 0 <= results["codes_of_training_images"] <= 1


@pytest.mark.slow
@needs_lite0
def test_pictures_of_an_export(exported, photos, tmp_path, monkeypatch):
    """Three commands lead from photographs to generated pictures."""
    monkeypatch.chdir(tmp_path)
    images = ["data=folder", f"data.train={photos}"]
    assert tokenize([f"model={exported}", *images, "out=tokens"]) == 0
    words = [*SMALL, "prior.condition=none", "trainer.max_steps=3", "data.val_fraction=0.4"]
    folder = run(words, "tokens", "run", f"data.tokenizer={exported}")
    drawn = np.asarray(Image.open(folder / "pictures" / "step_000003.png"))
    assert drawn.shape == (8 * (16 + 4), 8 * (2 * 18 + 2), 3)  # to 128 px
    more = ["prior.num_samples=8", "num_pictures=3", "batch_size=4", f"prior.images={photos}"]
    assert evaluate([f"run={folder}", *more]) == 0
    results = json.loads((folder / "eval" / "metrics.json").read_text())
    for name in ("gfd_lite0", "lite0_precision", "lite0_recall", "nearest_distance", "nll"):
        assert math.isfinite(results[name]), name
    assert results["compared_with"] == str(photos)
    assert results["nearest_distance_of_val"] > 0
    page = (folder / "report.html").read_text()
    for name in ("samples", "nearest"):
        sheet = (folder / "eval" / f"{name}.png").read_bytes()
        assert base64.b64encode(sheet).decode() in page
    assert f"{results['gfd_lite0']:.4g}" in page and "<figcaption>Losses" in page
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == page


def test_what_is_wrong_is_one_line(tokens, fails, exported):
    words = [*SMALL, "hydra.run.dir=run"]
    fails("train", *words, words="tokens: which folder? for example tokens=/tokens/cifar10")
    fails("train", *words, "tokens=nothing", words="nothing: no such folder")
    other = make_tokens(tokens.parent / "other", tokenizer_hash="cd" * 32)
    fails("train", *words, f"tokens={tokens}", f"data.val={other}", words="tokenizer_hash differs")
    fails("train", *words, f"tokens={tokens}", "prior.condition=caption", words="has no captions")
    fails("train", *words, f"tokens={tokens}", "prior.widht=3", words="did you mean 'prior.width'")
    fails("train", *words, f"tokens={tokens}", "data=folder", words="data.kind=folder: task=prior")
    fails(
        "train", *words, f"tokens={tokens}", f"data.tokenizer={exported}",
        words="is another tokenizer",
    )  # fmt: skip


def test_tokens_of_another_kind_are_refused_later_too(tokens, fails, tmp_path):
    folder = run(SMALL, tokens, "run", "trainer.max_steps=2")
    for name, made, told in (
        ("hash", {"tokenizer_hash": "cd" * 32}, "of another tokenizer (cdcdcdcdcdcd)"),
        ("vocabulary", {"sizes": (9,)}, "sizes is [9], but the prior was built for [8]"),
        ("length", {"num_tokens": 4, "grid": (2, 2)}, "num_tokens is 4"),
    ):
        other = make_tokens(tmp_path / name, **made)
        fails("train", f"resume={folder}", "trainer.max_steps=4", f"tokens={other}", words=told)
        fails("evaluate", f"run={folder}", f"prior.tokens={other}", words=told)
    more = make_tokens(tmp_path / "more", seed=1)
    told = "not the training tokens of the run to resume"
    fails("train", f"resume={folder}", "trainer.max_steps=4", f"tokens={more}", words=told)
    fails("evaluate", f"run={folder}", "prior.top_p=2", words="top_p=2: must be")
    fails("evaluate", f"run={folder}", "prior.num_samples=-1", words="prior.num_samples=-1")
    fails("evaluate", f"run={folder}", "data=folder", words="a prior reads tokens")


def test_altered_tokens_are_noticed(tokens, fails):
    shard = tokens / "tokens-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    fails("train", *SMALL, f"tokens={tokens}", "hydra.run.dir=run", words="altered: its checksum")


# ---------------------------------------------------------------------- data and statistics


def test_each_sample_comes_once_in_an_epoch_wherever_it_begins(tokens):
    data = TokenDataModule(train=str(tokens), batch_size=3, val_fraction=0.25, seed=5)
    data.setup("fit")
    train_part, val_part = data.parts
    assert len(train_part) + len(val_part) == 40 and not set(train_part) & set(val_part)
    batches = iter(data.train_dataloader())
    seen = [int(i) for _ in range(2 * len(train_part)) for i in next(batches)["index"]]
    for epoch in range(6):
        part = seen[epoch * len(train_part) : (epoch + 1) * len(train_part)]
        assert sorted(part) == sorted(train_part)
    data.samples_seen = 7
    again = next(iter(data.train_dataloader()))
    assert again["index"].tolist() == seen[7:10]
    folder = TokenFolder(tokens)
    for row, index in enumerate(again["index"].tolist()):
        np.testing.assert_array_equal(again["ids"][row].numpy(), folder[index].ids)
        assert again["label"][row] == folder[index].label and again["key"][row] == folder[index].key
    valid = [
        (int(i), bool(v))
        for b in data.val_dataloader()
        for i, v in zip(b["index"], b["valid"], strict=True)
    ]
    assert sorted(i for i, v in valid if v) == sorted(val_part)


def test_token_statistics_against_counting():
    rng = np.random.default_rng(0)
    train_ids = [rng.integers(0, 4, (int(rng.integers(1, 6)), 2)) for _ in range(30)]
    val_ids = [rng.integers(0, 4, (3, 2)) for _ in range(10)]
    found = token_statistics(train_ids, val_ids, [4, 4])
    unigram = bigram = 0.0
    for stream in range(2):
        ids = [int(x) for row in train_ids for x in row[:, stream]]
        pairs = [
            (b, int(x))
            for row in train_ids
            for b, x in zip([None, *map(int, row[:-1, stream])], row[:, stream], strict=True)
        ]
        unigram -= sum(math.log(ids.count(x) / len(ids)) for x in ids) / len(ids)
        before = [b for b, _ in pairs]
        bigram -= sum(math.log(pairs.count(p) / before.count(p[0])) for p in pairs) / len(pairs)
    assert found["unigram_entropy"] == pytest.approx(unigram)
    assert found["bigram_entropy"] == pytest.approx(bigram)
    assert found["unigram_nll"] > 2 * math.log(4) - 0.2
    # Of ids that follow one another, the pairs know all.
    chain = [np.arange(s, s + 40)[:, None] % 7 for s in range(20)]
    found = token_statistics(chain, chain[:3], [7])
    assert found["bigram_nll"] < 0.1 and found["unigram_nll"] == pytest.approx(
        math.log(7), abs=0.01
    )
