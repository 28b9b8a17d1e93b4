"""Runs that get more steps, or begin to average; runs that start from another's weights."""

import json
import math
import subprocess
import sys

import pytest
import torch

from helpers import TINY, config_of, tiny_tokenizer
from vistok.checkpoints.read import read_checkpoint
from vistok.core.errors import CheckpointError, ConfigError
from vistok.tasks.sources import _resized, parts_of, resolve_source
from vistok.training import wandb_logger
from vistok.training.peers import Peers, killed
from vistok.training.schedule import Schedule, fresh, resumed


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "data=folder", f"data.train={photos}", "data.image_size=16"]
    return [*words, "data.val_fraction=0.2"]


# ---------------------------------------------------------------------- the learning rate

OPTIONS = {"lr": 1.0, "warmup_samples": 10, "total_samples": None, "final_lr_factor": 0.1}


def checkpoint(steps, max_steps, options=OPTIONS, **more):
    config = {"optimizer": dict(options), "trainer": {"max_steps": max_steps}}
    return {"global_step": steps, "hyper_parameters": {"config": config}, **more}


def cosine(progress, final=0.1):
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def test_a_run_of_its_planned_length_tells_nothing():
    now, told = resumed(OPTIONS, 400, checkpoint(50, 100), 200, "x")
    assert now == fresh(OPTIONS, 400) and told == ""
    for samples in (1, 9, 10, 200, 400):
        expected = samples / 10 if samples < 10 else cosine((samples - 10) / 390)
        assert now.factor(samples) == pytest.approx(expected)


def test_hold_never_jumps():
    now, told = resumed({**OPTIONS, "on_extend": "hold"}, 800, checkpoint(100, 100), 400, "x")
    assert now.factor(400) == now.factor(404) == now.factor(800) == pytest.approx(0.1)
    assert (
        "on_extend=hold" in told
        and "stays at 0.1 of optimizer.lr until the run ends at 800" in told
    )


def test_stretch_is_the_schedule_of_the_longer_run():
    stretched = {**OPTIONS, "on_extend": "stretch"}
    now, told = resumed(stretched, 800, checkpoint(100, 100), 400, "x")
    assert now == fresh(OPTIONS, 800) and "stretch" in told
    ended = {**stretched, "total_samples": 500}  # 125 % of the run stays 125 %
    now, _ = resumed(ended, 800, checkpoint(100, 100, ended), 400, "x")
    assert now.total == 1000


def test_rewarm_rises_from_where_it_was_and_ends_with_the_run():
    options = {**OPTIONS, "on_extend": "rewarm"}
    now, told = resumed(options, 800, checkpoint(100, 100), 400, "x")
    assert now.factor(400) == pytest.approx(0.1)
    assert now.factor(405) == pytest.approx(0.55) and now.factor(410) == pytest.approx(1)
    assert now.factor(605) == pytest.approx(cosine(0.5)) and now.factor(800) == pytest.approx(0.1)
    assert "rises again over 10 samples" in told
    # A resume of the extended run goes on in it.
    later = checkpoint(150, 200, options, schedule=now.state())
    assert resumed(options, 800, later, 600, "x") == (now, "")


def test_a_schedule_that_the_command_changes_is_the_commands():
    options = {**OPTIONS, "total_samples": 600}
    now, told = resumed(options, 800, checkpoint(100, 100), 400, "x")
    assert now == fresh(options, 800) and "optimizer.total_samples" in told


@pytest.mark.parametrize("state", [3, {}, {**fresh(OPTIONS, 9).state(), "total": -1}])
def test_a_damaged_schedule_is_refused(state):
    with pytest.raises(CheckpointError, match="file: damaged; its schedule"):
        resumed(OPTIONS, 800, checkpoint(1, 2, schedule=state), 4, "file")
    assert Schedule(**fresh(OPTIONS, 9).state()) == fresh(OPTIONS, 9)


def test_averages_begin_at_the_present_weights(cli, words, tmp_path):
    assert cli("train", *words, "ema.decay=0", "hydra.run.dir=run")[0] == 0
    before = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    code, lines, _ = cli("train", "resume=run", "trainer.max_steps=5", "ema.decay=0.9")
    assert code == 0, lines
    after = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    name = "encoder.patch_embed.weight"
    old, new = before[f"tokenizer.{name}"], after["state_dict"][f"tokenizer.{name}"]
    # One update with decay 2/11.
    expected = old * 2 / 11 + new * 9 / 11
    assert torch.allclose(after["ema"]["weights"][name], expected, atol=1e-6)


# ---------------------------------------------------------------------- fine-tuning


def test_architecture_and_sizes_come_from_the_source(finished_run):
    config = config_of()  # the default: other sizes than the run's
    config["init_from"] = str(finished_run)
    found = resolve_source(config, ["data.batch_size=4"])
    assert found["tokenizer"]["encoder"]["width"] == 16 and found["data"]["image_size"] == 16
    assert found["quantizer"]["codebook_size"] == 16
    told = config_of("quantizer.codebook_size=64", "data.image_size=32")
    told["init_from"] = str(finished_run)
    found = resolve_source(told, ["quantizer.codebook_size=64", "data.image_size=32"])
    assert found["quantizer"]["codebook_size"] == 64 and found["quantizer"]["dim"] == 16
    assert found["tokenizer"]["encoder"]["image_size"] == found["tokenizer"]["image_size"] == 32
    other = config_of("tokenizer=vqgan_tiny")
    other["init_from"] = str(finished_run)
    assert resolve_source(other, ["tokenizer=vqgan_tiny"]) == other


