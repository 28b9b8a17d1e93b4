"""Seals: the last line of a checkpoint file, with the digest of all bytes before it.

`torch.save` writes checksums, but `torch.load` does not compare them; a digest in a file of its own
could be parted from its checkpoint by a crash.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from vistok.core.errors import CheckpointError

_SEAL = "\nvistok sha256={} step={:010d}\n"

_SEAL_BYTES = len(_SEAL.format("0" * 64, 0))


def seal(sha256: str, step: int) -> bytes:
    """Return the last line of a checkpoint file whose other bytes have this digest."""
    return _SEAL.format(sha256, step).encode()


def checkpoint_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint, in the order of the ranks.

    Raises:
        CheckpointError: if one of a sharded checkpoint is missing.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*-of-*.ckpt"))
    number = files[0].stem.rpartition("-")[2] if files else "1"
    wanted = int(number) if number.isascii() and number.isdigit() else 0
    if len(files) != wanted:
        raise CheckpointError(f"{path}: incomplete: {len(files)} of {wanted} files")
    return files


def read_seal(path: Path) -> tuple[str, int] | None:
    """Return digest and step of the seal of a checkpoint's first file; None without a seal."""
    with open(checkpoint_files(path)[0], "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _SEAL_BYTES))
        found = re.fullmatch(rb"\nvistok sha256=(.{64}) step=(\d{10})\n", file.read(), re.DOTALL)
    return (found[1].decode(errors="replace"), int(found[2])) if found else None


def check_seal(path: Path) -> None:
    """Compare the bytes of a checkpoint with its seals.

    Raises:
        CheckpointError: if they differ, a seal is missing, or a file cannot be read.
    """
    if path.is_dir():
        files = checkpoint_files(path)
        seals = [read_seal(file) for file in files]
        if None in seals or len({seal[1] for seal in seals if seal}) != 1:
            raise CheckpointError(f"{path}: damaged; its files are from different steps")
        for file in files:
            check_seal(file)
        return
    try:
        sealed = read_seal(path)
        if sealed is None:
            raise CheckpointError(
                f"{path}: has no seal, the last line of a checkpoint of vistok; its end was cut "
                "off or changed, or another program wrote it"
            )
        sha, left = hashlib.sha256(), path.stat().st_size - _SEAL_BYTES
        with open(path, "rb") as file:
            while left and (chunk := file.read(min(left, 1 << 22))):
                sha.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if sha.hexdigest() != sealed[0]:
        raise CheckpointError(
            f"{path}: damaged; its contents do not match the checksum in its last line"
        )


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a checkpoint: a file, or the folder of a sharded one."""
    return path.is_file() or (path.suffix == ".ckpt" and path.is_dir())


def seal_of(path: Path) -> tuple[str, int] | None:
    """Return what `read_seal` does, or None if the file cannot be read."""
    try:
        return read_seal(path)
    except (OSError, CheckpointError):
        return None
