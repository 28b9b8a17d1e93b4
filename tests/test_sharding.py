"""FSDP2 and sharded checkpoints: two ranks against one process, and folders in place of files."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import vistok
from helpers import SIZES, TINY, losses_of, tiny_tokenizer
from ranks import TWO, assert_ended, fork
from same_runs import assert_same_training, state_of
from test_distributed_training import floats, plan
from test_sudden_death import content_of, flip
from vistok.checkpoints import write as checkpoints
from vistok.checkpoints.read import SHARD, read_checkpoint
from vistok.checkpoints.resume import newest_whole
from vistok.checkpoints.seals import check_seal, read_seal
from vistok.cli import evaluate, export, train
from vistok.core.errors import CheckpointError
from vistok.training import sharding
from vistok.training.optimizers import clip_by_norm
from vistok.training.sharding import ShardWriter, pieces_of

# ---------------------------------------------------------------------- what is gathered singly


@pytest.mark.parametrize("name", SIZES)
def test_every_block_with_attention_is_gathered_by_itself(name):
    """None is left in the part that is gathered for the whole step."""
    tokenizer = tiny_tokenizer(tokenizer=name)
    gathered = set(sharding.blocks_of(tokenizer))
    attentions = [
        (name, module)
        for name, module in tokenizer.named_modules()
        if "Attention" in type(module).__name__ and "cnn" not in name  # those are gathered whole
    ]
    for name, attention in attentions:
        assert [block for block in gathered if attention in block.modules()], name
    assert not any(a is not b and a in b.modules() for a in gathered for b in gathered)


def test_a_system_names_what_is_gathered_by_itself():
    """Blocks of any class, in a list of that name; nothing needs to know the class."""
    net = nn.Module()
    net.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    net.inner = nn.Module()
    net.inner.blocks = nn.ModuleList([nn.Conv2d(1, 1, 1)])
    net.others, net.more_blocks = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])
    assert list(sharding.blocks_of(net)) == [*net.blocks, *net.inner.blocks]


# ---------------------------------------------------------------------- folders


class Piece:
    """What `DTensor` is to `pieces_of`."""

    def __init__(self, whole, rank, ranks):
        rows = -(-len(whole) // ranks)
        self.shape, self.local = whole.shape, whole[rank * rows : (rank + 1) * rows]

    def to_local(self):
        return self.local


def content(step, weight, rank, ranks):
    return {
        "state_dict": {"weight": Piece(weight, rank, ranks), "codes": torch.arange(4.0)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
        "pair": (1, [2.5, "x"]),
        "global_step": step,
    }


def written(
    run, step, weight, ranks, monkeypatch, name="last.ckpt", keep=3, also=lambda rank: None
):
    """A checkpoint of several ranks, one after the other; the first one's join publishes it."""
    monkeypatch.setattr(sharding, "DTensor", Piece)
    monkeypatch.setattr(sharding, "world_size", lambda: ranks)
    writers = []
    for rank in range(ranks):
        monkeypatch.setattr(sharding, "rank", lambda rank=rank: rank)
        writer = ShardWriter(keep_last=keep)
        writer._start(content(step, weight, rank, ranks), run / "checkpoints" / name)
        writer.teardown()
        also(rank)
        writers.append(writer)
    monkeypatch.setattr(sharding, "rank", lambda: 0)
    writers[0].join()
    return run / "checkpoints" / name


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_pieces_come_together(tmp_path, monkeypatch, ranks):
    weight = torch.randn(7, 2)  # uneven, and with more ranks than rows some have none
    path = written(tmp_path, 3, weight, ranks, monkeypatch)
    assert len(list(path.iterdir())) == ranks and read_seal(path)[1] == 3
    back = read_checkpoint(path)
    assert torch.equal(back["state_dict"]["weight"], weight)
    assert torch.equal(back["state_dict"]["codes"], torch.arange(4.0))
    assert back["pair"] == (1, [2.5, "x"]) and back["global_step"] == 3
    assert "optimizer_states" not in read_checkpoint(path, without=["optimizer_states"])


def test_what_is_whole_is_written_once(monkeypatch):
    monkeypatch.setattr(sharding, "DTensor", Piece)
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(sharding, "rank", lambda: 1)
    kept = pieces_of(content(1, torch.arange(5), 1, 2))
    assert kept["state_dict"]["codes"] is None and kept["pair"] == (1, [2.5, "x"])
    assert kept["state_dict"]["weight"]["first"] == 3
    assert kept["state_dict"]["weight"][SHARD].tolist() == [3, 4]


