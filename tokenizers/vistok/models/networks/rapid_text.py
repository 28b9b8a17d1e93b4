"""Text in images by the package rapidocr: PaddleOCR's detector and reader as ONNX graphs."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.models.networks.files import sha256_of
from vistok.nn.network import Network, Region

_PACKAGES = ("rapidocr", "onnxruntime")

#: Of the graphs in the package: what they do, and how their names go.
_GRAPHS = {"detector": "*_det_*.onnx", "reader": "*_rec_*.onnx"}


@register("rapidocr")
class RapidOCR(Network):
    """RapidOCR's detector and reader: lines of text in images, where they are and what they say.

    A line is the upright rectangle around what the detector finds; reader and rectangle are the
    same before and afterwards. It reads Chinese as well as Latin letters, and computes on the CPU.

    Raises:
        ArgumentError: if the package is not installed or holds no graphs; the message says how to
            get it.
    """

    name = "rapidocr"
    gives = ("text",)
    least = 16

    def __init__(self) -> None:
        super().__init__()
        if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
            raise ArgumentError(f"rapidocr: needs pip install {' '.join(_PACKAGES)} (200 MB)")
        package = importlib.import_module("rapidocr")
        folder = Path(str(package.__file__)).parent / "models"
        for what, pattern in _GRAPHS.items():
            found = sorted(folder.glob(pattern))
            if len(found) != 1:  # it would download others, or choose
                raise ArgumentError(
                    f"rapidocr: found {len(found)} files {pattern} in {folder}, expected 1; pip "
                    "install --force-reinstall 'rapidocr>=3.10'"
                )
            self.hashes[what] = sha256_of(found[0])
        self.version = version("rapidocr")
        threads = torch.get_num_threads()
        runtime = "EngineConfig.onnxruntime"
        self._engine = package.RapidOCR(
            params={
                "Global.log_level": "error",
                f"{runtime}.intra_op_num_threads": threads,
                f"{runtime}.inter_op_num_threads": 1,
            }
        )

    def options(self) -> dict[str, Any]:
        """Return the package's version, on which the detected lines depend."""
        return {"version": self.version}

    def regions(self, images: Tensor) -> list[list[Region]]:
        """Return the lines in images `(B, C, H, W)` in [-1, 1], with what they say."""
        height, width = images.shape[2:]
        found = []
        for pixels in self._pixels(images):
            result = self._engine(pixels, use_det=True, use_cls=False, use_rec=False)
            corners = getattr(result, "boxes", None)
            own = []
            for quad in [] if corners is None else torch.as_tensor(corners):
                left, top = (max(0, int(v)) for v in quad.amin(dim=0).floor())
                right, bottom = (int(v) for v in quad.amax(dim=0).ceil())
                place = (left, top, min(width, right), min(height, bottom))
                if place[2] - left >= 2 and place[3] - top >= 2:
                    own.append(Region(place, *self._read(pixels, place)))
            found.append(own)
        return found

    def values(self, images: Tensor, regions: list[list[Region]]) -> list[list[Any]]:
        """Return what images say at the places of regions."""
        return [
            [self._read(pixels, region.place)[0] for region in own]
            for pixels, own in zip(self._pixels(images), regions, strict=True)
        ]

    def _pixels(self, images: Tensor) -> list[Any]:
        """Return images `(B, C, H, W)` in [-1, 1] as BGR arrays `(H, W, 3)` uint8."""
        self.check(images.shape[1], (images.shape[2], images.shape[3]))
        bytes_ = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        bgr = bytes_.expand(-1, 3, -1, -1).flip(1).permute(0, 2, 3, 1).cpu().contiguous()
        return list(bgr.numpy())

    def _read(self, pixels: Any, place: tuple[int, ...]) -> tuple[str, float]:
        """Return the text in a rectangle, and the reader's confidence, 0 to 1."""
        left, top, right, bottom = place
        crop = pixels[top:bottom, left:right].copy()  # contiguous
        result = self._engine(crop, use_det=False, use_cls=False, use_rec=True)
        texts, scores = getattr(result, "txts", None), getattr(result, "scores", None)
        return (texts[0], float(scores[0])) if texts and scores else ("", 0.0)
