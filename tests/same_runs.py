"""Two runs compared bit for bit, and runs that something breaks."""

import lightning as L
import torch

from helpers import metrics_of
from vistok.checkpoints.read import read_checkpoint


def state_of(run, name="last"):
    return read_checkpoint(run / "checkpoints" / f"{name}.ckpt")


def assert_same(a, b, path=""):
    """Equal containers, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{number}")
    else:
        assert a == b, path


def assert_same_training(run, other):
    """Equal weights, averaged weights, optimizer, codebook statistics, random state, position."""
    first, second = state_of(run), state_of(other)
    assert first["ema"]["num_updates"] > 0
    assert any("tokenizer.quantizer." in key for key in first["state_dict"])
    for part in ("state_dict", "ema", "optimizer_states", "random_state", "global_step"):
        assert_same(first[part], second[part], part)
    (position,) = [v for k, v in first.items() if "DataModule" in k]
    (other_position,) = [v for k, v in second.items() if "DataModule" in k]
    assert_same(position, other_position)


def metric_rows(run):
    rows = metrics_of(run)
    for row in rows:
        row.pop("data/wait_share", None)  # a time
    return [tuple(sorted(row.items())) for row in rows]


def training_rows(run):
    return [row for row in metric_rows(run) if dict(row)["loss/total"]]


class Stop(Exception):
    """Something that goes wrong."""


class Breaks(L.Callback):
    """Raises in the middle of a run."""

    def __init__(self, step, what, hook):
        self.step, self.what, self.hook = step, what, hook

    def _break(self, trainer, where):
        if trainer.global_step == self.step and where == self.hook:
            self.what()

    def on_train_batch_start(self, trainer, *args):
        self._break(trainer, "start")

    def on_before_zero_grad(self, trainer, *args):
        self._break(trainer, "zero_grad")  # after the forward and the backward pass

    def on_train_batch_end(self, trainer, *args):
        self._break(trainer, "end")

    def on_validation_batch_start(self, trainer, *args):
        self._break(trainer, "validation")


def break_runs(monkeypatch, *args):
    import vistok.training.run as run

    real = run.build_trainer

    def build(*arguments):
        trainer = real(*arguments)
        trainer.callbacks.insert(0, Breaks(*args))
        return trainer

    monkeypatch.setattr(run, "build_trainer", build)