def test_the_last_folders_are_kept_and_damage_is_passed_over(tmp_path, monkeypatch, capsys):
    for step in (2, 4, 6):
        written(tmp_path, step, torch.full((5,), float(step)), 2, monkeypatch)
    written(tmp_path, 6, torch.zeros(5), 2, monkeypatch, "best.ckpt")
    written(tmp_path, 7, torch.ones(5), 2, monkeypatch, "best.ckpt")  # in the place of another
    folder = tmp_path / "checkpoints"
    names = ["best.ckpt", "last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert read_checkpoint(folder / "best.ckpt")["state_dict"]["weight"].tolist() == [1] * 5
    shutil.rmtree(folder / "best.ckpt")
    flip(folder / "last.ckpt" / "00001-of-00002.ckpt", 300)
    assert newest_whole(tmp_path).name == "step_00000004.ckpt"
    said = capsys.readouterr().out
    assert "00001-of-00002.ckpt: damaged" in said and "older" in said
    (folder / "step_00000004.ckpt" / "00000-of-00002.ckpt").unlink()
    assert newest_whole(tmp_path).name == "step_00000002.ckpt"
    assert "incomplete: 1 of 2 files" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="from different steps"):
        other = written(tmp_path / "x", 9, torch.zeros(5), 2, monkeypatch)
        shutil.copy(other / "00001-of-00002.ckpt", folder / "step_00000002.ckpt")
        check_seal(folder / "step_00000002.ckpt")


@pytest.mark.parametrize("point", ["one rank", 1, 2, 3, "folder"])
def test_a_death_while_a_folder_is_written_leaves_a_whole_one(tmp_path, monkeypatch, point):
    for step in (2, 4):
        written(tmp_path, step, torch.full((5,), float(step)), 2, monkeypatch, keep=2)
    child = os.fork()
    if child == 0:
        calls, replace = [], os.replace

        def die(*arguments):  # before the last is set aside, an old one removed, the new one named
            calls.append(arguments)
            return os._exit(9) if len(calls) == point else replace(*arguments)

        os.replace = die
        if point == "folder":  # the new one has its name
            checkpoints.sync_folder = lambda folder: os._exit(9)
        also = (lambda rank: os._exit(9)) if point == "one rank" else (lambda rank: None)
        written(tmp_path, 6, torch.full((5,), 6.0), 2, monkeypatch, keep=2, also=also)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    step = read_checkpoint(newest_whole(tmp_path))["global_step"]
    assert step == (6 if point == "folder" else 4)
    written(tmp_path, 8, torch.zeros(5), 2, monkeypatch, keep=2)  # and it goes on
    assert read_checkpoint(newest_whole(tmp_path))["global_step"] == 8


def test_a_write_that_fails_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the folder's place")
    writer = ShardWriter()
    writer.save_checkpoint(content_of(1), tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: could not be written"):
        writer.join()
    writer.join()


def test_settling_waits_for_the_write(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardWriter, "busy", True)
    writer, path = ShardWriter(), tmp_path / "checkpoints" / "last.ckpt"
    writer.save_checkpoint(content_of(1), path)
    writer.settle()
    assert not path.exists()
    monkeypatch.setattr(ShardWriter, "busy", False)
    writer.settle()
    assert read_checkpoint(path)["global_step"] == 1


def test_the_norm_is_bounded_as_torch_does():
    torch.manual_seed(0)
    ours = [
        nn.Parameter(torch.randn(4, 3)),
        nn.Parameter(torch.randn(5)),
        nn.Parameter(torch.ones(2)),
    ]
    for p in ours[:2]:
        p.grad = torch.randn_like(p)
    theirs = [p.grad.clone() for p in ours[:2]]
    norm = torch.stack([g.double().square().sum() for g in theirs]).sum().sqrt()
    assert clip_by_norm(ours, 100.0) == pytest.approx(float(norm))
    assert torch.equal(ours[0].grad, theirs[0])
    assert clip_by_norm(ours, 0.5) == pytest.approx(float(norm))
    torch.testing.assert_close(ours[1].grad, theirs[1] * 0.5 / float(norm))


# ---------------------------------------------------------------------- whole runs

SHARDED = ["trainer.strategy=fsdp2"]


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """Words, and a folder with runs of them: one process, two ranks, two ranks that were stopped."""
    folder = tmp_path_factory.mktemp("sharded")
    words = [
        *TINY,
        "data=folder",
        f"data.train={photos}",
        "data.image_size=16",
        "data.val_fraction=0.3",
        "data.eval_batch_size=2",
        "tokenizer.encoder.depth=2",
        "tokenizer.encoder.activation_checkpointing=true",
        "quantizer.dead_code_threshold=0.3",
        "quantizer.ema_decay=0.5",
        "trainer.gradient_clip_val=0.05",  # below most norms
        "optimizer.weight_decay=0.1",
        "trainer.max_steps=6",
        "trainer.val_check_interval=3",
        "callbacks.checkpoint_every=2",
        "callbacks.codebook_window=2",
    ]
    before = Path.cwd()
    os.chdir(folder)
    try:
        whole = fork([*words, *TWO, *SHARDED, "hydra.run.dir=two"])
        assert train([*words, "hydra.run.dir=one"]) == 0
        stop = plan(folder, 1, "os.kill(os.getpid(), signal.SIGTERM)")
        assert_ended(whole, 0)
        cut = fork([*words, *TWO, *SHARDED, stop, "hydra.run.dir=cut"])
        assert_ended(cut, 75)
    finally:
        os.chdir(before)
    return words, folder


@pytest.mark.slow
@pytest.mark.ranks
def test_two_sharded_ranks_train_as_one_process(runs, tmp_path):
    words, folder = runs
    for column in ("loss/total", "loss/commitment", "loss/reconstruction", "lr", "samples_seen"):
        first, second = floats(folder / "two", column), floats(folder / "one", column)
        assert first.keys() == second.keys() and len(first) >= 6
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4), column
    for column in ("val/psnr", "val/ssim", "val/perplexity", "train/perplexity"):
        assert floats(folder / "two", column) == pytest.approx(
            floats(folder / "one", column), rel=3e-4
        )
    two, one = state_of(folder / "two"), state_of(folder / "one")
    for part in ("state_dict", "ema"):
        states = [s["ema"]["weights"] if part == "ema" else s["state_dict"] for s in (two, one)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            # Six steps of Adam move a weight by 6e-3, also where its gradient is nearly 0.
            torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=3e-4, msg=key)
    # What is saved in pieces is used as any run is.
    path = folder / "two" / "checkpoints" / "last.ckpt"
    assert path.is_dir() and len(list(path.iterdir())) == 2
    images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    ids = [vistok.load(folder / name).tokenize(images) for name in ("two", "one")]
    assert (ids[0] == ids[1]).float().mean() > 0.9  # all, but for near ties
    assert export([f"run={folder / 'two'}", f"out={tmp_path / 'out'}"]) == 0
    assert torch.equal(vistok.load(tmp_path / "out").tokenize(images), ids[0])
    assert evaluate([f"run={folder / 'two'}", f"out={tmp_path / 'eval'}"]) == 0


