"""Write encode and decode as graphs that run without vistok: ONNX and `torch.export`."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vistok.core.errors import ConfigError, VistokError
from vistok.models.tokenizer import Tokenizer

#: What a graph is written as, and how its file ends.
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


class Encode(nn.Module):
    """Images to ids, as `tokenize` computes them.

    Args:
        tokenizer: of the graph.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        """Turn images `(B, C, H, W)`, float32 in [0, 1], into ids `(B, N, Q)`, int64."""
        tok = self.tokenizer
        latents = tok.encode(tok.to_signal(images * 2 - 1))[:, : tok.encoder.num_tokens]
        return tok.quantizer.encode(latents, tok.encoder.grid)


class Decode(nn.Module):
    """Ids to images, as `detokenize` computes them.

    Args:
        tokenizer: of the graph.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, ids: Tensor) -> Tensor:
        """Turn ids `(B, N, Q)`, int64, into images `(B, C, H, W)`, float32 in [0, 1]."""
        tok = self.tokenizer
        quantized = tok.quantizer.decode(ids, tok.encoder.grid)
        return ((tok.to_images(tok.decode(quantized)) + 1) / 2).clamp(0, 1)


def check_graphs(kinds: Sequence[str]) -> None:
    """Check the names of what graphs are to be written as, and that it can be written.

    Raises:
        ConfigError: for another name, or a package that is missing.
    """
    for kind in kinds:
        if kind not in SUFFIXES:
            raise ConfigError(f"graphs={kind}: choose from {', '.join(SUFFIXES)}")
    for package in ("onnx", "onnxscript") if "onnx" in kinds else ():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"graphs=onnx: needs the package {package}; pip install onnx onnxscript"
            )


def write_graphs(tokenizer: Tokenizer, folder: Path, kinds: Sequence[str]) -> list[str]:
    """Write `encode.*` and `decode.*`, which take batches of any number of images.

    Each is run once in the new form, and compared with the tokenizer, before it counts.

    Args:
        tokenizer: on the CPU, in float32.
        folder: to write to.
        kinds: of "onnx" and "torch".

    Returns:
        Names of the files.

    Raises:
        ConfigError: from `check_graphs`, or for a decoder that draws noise.
        VistokError: for an architecture that cannot be written.
    """
    check_graphs(kinds)
    if not kinds:
        return []
    if tokenizer.decoder.sampling:
        raise ConfigError(
            f"graphs={','.join(kinds)}: {type(tokenizer.decoder).__name__} draws noise in steps of "
            "a loop, which a graph does not hold; leave graphs out"
        )
    tokenizer = tokenizer.eval()
    images = torch.rand(3, tokenizer.channels, *tokenizer.image_size)
    with torch.no_grad():
        ids = tokenizer.tokenize(images)
    written = []
    for name, module, argument in (
        ("encode", Encode(tokenizer), images),
        ("decode", Decode(tokenizer), ids),
    ):
        with _quiet(), torch.no_grad():
            graph = _traced(module.eval(), argument, name)
            for kind in kinds:
                path = folder / f"{name}{SUFFIXES[kind]}"
                if kind == "onnx":
                    _write_onnx(graph, path)
                else:
                    # Without the regions in which autocast is off, which cannot be written.
                    torch.export.save(graph.run_decompositions({}), path)
                written.append(path.name)
    return written


def _traced(module: nn.Module, argument: Tensor, name: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=2**20)
    try:
        graph = torch.export.export(module, (argument,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # the tracer raises almost anything
        said = " ".join(str(error).split())[:200]
        raise VistokError(f"graphs: {name} cannot be traced ({said})") from error
    more = torch.cat([argument, argument[:1]])
    if not torch.allclose(graph.module()(more).float(), module(more).float(), atol=1e-4):
        raise VistokError(f"graphs: {name} computes something else as a graph")
    return graph


def _write_onnx(graph: torch.export.ExportedProgram, path: Path) -> None:
    program = torch.onnx.export(graph, (), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters say to their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
