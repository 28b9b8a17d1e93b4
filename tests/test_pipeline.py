"""Whole runs through the command line: files, evaluation, fine-tuning, loggers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import vistok
from helpers import PATIENCE, ROOT, losses_of, make_photos, metrics_of, tiny_words
from same_runs import assert_same, state_of
from vistok.checkpoints.find import find_checkpoint
from vistok.cli import evaluate, train
from vistok.core import registry
from vistok.core.errors import ConfigError


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    """Words of a tiny run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tiny_words(photos)


# ---------------------------------------------------------------------- what a run leaves behind


def test_run_folder(finished_run):
    run = finished_run
    summary = json.loads((run / "summary.json").read_text())
    assert 5 < summary["val_psnr"] < 40 and 5 < summary["baseline_kmeans_psnr"] < 40
    assert summary["baseline_kmeans_codes"] == 2 ** (4 * 4 // 4)  # as many bits, on 4 patches
    for name in ("", "val_"):
        assert 0 < summary[f"{name}codebook_usage"] <= 1
        assert 1 <= summary[f"{name}perplexity"] <= 16
    assert summary["samples_seen"] == 7 * 4 and summary["steps"] == 7 and summary["seconds"] > 0
    assert summary["bits_per_image"] == 4 * 4 and summary["skipped_images"] == 0
    assert summary["data"]["num_train"] + summary["data"]["num_val"] == 22
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["tokenizer"]["encoder"]["width"] == 16 and config["quantizer"]["dim"] == 16
    versions = json.loads((run / "versions.json").read_text())
    assert versions["vistok"] == vistok.__version__
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"lightning", "python", "commit", "cpu_threads"} <= versions.keys()
    assert (run / "command.txt").read_text().strip()
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt"]
    assert [p.name for p in run.rglob("*.tmp")] == []


