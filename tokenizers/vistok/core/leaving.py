"""How a process ends that is one of several ranks."""

from __future__ import annotations

import atexit
import os
import sys

_code: int | None = None


def ends_with(code: int) -> int:
    """Note the exit code that this process is about to end with, and return it."""
    global _code
    _code = code
    return code


# Registered before torch, wandb and others register theirs, so it is called after them.
@atexit.register
def _end_at_once() -> None:
    """End a rank without taking its interpreter apart.

    The threads of gloo free the tensors of a collective a moment after it has returned. One that
    does so while the interpreter is taken apart aborts the process ("terminate called without an
    active exception", exit code 134), and with it a job that had succeeded. Destroying the process
    group does not wait for them as long as anything, such as DDP, holds it.
    """
    distributed = sys.modules.get("torch.distributed")
    if _code is None or distributed is None or not distributed.is_available():
        return
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code)
