"""Private names of Lightning, torch and its DataLoader: there, as we know them, and nowhere else."""

import ast
import inspect
import re
import signal
import tomllib
from datetime import timedelta
from functools import cache
from importlib import import_module, metadata

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from packaging.requirements import Requirement
from torch.utils.data import DataLoader

from helpers import ROOT
from test_architecture import PACKAGE, modules
from vistok.core import torch_internals
from vistok.data import loader_internals
from vistok.models import timm_internals
from vistok.training import lightning_internals

# ---------------------------------------------------------------------- Lightning


class Tiny(L.LightningModule):
    """Four weights, and what was seen on the way."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.rows, self.handlers = [], []

    def training_step(self, batch, index):
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        self.log("seen", float(index))
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Rows(L.Callback):
    """Keeps what would be logged."""

    def on_train_batch_end(self, trainer, module, *args):
        module.rows.append(lightning_internals.row_to_log(trainer))


def fitted(tmp_path, steps=4, every=2, prepare=lambda trainer: None):
    module = Tiny()
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        log_every_n_steps=every, callbacks=[Rows()],
    )  # fmt: skip
    prepare(trainer)
    trainer.fit(module, DataLoader(torch.randn(6, 4), 2))
    return trainer, module


@pytest.mark.filterwarnings("ignore")
def test_signals_are_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer, module = fitted(tmp_path)
    assert before not in module.handlers, "Lightning leaves signals alone by itself"
    loop = trainer.fit_loop.epoch_loop
    assert loop._broadcast_sigterm_tensor.__func__ is type(loop)._broadcast_sigterm_tensor
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(loop).advance)
    trainer, module = fitted(tmp_path, prepare=lightning_internals.leave_signals_alone)
    assert set(module.handlers) == {before}
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None  # no process group


@pytest.mark.filterwarnings("ignore")
def test_the_row_of_a_step_is_known_before_it_is_logged(tmp_path):
    trainer, module = fitted(tmp_path, every=2)
    assert module.rows == [{}, {"seen": 1.0}, {}, {"seen": 0.0}]
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 4
    _, module = fitted(
        tmp_path, every=2, prepare=lambda t: lightning_internals.set_logged_step(t, 1)
    )
    assert module.rows == [{"seen": 0.0}, {}, {"seen": 2.0}, {}]


@pytest.mark.filterwarnings("ignore")
def test_batches_in_a_checkpoint_are_counted_from_a_whole_step(tmp_path):
    trainer, _ = fitted(tmp_path, steps=5)  # epochs of three batches
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert batches["current"]["ready"] == 2 and batches["total"]["ready"] == 5
    lightning_internals.begin_with_a_whole_step(checkpoint, 3)
    counts = {"ready", "started", "processed", "completed"}
    assert {k: batches["current"][k] for k in counts} == dict.fromkeys(counts, 0)
    assert {k: batches["total"][k] for k in counts} == dict.fromkeys(counts, 15)
    assert batches["is_last_batch"] is False
    fresh = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    fresh.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    assert fresh.fit_loop.epoch_loop.batch_progress.total.ready == 15


def test_a_strategy_spreads_over_all_ranks():
    strategy = ModelParallelStrategy(timeout=timedelta(seconds=1))
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == ("auto", "auto")
    strategy.num_nodes, strategy.parallel_devices = 3, [torch.device("cpu")] * 2
    lightning_internals.spread_over_all_ranks(strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (6, 1)
    used = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "self._data_parallel_size" in used and "self._tensor_parallel_size" in used


def test_the_ranks_that_lightning_starts_are_watched_by_ours(monkeypatch):
    name = "_launch_process_observer"
    launch = inspect.getsource(subprocess_script._SubprocessScriptLauncher.launch)
    assert f"{name}(self.procs)" in launch
    monkeypatch.setattr(subprocess_script, name, getattr(subprocess_script, name))
    seen = []
    lightning_internals.watch_children_by(seen.append)
    getattr(subprocess_script, name)(["process"])
    assert seen == [["process"]]


# ---------------------------------------------------------------------- torch


def test_units_for_bf16_are_known(monkeypatch):
    probes = ["_is_avx512_bf16_supported", "_is_amx_tile_supported"]
    found = [getattr(torch.cpu, probe)() for probe in probes]
    assert torch_internals.cpu_has_bf16_units() is any(found)
    for probe in probes:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, probe, lambda: True)
            assert torch_internals.cpu_has_bf16_units()


def test_the_gradient_of_a_softmax():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(5, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits.softmax(-1) * outer).sum(), logits)
    given = outer.clone()
    found = torch_internals.softmax_backward_(given, logits.detach().softmax(-1))
    torch.testing.assert_close(found, expected)
    assert found.data_ptr() == given.data_ptr()


def test_an_image_is_resized_into_its_place():
    pixels = torch.randint(256, (1, 3, 20, 13), dtype=torch.uint8)
    expected = F.interpolate(pixels, (9, 13), mode="bicubic", antialias=True)
    batch = torch.zeros(2, 3, 9, 13, dtype=torch.uint8)
    torch_internals.resize_bicubic_into(pixels, batch[1:])
    assert torch.equal(batch[1:], expected) and not batch[0].any()


def test_a_tensor_that_changes_has_another_version():
    tensor = torch.zeros(3)
    first = torch_internals.version_of(tensor)
    assert torch_internals.version_of(tensor) == first
    tensor[1] = 1
    assert torch_internals.version_of(tensor) > first


def test_shared_bytes_are_shared():
    shared = torch_internals.shared_bytes(10)
    assert shared.shape == (10,) and shared.dtype == torch.uint8 and shared.is_shared()
    assert not shared.any()


def test_moving_a_module_goes_through_apply():
    """What is not a parameter or a buffer moves by this method, which some of ours extend."""

    class Moved(torch.nn.Module):
        calls = 0

        def _apply(self, fn, recurse=True):
            self.calls += 1
            return super()._apply(fn, recurse)

    inner, outer = Moved(), torch.nn.ModuleList()
    outer.append(inner)
    outer.to(torch.float64), outer.cpu(), outer.bfloat16()
    assert inner.calls == 3
    assert list(inspect.signature(torch.nn.Module._apply).parameters) == ["self", "fn", "recurse"]


# ---------------------------------------------------------------------- the DataLoader


def test_the_loader_has_what_we_use():
    loader = DataLoader(range(8), 2, num_workers=2, persistent_workers=True)
    assert not loader_internals.has_workers(loader)
    batches = iter(loader)
    assert loader_internals.has_workers(loader)
    assert batches._num_workers == 2 and next(batches._worker_queue_idx_cycle) in (0, 1)
    # By the number of a batch: its worker, and what has arrived already.
    assert {len(task) for task in batches._task_info.values()} <= {1, 2}
    loader_internals.share_by_need(batches)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    workers = batches._workers
    assert all(worker.is_alive() for worker in workers)
    loader_internals.stop_workers(loader, batches)
    assert not any(worker.is_alive() for worker in workers)
    assert not loader_internals.has_workers(loader)
    assert len(list(loader)) == 4


def test_the_least_busy_worker_is_chosen():
    class Batches:
        _num_workers = 3
        _task_info = {4: (0,), 5: (2,), 6: (1, "data"), 7: (0,)}  # noqa: RUF012

    choose = loader_internals._least_busy(Batches)
    assert next(choose) == 1
    Batches._task_info[8] = (1,)
    Batches._task_info[9] = (1,)
    assert next(choose) == 2


# ---------------------------------------------------------------------- timm


def test_transformers_of_timm_say_their_tokens():
    import timm

    tiny = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **tiny).eval()
    assert timm_internals.has_tokens(model)
    patches = model.patch_embed(torch.rand(2, 3, 32, 32))
    found = timm_internals.with_positions(model, patches)
    first = model.cls_token.expand(2, -1, -1)
    assert torch.equal(found, torch.cat([first, patches], dim=1) + model.pos_embed)
    assert not timm_internals.has_tokens(torch.nn.Linear(1, 1))


def test_a_module_takes_other_children():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    other = torch_internals.with_children(model, {"1": torch.nn.Linear(3, 5)})
    assert other[0] is model[0] and other(torch.rand(1, 2)).shape == (1, 5)
    assert model(torch.rand(1, 2)).shape == (1, 4) and len(model) == 2


# ---------------------------------------------------------------------- nowhere else

FILES = (
    "core/torch_internals.py",
    "data/loader_internals.py",
    "models/timm_internals.py",
    "training/lightning_internals.py",
)

#: Documented by those who made them, in spite of the underscore.
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields"}

#: Of torch, extended or called where it must be: see `test_moving_a_module_goes_through_apply`.
EXTENDED = {"_apply"}

LIBRARIES = ("torch", "lightning")


def is_private(name):
    return name.startswith("_") and not name.endswith("_") and name not in DOCUMENTED | EXTENDED


def names_in(tree):
    """Every name that a module defines: functions, classes, variables, attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def test_no_private_name_of_another_library():
    trees = {path: ast.parse(path.read_text()) for path, _ in modules()}
    own = {name for tree in trees.values() for name in names_in(tree)}
    wrong, seen = [], 0
    for path, tree in trees.items():
        allowed = path.relative_to(PACKAGE).as_posix() in FILES
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                strange = is_private(node.attr) and node.attr not in own
            elif isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".") + [alias.name for alias in node.names]
                strange = parts[0] not in ("vistok", "__future__") and any(map(is_private, parts))
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "")[-4:] == "attr":
                word = getattr(node.args[1], "value", "")  # getattr, hasattr, setattr
                strange = isinstance(word, str) and is_private(word) and word not in own
            else:
                continue
            seen += strange
            if strange and not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
    assert seen > 10  # else the walk sees nothing