@pytest.mark.parametrize(
    ("parts", "message"),
    [(["encodr"], "did you mean 'encoder'"), ([], "name the parts")],
)
def test_parts_are_named(parts, message):
    with pytest.raises(ConfigError, match=message):
        parts_of({"init_parts": parts, "init_from": "runs/x"})
    with pytest.raises(ConfigError, match="add init_from"):
        parts_of({"init_parts": ["encoder"], "init_from": None})


def test_positions_keep_what_is_linear():
    """Of a function that is linear in both directions, inside the borders."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table = torch.stack([y, x], dim=-1).flatten(0, 1)
    front = torch.tensor([[5.0, 6.0]])
    moved = _resized(torch.cat([front, table]), torch.zeros(1 + 16 * 16, 2), (64, 64), (128, 128))
    assert torch.equal(moved[:1], front)
    grid = moved[1:].view(16, 16, 2)[6:10, 6:10]
    expected = (torch.arange(6.0, 10) + 0.5) / 2 - 0.5
    assert torch.allclose(grid[:, 0, 0], expected, atol=1e-5)
    assert torch.allclose(grid[0, :, 1], expected, atol=1e-5)
    assert _resized(table, torch.zeros(7, 2), (64, 64), (128, 128)) is None


def test_another_codebook_keeps_encoder_and_decoder(cli, fails, words, finished_run, tmp_path):
    more = [*words, f"init_from={finished_run}", "quantizer.codebook_size=8", "hydra.run.dir=run"]
    more += ["trainer.max_steps=1", "optimizer.lr=0", "ema.decay=0"]
    fails("train", *more, words=("init_parts=[encoder,decoder]",))
    code, lines, out = cli("train", *more, "init_parts=[encoder,decoder]")
    assert code == 0, lines
    assert "codebook, from" in out and "from data: encoder" not in out
    import vistok

    source, found = vistok.load(finished_run), vistok.load(tmp_path / "run")
    assert found.codebooks()[0].shape[0] == 8
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(found.encoder.state_dict()[name], value), name


def test_another_resolution_starts_where_the_source_was(cli, words, finished_run, tmp_path):
    words = [w for w in words if not w.startswith("data.image_size")]
    more = [*words, f"init_from={finished_run}", "data.image_size=32", "hydra.run.dir=run"]
    code, lines, out = cli("train", *more, "trainer.max_steps=1")
    assert code == 0, lines
    assert "encoder.patch_positions, decoder.patch_positions interpolated" in out
    import vistok

    assert vistok.load(tmp_path / "run").image_size == (32, 32)
    assert tiny_tokenizer().image_size == (16, 16)


# ---------------------------------------------------------------------- loggers


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    for name in list(__import__("os").environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def test_the_environment_of_wandb_is_followed(quiet, tmp_path):
    assert wandb_logger.chosen_mode(None) == "offline"  # nobody is logged in
    (tmp_path / "netrc").write_text("machine wandb.mine.org login user password 0123\n")
    quiet.setenv("WANDB_BASE_URL", "https://wandb.mine.org:8443")
    assert wandb_logger.is_logged_in(wandb_logger.server())
    quiet.setattr(wandb_logger, "is_reachable", lambda address: True)
    assert wandb_logger.chosen_mode(None) == "online"
    assert wandb_logger.chosen_mode(True) == "offline"
    quiet.setenv("WANDB_MODE", "offline")
    assert wandb_logger.chosen_mode(False) == "offline"
    quiet.setenv("WANDB_MODE", "disabled")
    assert wandb_logger.chosen_mode(False) == "disabled"
    assert wandb_logger.build_wandb({"logger": {"offline": None}}, tmp_path) is None


def test_a_server_that_does_not_answer_costs_no_run(quiet):
    import socket

    quiet.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        quiet.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert wandb_logger.chosen_mode(None) == "offline"
        free.listen()
        assert wandb_logger.chosen_mode(None) == "online"


def test_each_folder_is_one_run_of_wandb(quiet, tmp_path):
    config = {"logger": {"name": "wandb", "project": None, "offline": None}}
    made = {}
    for sweep in ("first", "second"):
        for job in ("0", "1"):
            folder = tmp_path / sweep / job
            run = wandb_logger.WandbRun(config, folder, "offline")
            options = run.options
            assert options["name"] == f"{sweep}_{job}" and options["group"] == sweep
            assert wandb_logger.WandbRun(config, folder, "offline").options["id"] == options["id"]
            made[options["id"]] = folder
    assert len(made) == 4
    old = tmp_path / "older"
    (old / "wandb").mkdir(parents=True)
    assert wandb_logger.WandbRun(config, old, "offline").options["id"] == "older"
    quiet.setenv("WANDB_RUN_ID", "mine")
    quiet.setenv("WANDB_PROJECT", "theirs")
    options = wandb_logger.WandbRun(config, old, "offline").options
    assert "id" not in options and "project" not in options


# ---------------------------------------------------------------------- ranks that end


def test_a_killed_child_is_named_with_its_signal():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    peers = Peers()
    peers.meet([child])
    child.kill()
    line = peers.report()
    assert line.startswith("rank 1 was ended by SIGKILL") and "data.batch_size" in line
    assert "SIGSEGV" in killed(3, 11)


def test_a_process_that_is_gone_is_named():
    peers = Peers(patience=0.1)
    peers.meet()
    assert "or did not answer" in peers.report()
    host, pid, begun = peers.processes[0]
    peers.processes += [(host, 2**22 + 1, "7"), ("elsewhere", 1, "1")]
    assert "another rank ended: rank 1;" in peers.report()
    assert pid > 0 and begun and json.dumps(peers.processes)