def test_pictures(finished_run):
    pictures = sorted((finished_run / "pictures").iterdir())
    assert [p.name for p in pictures] == ["step_000004.png", "step_000007.png"]
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            # Two columns, two rows of 16 px, white gaps of 2 px, to 128 px; and a line of text.
            side = 8 * (2 * 18 + 2)
            text = picture.height - side
            assert picture.width >= side and 8 < text < 40 and picture.mode == "RGB"
            assert picture.getpixel((0, text)) == (255, 255, 255)
            assert picture.crop((0, 0, side, text)).convert("L").getextrema()[0] < 99
    first, second = (Image.open(path) for path in pictures)
    top, bottom = (0, text, side, text + side // 2), (0, text + side // 2, side, text + side)
    assert first.crop(top).tobytes() == second.crop(top).tobytes()  # the same originals
    assert first.crop(bottom).tobytes() != second.crop(bottom).tobytes()


def test_metrics_file(finished_run):
    rows = metrics_of(finished_run)
    training = [row for row in rows if row["loss/total"]]
    validation = [row for row in rows if row["val/psnr"]]
    assert [int(row["step"]) for row in training] == [1, 2, 3, 4, 5, 6, 7]
    assert [float(row["samples_seen"]) for row in training] == [4, 8, 12, 16, 20, 24, 28]
    assert [int(row["step"]) for row in validation] == [4, 7]
    last = json.loads((finished_run / "summary.json").read_text())
    assert float(validation[-1]["val/psnr"]) == pytest.approx(last["val_psnr"], abs=1e-4)
    for row in training:
        total = float(row["loss/reconstruction"]) + 0.25 * float(row["loss/commitment"])
        assert float(row["loss/total"]) == pytest.approx(total, rel=1e-5)


def test_best_checkpoint_is_the_best_validation(words, tmp_path, monkeypatch):
    from vistok.evaluation.evaluator import Evaluator

    scores = iter([10.0, 12.0, 30.0, 29.0, 11.0])
    real = Evaluator.compute
    monkeypatch.setattr(Evaluator, "compute", lambda self: {**real(self), "psnr": next(scores)})
    more = ["ema.decay=0", "trainer.val_check_interval=1", "trainer.max_steps=5"]
    assert train([*words, *more, "hydra.run.dir=run"]) == 0
    assert state_of(tmp_path / "run", "best")["global_step"] == 3
    assert state_of(tmp_path / "run")["global_step"] == 5
    assert "ema" not in state_of(tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").name == "best.ckpt"


def test_the_averages_are_validated_and_both_are_saved(words, tmp_path, monkeypatch):
    from vistok.training.ema import EMA

    real, swaps = EMA.swap, []
    monkeypatch.setattr(EMA, "swap", lambda self: swaps.append(self.swapped) or real(self))
    more = ["ema.decay=0.9", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    more += ["data.eval_batch_size=1", "optimizer.lr=1e-2", "hydra.run.dir=run"]
    assert train([*words, *more]) == 0
    run = tmp_path / "run"
    assert swaps == [False, True], "once for several batches and the pictures"
    best, last = state_of(run, "best"), state_of(run)  # saved in the validation, and after it
    assert best["global_step"] == last["global_step"] == 3
    assert_same(best["state_dict"], last["state_dict"])
    assert_same(best["ema"], last["ema"])
    (row,) = [row for row in metrics_of(run) if row["val/psnr"]]
    for weights, same in (("ema", True), ("last", False)):
        assert evaluate([f"run={run}", f"weights={weights}", f"out={tmp_path / weights}"]) == 0
        psnr = json.loads((tmp_path / weights / "metrics.json").read_text())["psnr"]
        assert (abs(psnr - float(row["val/psnr"])) < 1e-4) is same


def test_the_loss_falls_and_validation_line_shows(cli, words):
    more = ["trainer.max_steps=60", "optimizer.lr=3e-3", "trainer.val_check_interval=30"]
    code, lines, out = cli("train", *words, *more, "hydra.run.dir=run")
    assert code == 0 and lines == []
    losses = [float(r["loss/reconstruction"]) for r in metrics_of_cwd("run") if r["loss/total"]]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    shown = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["30/60", "60/60"]
    assert all(word in shown[0] for word in ("loss", "val psnr", "dB", "usage", "perplexity"))


def metrics_of_cwd(name):
    return metrics_of(Path(name))


# ---------------------------------------------------------------------- evaluation


def test_evaluation(cli, finished_run, tmp_path):
    from vistok.data.datamodule import VistokDataModule

    code, lines, out = cli(
        "evaluate", f"run={finished_run}", "out=e", "num_pictures=3", "weights=last"
    )
    assert code == 0 and not lines
    results = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert "psnr" in out and "codebook_usage" in out
    with Image.open(tmp_path / "e" / "reconstructions.png") as picture:
        assert picture.size == (8 * (3 * 18 + 2), 8 * 38)  # to 128 px

    # The same numbers by hand, image by image.
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    data = VistokDataModule(**config["data"])
    data.setup("validate")
    tok = vistok.load(finished_run, weights="last")
    psnrs, ids = [], []
    for batch in data.val_dataloader():
        for image in batch["image"][batch["valid"]]:
            ids.append(tok.tokenize(image[None]))
            rec = (tok.detokenize(ids[-1])[0] * 255).round() / 255
            mse = (rec.double() - image.double() / 255).square().mean()
            psnrs.append(float(-10 * torch.log10(mse)))
    counts = torch.bincount(torch.cat(ids).flatten(), minlength=16).double()
    p = counts[counts > 0] / counts.sum()
    assert results["psnr"] == pytest.approx(sum(psnrs) / len(psnrs), abs=1e-4)
    assert results["images"] == len(psnrs) == data.num_val
    assert results["codebook_usage"] == pytest.approx(len(p) / 16)
    assert results["dead_codes"] == 16 - len(p)
    assert results["perplexity"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)
    assert results["bits_per_image"] == 4 * 4 and results["bits_per_pixel"] == 16 / 256
    assert results["num_tokens"] == 4 and results["images_per_second"] > 0
    assert -1 <= results["ssim"] <= 1 and results["crop"] == "adm_center"
    assert results["skipped_images"] == 0 and results["precision"] == "float32"


@pytest.mark.slow
def test_evaluation_of_other_data_weights_and_exports(cli, finished_run, exported, tmp_path):
    other = make_photos(tmp_path / "other", 5, height=20, width=30)
    results = {}
    for name, words in {
        "ema": [f"run={finished_run}"],
        "last": [f"run={finished_run}", "weights=last"],
        "file": [f"run={finished_run}/checkpoints/best.ckpt"],
        "other": [f"run={finished_run}", f"data.val={other}"],
        "export": [f"run={exported}", "data=folder", f"data.val={other}", "batch_size=2"],
        "bf16": [f"run={finished_run}", f"data.val={other}", "precision=bf16"],
    }.items():
        code, lines, _ = cli(
            "evaluate", *words, f"out={name}", "num_pictures=0", "data.num_workers=0"
        )
        assert code == 0, lines
        results[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        assert not (tmp_path / name / "reconstructions.png").exists()
    keys = ("psnr", "ssim", "codebook_usage", "perplexity")
    assert [results["ema"][k] for k in keys] == [results["file"][k] for k in keys]
    assert results["ema"]["psnr"] != results["last"]["psnr"]
    assert results["other"]["images"] == 5 and results["other"]["psnr"] != results["ema"]["psnr"]
    assert [results["other"][k] for k in keys] == pytest.approx(
        [results["export"][k] for k in keys]
    )
    # Rounding turns a code here and there, of four in each of five pictures.
    assert results["bf16"]["psnr"] == pytest.approx(results["other"]["psnr"], abs=0.5)
    assert results["bf16"]["precision"] == "bfloat16"


# ---------------------------------------------------------------------- options of a run


def test_fine_tuning_starts_from_the_weights(words, finished_run, exported, tmp_path):
    kept = vistok.load(finished_run).state_dict()
    for number, source in enumerate(
        (finished_run, exported, finished_run / "checkpoints" / "best.ckpt")
    ):
        run = tmp_path / f"{number}"
        more = [
            f"init_from={source}",
            "optimizer.lr=0",
            "optimizer.weight_decay=0",
            "trainer.max_steps=1",
        ]
        assert train([*words, *more, f"hydra.run.dir={run}"]) == 0
        weights = vistok.load(run, weights="last").state_dict()
        # Nothing moves at a rate of 0 but the codes, and nothing is initialised anew.
        still = [key for key in weights if not key.startswith("quantizer.") or "project" in key]
        assert len(still) > 20
        for key in still:
            assert torch.equal(weights[key], kept[key]), key


def test_fine_tuning_of_another_architecture_is_refused(fails, words, finished_run):
    more = [f"init_from={finished_run}", "quantizer.codebook_size=32"]
    fails("train", *words, *more, words=("quantizer is another one", "init_parts"))
    more = [f"init_from={finished_run}", "tokenizer.encoder.depth=3"]
    fails("train", *words, *more, words=("another architecture", "is missing"))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("32", torch.float32)])
def test_precision(words, tmp_path, monkeypatch, precision, dtype):
    from vistok.quantizers.base import Quantizer

    seen = set()
    real = Quantizer.forward

    def forward(self, latents, *args, **kwargs):
        output = real(self, latents, *args, **kwargs)
        seen.add((self.training, latents.dtype, output.quantized.dtype))
        return output

    monkeypatch.setattr(Quantizer, "forward", forward)
    more = [f"trainer.precision={precision}", "trainer.max_steps=2", "hydra.run.dir=run"]
    assert train([*words, *more]) == 0
    assert {(d, q) for training, d, q in seen if training} <= {
        (dtype, torch.float32),
        (torch.float32, torch.float32),
    }
    state = state_of(tmp_path / "run")["state_dict"]
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_float32_products_have_the_precision_of_the_run(words, monkeypatch, precision):
    """During the run and not after it, also in the quantizer's lookup."""
    from vistok.quantizers.base import Quantizer

    seen, real = set(), Quantizer.forward

    def forward(self, latents, *args, **kwargs):
        seen.add(torch.get_float32_matmul_precision())
        return real(self, latents, *args, **kwargs)

    monkeypatch.setattr(Quantizer, "forward", forward)
    more = ["trainer.max_steps=1", f"trainer.matmul_precision={precision}"]
    assert train([*words, *more]) == 0
    assert seen == {precision} and torch.get_float32_matmul_precision() == "highest"


def test_auto_precision_follows_the_processor(monkeypatch):
    from vistok.training.trainer import precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for answers, expected in (
        ((True, False), "bf16"),
        ((False, True), "bf16"),
        ((False, False), "32"),
    ):
        for probe, answer in zip(
            ("_is_amx_tile_supported", "_is_avx512_bf16_supported"), answers, strict=True
        ):
            monkeypatch.setattr(torch.cpu, probe, lambda answer=answer: answer, raising=False)
        assert precision("auto", "cpu").startswith(expected)


def test_accumulation_counts_samples(words, tmp_path):
    more = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=4", "data.batch_size=3"]
    assert train([*words, *more, "hydra.run.dir=run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["samples_seen"] == 4 * 2 * 3
    assert list(losses_of(tmp_path / "run")) == [1, 2, 3, 4]
    lrs = [float(r["lr"]) for r in metrics_of(tmp_path / "run") if r["loss/total"]]
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)]
    assert lrs == pytest.approx([1e-3 * factor for factor in expected])


@pytest.mark.parametrize(
    "before, after",
    [
        ((2, 9, 3), (2, 9, 9)),  # an epoch of 18 images is a step, and ends where the run does
        ((2, 4, 4), (4, 2, 9)),  # as on half as many devices with trainer.global_batch_size
        ((4, 2, 3), (1, 8, 9)),
    ],
)
def test_resume_begins_with_a_whole_step(words, tmp_path, before, after):
    def how(accumulated, batch, steps):
        return [
            f"trainer.accumulate_grad_batches={accumulated}",
            f"data.batch_size={batch}",
            f"trainer.max_steps={steps}",
            "trainer.val_check_interval=4",
            "optimizer.total_samples=200",
        ]

    assert train([*words, *how(*after), "hydra.run.dir=whole"]) == 0
    assert train([*words, *how(*before), "hydra.run.dir=run"]) == 0
    assert train(["resume=run", *how(*after)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples_seen"] == 9 * before[0] * before[1]
    whole, resumed = losses_of(tmp_path / "whole"), losses_of(tmp_path / "run")
    assert resumed.keys() == whole.keys() == set(range(1, 10))
    for step, loss in whole.items():
        assert float(resumed[step]) == pytest.approx(float(loss), rel=1e-4), step
    validated = [int(row["step"]) for row in metrics_of(tmp_path / "run") if row.get("val/psnr")]
    assert validated == sorted({4, 8, 9, before[2]})


def test_schedule_counts_samples(words, tmp_path):
    more = ["optimizer.warmup_samples=16", "optimizer.final_lr_factor=0.1", "trainer.max_steps=12"]
    assert train([*words, *more, "hydra.run.dir=run"]) == 0
    lrs = [float(r["lr"]) for r in metrics_of(tmp_path / "run") if r["loss/total"]]
    assert lrs[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert lrs[7] == pytest.approx(0.55e-3) and lrs[-1] == pytest.approx(1e-4)


def test_tensorboard_in_one_word(words, tmp_path):
    more = ["logger=tensorboard", "trainer.max_steps=2", "hydra.run.dir=run"]
    assert train([*words, *more]) == 0
    written = b"".join(p.read_bytes() for p in (tmp_path / "run" / "tensorboard").glob("events*"))
    assert b"loss/total" in written and b"val/psnr" in written
    assert len(losses_of(tmp_path / "run")) == 2  # CSV always


@pytest.mark.slow
def test_wandb_in_one_word(words, tmp_path):
    """In a process of its own, with nobody to answer a prompt and no network to wait for."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment |= {"OMP_NUM_THREADS": "1"}
    (tmp_path / "home").mkdir()
    words = [*words, "logger=wandb", "trainer.max_steps=2", "hydra.run.dir=run"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert list(run.rglob("*.wandb")), sorted(run.rglob("*"))
    assert "stored offline" in result.stdout
    assert len(losses_of(run)) == 2


PLUGIN = '''
import torch
import vistok
from vistok.quantizers.fsq import FSQ

@vistok.register
class Mine(FSQ):
    """Nine codes."""
    def __init__(self, dim: int, bias: float) -> None:
        super().__init__(dim, levels=[3, 3])
        self.bias = bias
'''


def test_plugin_brings_a_quantizer_of_ones_own(fails, words, tmp_path, monkeypatch):
    name = "my_plugin_of_this_test"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    (tmp_path / "mine" / "quantizer").mkdir(parents=True)
    (tmp_path / "mine" / "quantizer" / "mine.yaml").write_text(
        f"# My own quantizer.\n_target_: {name}.Mine\ndim: ${{tokenizer.latent_dim}}\nbias: 0.5\n"
    )
    words = [w for w in words if not w.startswith("quantizer.")]
    words += [
        "~experiment",
        "quantizer=mine",
        "--config-dir=mine",
        "trainer.max_steps=2",
        "hydra.run.dir=run",
    ]
    fails("train", *words, words=(f"{name}.Mine", "registry"))
    assert train([*words, f"plugins=[{name}]"]) == 0
    assert vistok.load("run").codebooks()[0].shape == (9, 2)
    fails("train", "resume=run", "trainer.max_steps=3", words=(f"plugins=[{name}]", "trust"))
    assert train(["resume=run", "trainer.max_steps=3", f"plugins=[{name}]"]) == 0
    monkeypatch.delitem(registry._registered["part"], f"{name}.Mine")  # a program without it
    with pytest.raises(ConfigError, match="registry"):
        vistok.load("run")


def test_checkpoints_hold_each_weight_once(finished_run):
    keys = state_of(finished_run)["state_dict"]
    assert keys and all(key.startswith(("tokenizer.", "loss.")) for key in keys)


def test_grey_and_four_channels_and_oblong_images(words, tmp_path):
    for channels in (1, 4):
        more = [f"data.channels={channels}", "data.image_size=[16,24]", "data.augment=[hflip]"]
        run = tmp_path / f"c{channels}"
        assert train([*words, *more, "trainer.max_steps=1", f"hydra.run.dir={run}"]) == 0
        tok = vistok.load(run)
        assert tok.image_size == (16, 24) and tok.channels == channels
        with Image.open(next((run / "pictures").iterdir())) as picture:
            assert picture.mode == {1: "L", 4: "RGBA"}[channels]


@pytest.mark.slow
def test_compile_changes_little_and_its_checkpoints_fit(words, tmp_path):
    for name, flag in (("plain", "false"), ("compiled", "true")):
        more = [f"compile={flag}", "trainer.max_steps=3", f"hydra.run.dir={tmp_path / name}"]
        assert train([*words, *more]) == 0
    plain, compiled = (losses_of(tmp_path / name) for name in ("plain", "compiled"))
    for step, loss in plain.items():
        assert float(compiled[step]) == pytest.approx(float(loss), rel=1e-3)
    assert (
        state_of(tmp_path / "plain")["state_dict"].keys()
        == state_of(tmp_path / "compiled")["state_dict"].keys()
    )
    assert train([f"resume={tmp_path / 'compiled'}", "compile=false", "trainer.max_steps=4"]) == 0


@pytest.mark.nightly
def test_default_experiment_end_to_end(cli, tmp_path):
    """The commands of the README at few steps, on the embedded photographs."""
    words = ["trainer.max_steps=12", "trainer.val_check_interval=6", "hydra.run.dir=run"]
    words += ["init_images=64", "baseline.num_patches=5000", "trainer.limit_val_batches=1"]
    code, lines, out = cli("train", *words)
    assert code == 0, lines
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["baseline_kmeans_psnr"] > 15 and summary["samples_seen"] == 12 * summary[
        "data"
    ].get("batch_size", 32)
    losses = [float(r["loss/total"]) for r in metrics_of(tmp_path / "run") if r["loss/total"]]
    assert losses
    code, lines, _ = cli("train", "resume=run", "trainer.max_steps=14")
    assert code == 0, lines
    code, lines, _ = cli("evaluate", "run=run", "num_pictures=4")
    assert code == 0, lines
    code, lines, _ = cli("export", "run=run", "out=exported")
    assert code == 0, lines
    assert vistok.load(tmp_path / "exported").num_tokens == vistok.load(tmp_path / "run").num_tokens