@cache
def private_names(kind):
    """`self._name` in the source of a class; what is written in C++ shows its attributes."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return {name for name in vars(kind) if re.match("_[a-z]", name)}
    return set(re.findall(r"\bself\.(_[a-z]\w*)", source))


def test_no_private_name_of_a_base_class():
    """`self._name` is ours, and does not happen to be one of the library's, too."""
    seen = set()
    for path, parts in modules():
        if parts[-1] == "__main__.py":
            continue
        name = ".".join(("vistok", *parts[:-1], path.stem))
        for kind in vars(import_module(name)).values():
            if not inspect.isclass(kind) or kind.__module__ != name:
                continue
            bases = [b for b in kind.__mro__ if b.__module__.partition(".")[0] in LIBRARIES]
            theirs = set().union(*map(private_names, bases)) - EXTENDED
            assert not private_names(kind) & theirs, kind
            seen |= {base.__name__ for base in bases if theirs}
    assert {"Module", "DataLoader", "LightningModule", "ModelParallelStrategy"} <= seen


def test_versions_are_bounded_by_those_that_were_tried():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    for name in ("torch", "lightning"):
        (bounds,) = [r.specifier for r in requirements if r.name == name]
        assert any(bound.operator == "<" for bound in bounds)
        assert pinned[name] in bounds and metadata.version(name).split("+")[0] in bounds
        major, minor = pinned[name].split(".")[:2]
        assert f"{major}.{int(minor) + 1}" not in bounds
