"""What `eval.py` was asked to measure: a run, an export, or the images of another program."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vistok.checkpoints.find import find_checkpoint, run_folder
from vistok.checkpoints.read import read_config
from vistok.checkpoints.seals import is_checkpoint
from vistok.core.configuration import apply_overrides, closed, compose, to_container
from vistok.core.errors import ConfigError, VistokError
from vistok.core.terminal import typed
from vistok.data.build import build_data
from vistok.data.checks import image_size as size_of
from vistok.data.sources import Source

#: Keys of the run's data that stay when `data=...` chooses another kind.
_KEPT = ("image_size", "channels", "val_crop", "num_workers", "seed")

_WHICH = ("run", "model", "images")


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        kind: "run", "model" or "images": the key that named it.
        path: as it was given.
        source: the checkpoint file or the export folder; the folder of images.
        own_data: whether it has images of its own.
    """

    kind: str
    path: Path
    source: Path
    own_data: bool = field(default=False)

    @property
    def out(self) -> Path:
        """The folder for its results."""
        return beside(self.path) if self.kind == "images" else results_folder(self.path)

    @property
    def page(self) -> Path:
        """The folder for `report.html`: a run's own, or that of the results."""
        return self.out.parent if self.out.name == "eval" else self.out


def results_folder(path: Path) -> Path:
    """Return the folder for results: in a run; next to an export, which stays as it is."""
    if (path / "model.safetensors").exists():
        return beside(path)
    return (run_folder(path) if is_checkpoint(path) else path) / "eval"


def beside(folder: Path) -> Path:
    """Return the folder for results that lies next to what was measured."""
    return folder.with_name(f"{folder.resolve().name}_eval")


def subject_of(config: dict[str, Any]) -> Subject:
    """Return what `run=`, `model=` or `images=` names; exactly one of them must be set.

    Raises:
        ConfigError: if it is none or several of them.
        CheckpointError: if there is no such run or export.
    """
    named = [key for key in _WHICH if config.get(key)]
    if len(named) != 1:
        program = typed("eval")
        what = "set one of run=, model= and images=, not several" if named else "run: which run?"
        raise ConfigError(f"{what}; for example: {program} run=runs/<run>")
    kind = named[0]
    path = Path(config[kind]).expanduser()
    if kind == "images":
        return Subject(kind, Path(os.path.abspath(path)), path)
    is_export = (path / "model.safetensors").exists()
    source = path if is_export else find_checkpoint(path)
    own = not is_export and "kind" in (read_config(source).get("data") or {})
    return Subject(kind, path, source, own)


def ask_for_data(subject: Subject, overrides: Sequence[str]) -> None:
    """Raise if nothing says which images to measure: no default is right.

    Raises:
        ConfigError: that says what to type.
    """
    names = {o.lstrip("+").partition("=")[0] for o in overrides}
    if subject.own_data or names & {"data", "data.val"}:
        return
    which = f"{subject.kind}={subject.path}"
    if subject.kind == "images":
        raise ConfigError(f"data.val: which originals? add data.val=FOLDER to {which}")
    raise ConfigError(
        f"data: which images? an export has none of its own; add data=folder data.val=FOLDER, "
        f"data=shards data.val=SHARDS or data=sample to {which}"
    )


def data_config(
    source: Path, overrides: Sequence[str], batch_size: int, conditions: Sequence[str] = ()
) -> dict[str, Any]:
    """The run's data config with the user's changes.

    Args:
        source: checkpoint or export.
        overrides: `data=...` and `data.*=...`.
        batch_size: of evaluation.
        conditions: what the decoder reads besides tokens. They stay fields when the kind of data
            changes, and are those of an export's data.
    """
    run_config = read_config(source)
    own = dict(run_config.get("data") or {})
    choice = [o.partition("=")[2] for o in overrides if o.startswith("data=")]
    seed = run_config.get("seed", 0)
    if choice or "kind" not in own:  # an export has no data of its own
        chosen = _group(choice[-1] if choice else "sample")
        read = [name for name in conditions if name in own.get("fields", conditions)]
        own = {**chosen, **{k: own[k] for k in _KEPT if k in own}, "fields": read, "seed": seed}
    values = _overridden(own, overrides)
    if values.get("val") and not values.get("train"):
        values["train"] = values["val"]  # evaluation alone needs no training images
    values["eval_batch_size"] = batch_size
    return values


def originals_of(overrides: Sequence[str]) -> tuple[Source, dict[str, Any]]:
    """Return the originals that `data.val` names for `images=`, and the data's other values.

    Raises:
        ConfigError: if `data` is of a kind that has no place.
        DataError: if there is nothing there.
    """
    choice = [o.partition("=")[2] for o in overrides if o.startswith("data=")]
    kind = choice[-1] if choice else "folder"
    if kind not in ("folder", "shards"):
        raise ConfigError(f"data={kind}: originals for images= are in a folder or in shards")
    values = _overridden({**_group(kind), "seed": 0}, overrides)
    values["train"] = values["val"]
    with named_by_val(values):
        return build_data(values).val_set.source, values


@contextmanager
def named_by_val(values: Mapping[str, Any]) -> Iterator[None]:
    """Name `data.val` in errors about training images, where those are the validation images."""
    try:
        yield
    except VistokError as error:
        if values.get("train") != values.get("val") or not str(error).startswith("data.train"):
            raise
        raise type(error)(str(error).replace("data.train", "data.val", 1)) from error


def cut_of(overrides: Sequence[str], values: dict[str, Any]) -> tuple[str, tuple[int, int]] | None:
    """Return crop and size for the originals of `images=`; None leaves them as they are.

    They are cut only if the words say so: the pictures that another program wrote have been.

    Raises:
        ConfigError: if only one of the two is given.
    """
    names = {o.lstrip("+").partition("=")[0] for o in overrides}
    asked = names & {"data.val_crop", "data.image_size"}
    if not asked:
        return None
    if len(asked) == 1:
        missing = ({"data.val_crop", "data.image_size"} - asked).pop()
        raise ConfigError(f"{missing}: must be set together with {asked.pop()} to cut originals")
    return values["val_crop"], size_of(values["image_size"])


def _group(name: str) -> dict[str, Any]:
    """Return the values of a config of the group `data`."""
    from omegaconf import OmegaConf

    composed = compose("train", [f"data={name}"])
    values = OmegaConf.to_container(composed, resolve=False)["data"]  # type: ignore[index]
    return dict(values)  # type: ignore[arg-type]


def _overridden(own: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return data values with `data.*=...` applied."""
    holder = closed({"data": own, "seed": own.get("seed", 0)})
    rest = [o for o in overrides if not o.startswith("data=")]
    values = to_container(apply_overrides(holder, rest))["data"]
    return {str(k): v for k, v in values.items()}


# ---------------------------------------------------------------------- machine


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: no usable GPU was found; use cpu or auto")
    if name not in ("cpu", "cuda", "gpu"):
        raise ConfigError(f"device={name}: must be auto, cpu or cuda")
    return torch.device("cuda" if name == "gpu" else name)


def choose_precision(name: Any, device: torch.device) -> torch.dtype | None:
    """Autocast type of the networks; None for float32, which `auto` is: metrics want it."""
    known = {"auto": None, "32": None, "bf16": torch.bfloat16, "16": torch.float16}
    if str(name) not in known:
        raise ConfigError(f"precision={name}: must be one of {', '.join(known)}")
    return known[str(name)]


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes that torchrun or srun started, if there are any.

    Yields:
        The device of this rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
