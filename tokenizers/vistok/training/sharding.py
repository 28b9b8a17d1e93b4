"""FSDP2: weights, gradients, moments and averages spread over the ranks, and saved in pieces.

Each block of the transformers is gathered when it is reached and let go behind it; what is left of
the tokenizer is one more part, gathered for a whole step. The quantizer is not sharded: its codes
are moved by statistics and restarts, row by row, and it is small. Its gradients, and those of
whatever else is whole, are averaged once per step (`average_gradients`).

Lightning's strategy leaves the sharding to us; torch's distributed checkpoints have no seals, are
not written whole or not at all, and their metadata is a pickle, which could run code.

Paper: Zhao et al. 2023, https://arxiv.org/abs/2304.11277; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from vistok.checkpoints.read import SHARD, read_parts
from vistok.checkpoints.write import (
    TEMPORARY,
    failure,
    publish,
    remove,
    size_of,
    step_of,
    sync_folder,
    write_sealed,
)
from vistok.core.errors import CheckpointError
from vistok.core.ranks import broadcast, max_of_all, rank, world_size
from vistok.training.checkpointing import CheckpointWriter
from vistok.training.lightning_internals import spread_over_all_ranks


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints of our own.

    States go in and out as they are, with `DTensor`s in them; `ShardWriter` writes the pieces.

    Args:
        timeout: that a rank waits for the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)

    def setup_environment(self) -> None:
        """Spread over all ranks."""
        spread_over_all_ranks(self)
        super().setup_environment()

    @property
    def mesh(self) -> DeviceMesh:
        """All ranks in a row."""
        return self.device_mesh["data_parallel"]

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are loaded as anywhere else."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Parameters as `DTensor`s, buffers as they are."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Inverse of `lightning_module_state_dict`."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Moments as `DTensor`s, like their parameters."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Inverse of `optimizer_state`."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict, filepath: Any, storage_options: Any = None) -> None:
        """Every rank writes its pieces."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict:
        """Every rank reads what is its own now, whoever wrote it."""
        return read_parts(Path(checkpoint_path), lambda pieces: own_rows(pieces, self.mesh))


def shard(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Spread the parameters of a module over the ranks of `mesh`; its values must agree there.

    Args:
        module: entered by its forward, and by the methods that its `entries` name; the parts that
            its `unsharded` names stay whole.
        mesh: of one dimension.
        dtype: that blocks are gathered in; None for their own. Gradients are reduced in float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks_of(module):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    whole: list[nn.Parameter] = []
    for name in getattr(module, "unsharded", ()):
        part = module.get_submodule(name).to(mesh.device_type)
        whole += part.parameters()
    fully_shard(module, mesh=mesh, ignored_params=set(whole))
    for tensor in (*whole, *module.buffers()):
        broadcast(tensor.data)  # as DDP does: what all hold, all hold alike
    for name in getattr(module, "entries", ()):  # what an evaluation calls
        register_fsdp_forward_method(module, name)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Return what is gathered one by one: the members of every `nn.ModuleList` named `blocks`."""
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "blocks":
            yield from part


def is_sharded(module: nn.Module) -> bool:
    """Return whether `shard` was called on it."""
    return isinstance(module, FSDPModule)


def release(module: nn.Module) -> None:
    """Let go of what an evaluation has gathered: the root stays gathered after a forward."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that every rank has all of."""
    return [p for p in module.parameters() if not isinstance(p, DTensor)]


class ShardWriter(CheckpointWriter):
    """Writes a folder per checkpoint, to which every rank adds a file with its pieces.

    Files go to a folder with a temporary name. When all ranks have synced theirs, which they
    tell each other after a step, in the main thread, the folder gets its name: what has a name is
    whole. Everything that is not sharded is in the first rank's file.
    """

    _target: Path | None = None  # what is not published yet, and its step
    _step = 0

    def check(self) -> None:
        """Raise what went wrong, once all ranks know of it."""
        if self._target is None:
            super().check()

    def settle(self) -> None:
        """Publish what all ranks have written."""
        if self._target is not None and not max_of_all(self.busy):
            self.join()

    def join(self) -> None:
        """Wait for all ranks, and publish; raises what went wrong on any."""
        self.teardown()
        target, self._target = self._target, None
        if target is None:
            return self.check()
        failed = max_of_all(self._error is not None)
        self.check()
        if failed:
            raise CheckpointError(f"{target}: another rank could not write its part")
        if rank() == 0:
            try:
                temporary = target.with_name(target.name + TEMPORARY)
                sync_folder(temporary)
                publish(temporary, target, self._step, self.keep_last)
            except OSError as error:
                self._error = failure(error, target)
        failed = max_of_all(self._error is not None)
        self.check()
        if failed:
            raise CheckpointError(f"{target}: the first rank could not give it its name")

    def _start(self, checkpoint: dict, target: Path) -> None:
        if rank() == 0:
            with suppress(OSError):  # what stands in the way of removing will be told by the write
                remove(target.with_name(target.name + TEMPORARY))  # of a run that had more ranks
        max_of_all(0)
        self._target, self._step = target, step_of(checkpoint)
        super()._start(pieces_of(checkpoint), target)

    def _write(self, checkpoint: dict, target: Path) -> None:
        folder = target.with_name(target.name + TEMPORARY)
        try:
            write_sealed(checkpoint, folder / f"{rank():05d}-of-{world_size():05d}.ckpt")
        except Exception as error:  # a thread's exception would only be printed
            self._error = failure(error, target, size_of(checkpoint))


def pieces_of(content: Any) -> Any:
    """Return this rank's part of a file: pieces of what is sharded; on rank 0 also the rest."""
    if isinstance(content, DTensor):
        rows = -(-content.shape[0] // world_size())
        return {SHARD: content.to_local(), "first": min(rank() * rows, content.shape[0])}
    if isinstance(content, dict):
        return {key: pieces_of(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)) and type(content) in (list, tuple):
        return type(content)(pieces_of(value) for value in content)
    return None if isinstance(content, Tensor) and rank() > 0 else content


def own_rows(pieces: list[tuple[int, Tensor]], mesh: DeviceMesh) -> DTensor:
    """The tensor that some ranks have written, as these ranks hold it.

    Args:
        pieces: (first row, rows), in order; only the rows of this rank are read.
        mesh: the ranks of now.
    """
    last, tensor = pieces[-1]
    total = last + len(tensor)
    share = -(-total // mesh.size())
    begin = min(mesh.get_local_rank() * share, total)
    end = min(begin + share, total)
    own = [
        piece[max(0, begin - first) : max(0, end - first)]
        for first, piece in pieces
        if first < end and first + len(piece) > begin
    ]
    rows = torch.cat(own) if own else tensor[:0].clone()
    return DTensor.from_local(
        rows.to(mesh.device_type),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size((total, *tensor.shape[1:])),
        stride=torch.empty((total, *tensor.shape[1:]), device="meta").stride(),
    )
