"""Files of weights: where they are, what they hold, and their SHA-256.

Nothing is downloaded and no file runs code: .pth files are read with `weights_only=True`,
.safetensors and .h5 files hold numbers alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError


def find_weights(
    weights: str | Path | None, what: str, names: Sequence[str], instead: str = ""
) -> Path:
    """Return a file of weights: the one that was named, or a published one in torch hub's cache.

    Args:
        weights: the file, or None to look in the cache.
        what: is in it, such as "VGG16".
        names: of the published files.
        instead: end of the message if there is none.

    Raises:
        ArgumentError: if there is no such file; the message says where it looked.
    """
    if weights is not None:
        return _existing(weights)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in names:
        if (folder / name).is_file():
            _check_published(folder / name)
            return folder / name
    raise ArgumentError(
        f"weights=null: {what} is not at hand: no {' or '.join(names)} in {folder}; copy it there, "
        f"or set weights to a file{instead}"
    )


def in_package(package: str, file: str) -> Path | None:
    """Return a file inside an installed package, which is not imported; None if it is not there."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    return None


def check_hash(path: Path, sha256: str | None, argument: str = "weights") -> None:
    """Raise unless the SHA-256 of a file begins with the digits that are wanted.

    Raises:
        ArgumentError: naming the file and both.
    """
    if sha256 is None:
        return
    if not re.fullmatch(r"[0-9a-f]{8,64}", sha256):
        raise ArgumentError(f"sha256={sha256}: must be 8 to 64 hexadecimal digits, in lower case")
    found = sha256_of(path)
    if not found.startswith(sha256):
        raise ArgumentError(
            f"{argument}={path}: is damaged or another file: its SHA-256 is {found[:16]}..., "
            f"expected {sha256[:16]}"
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; computed once per process and file."""
    status = path.stat()
    return _sha256(str(path.resolve()), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _sha256(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names and values, for weights of which no file is known."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        values = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def read_tensors(path: Path, what: str, argument: str = "weights") -> dict[str, Tensor]:
    """Return the tensors of a .pth, .safetensors or .h5 file by name, on the CPU.

    Raises:
        ArgumentError: if the file is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".h5":
            return _read_h5(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise ValueError("it holds no table of tensors")
        return dict(found)
    except Exception as error:  # damaged files make the readers raise almost anything
        # torch.load's words for a damaged file help nobody.
        said = path.suffix in (".safetensors", ".h5") or isinstance(error, (ValueError, OSError))
        reason = error if said else "it cannot be read: damaged, or more than tensors"
        raise misfit(path, what, reason, argument) from error


def _read_h5(path: Path) -> dict[str, Tensor]:
    try:
        import h5py
    except ImportError as error:
        raise ValueError("reading it needs pip install h5py") from error
    tensors: dict[str, Tensor] = {}

    def take(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            tensors[name] = torch.from_numpy(item[()])

    with h5py.File(path, "r") as file:
        file.visititems(take)
    return tensors


def load_strictly(
    module: torch.nn.Module,
    tensors: dict[str, Tensor],
    path: Path,
    what: str,
    argument: str = "weights",
) -> None:
    """Load tensors that must be exactly those of a module.

    Counters of batch norms, which decide nothing, may be there or not.

    Raises:
        ArgumentError: naming the file and the first tensor that is missing, left over or of
            another shape.
    """
    own = module.state_dict()
    counters = {name for name in {*own, *tensors} if name.endswith(".num_batches_tracked")}
    for name in sorted({*own, *tensors} - counters):
        if name not in tensors:
            raise misfit(path, what, f"'{name}' is missing", argument)
        if name not in own:
            raise misfit(path, what, f"'{name}' has no place", argument)
        if own[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            raise misfit(path, what, f"'{name}' is {shapes}", argument)
        if not tensors[name].isfinite().all():
            raise misfit(path, what, f"'{name}' has values that are not finite", argument)
    module.load_state_dict(
        {k: tensors[k] if k in tensors and k not in counters else own[k] for k in own}
    )


def misfit(
    path: Path, what: str, reason: Exception | str, argument: str = "weights"
) -> ArgumentError:
    """Return the error of a file that does not hold the weights that it should."""
    text = " ".join(str(reason).split())[:150] or type(reason).__name__
    return ArgumentError(f"{argument}={path}: not weights of {what} ({text})")


def _existing(weights: str | Path, argument: str = "weights") -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ArgumentError(f"{argument}={weights}: no such file")
    return path


def given_or_packaged(
    file: str | Path | None, package: str, inside: str, argument: str, hint: str
) -> Path:
    """Return the file that was named, or one that comes with an installed package.

    Raises:
        ArgumentError: if there is none, with the hint.
    """
    if file is not None:
        return _existing(file, argument)
    if found := in_package(package, inside):
        return found
    raise ArgumentError(f"{argument}=null: {hint}, or name a file: {argument}=FILE")


def _check_published(path: Path) -> None:
    """Warn if a cached file is not the one that its name promises (NAME-HASH.pth)."""
    wanted = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    if wanted and not sha256_of(path).startswith(wanted[1]):
        warnings.warn(
            f"{path}: its SHA-256 begins with {sha256_of(path)[:8]}, not {wanted[1]} as published; "
            "numbers made with it compare with nobody's",
            stacklevel=2,
        )