@pytest.mark.slow
@pytest.mark.ranks
def test_rotary_blocks_train_as_one_process(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if w not in SIZES["titok_tiny"]]
    words += ["tokenizer=restok_tiny", *SIZES["restok_tiny"], "data=folder", f"data.train={photos}"]
    words += ["data.val_fraction=0.3", "data.eval_batch_size=2", "trainer.max_steps=4"]
    two = fork([*words, *TWO, *SHARDED, "hydra.run.dir=two"])
    assert train([*words, "hydra.run.dir=one"]) == 0
    assert_ended(two, 0)
    first, second = (list(floats(tmp_path / run, "loss/total").values()) for run in ("two", "one"))
    assert len(first) == 4 and first == pytest.approx(second, rel=1e-4)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_sharded_run_goes_on_exactly(runs, tmp_path):
    words, folder = runs
    run = shutil.copytree(folder / "cut", tmp_path / "run")
    assert state_of(run)["global_step"] == 4
    out = assert_ended(fork([*words, *TWO, *SHARDED, f"hydra.run.dir={run}", "resume=auto"]), 0)
    assert "last.ckpt" in out
    assert losses_of(run) == losses_of(folder / "two")
    assert_same_training(run, folder / "two")


@pytest.mark.slow
@pytest.mark.ranks
def test_a_damaged_piece_costs_steps_and_nothing_else(runs, tmp_path):
    words, folder = runs
    run = shutil.copytree(folder / "cut", tmp_path / "run")
    flip(run / "checkpoints" / "last.ckpt" / "00001-of-00002.ckpt", 4000)
    out = assert_ended(fork([*words, *TWO, *SHARDED, f"hydra.run.dir={run}", "resume=auto"]), 0)
    assert "00001-of-00002.ckpt: damaged" in out and "older" in out
    assert losses_of(run) == losses_of(folder / "two")
    assert_same_training(run, folder / "two")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_sharded_run_goes_on_with_other_ranks(runs, tmp_path, ranks):
    words, folder = runs
    run = shutil.copytree(folder / "cut", tmp_path / "run")
    if ranks == 3:  # a step of 6 images instead of 4: that it goes on is all there is to see
        job = [*words, "trainer.devices=3", "data.batch_size=2"]
    else:
        job = [*words, "trainer.devices=1"]
    assert_ended(fork([*job, *SHARDED, f"hydra.run.dir={run}", "resume=auto"], ranks), 0)
    path = run / "checkpoints" / "last.ckpt"
    assert len(list(path.iterdir())) == ranks and state_of(run)["global_step"] == 6
    if ranks == 1:
        found, expected = floats(run, "loss/total"), floats(folder / "one", "loss/total")
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_what_does_not_go_with_sharding(fails, finished_run):
    fails("train", *TINY, *SHARDED, "trainer.precision=16", words="precision=16")
    fails("train", *TINY, *SHARDED, "compile=true", words=("compile=true", "fsdp2"))
    fails("train", f"resume={finished_run}", *SHARDED, "trainer.max_steps=9", words="init_from")
