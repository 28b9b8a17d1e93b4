"""Faces in images: dlib's detector, landmarks and embedding, with weights from a package."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import Index
from vistok.models.networks.files import check_hash, given_or_packaged, misfit, sha256_of
from vistok.nn.network import Network, Region

#: Of the package's files, by what they hold: name and SHA-256.
_FILES = {
    "landmarks": (
        "models/shape_predictor_5_face_landmarks.dat",
        "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
    ),
    "embedding": (
        "models/dlib_face_recognition_resnet_model_v1.dat",
        "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    ),
}


@register("dlib_faces")
class DlibFaces(Network):
    """Faces by dlib: a HOG detector, five landmarks, and vectors of 128 numbers.

    Two vectors less than 0.6 apart are one person's, says dlib. It runs on the CPU.

    Args:
        landmarks: the package's file shape_predictor_5_face_landmarks.dat; None to find it in the
            installed package.
        embedding: likewise dlib_face_recognition_resnet_model_v1.dat.
        upsample: how many times images are doubled before faces are looked for; the detector sees
            faces of about 80 px or more.

    Raises:
        ArgumentError: if dlib or the weights are not at hand or damaged.
    """

    name = "dlib_faces"
    gives = ("faces",)
    least = 16

    def __init__(
        self,
        landmarks: str | Path | None = None,
        embedding: str | Path | None = None,
        upsample: Index = 1,
    ) -> None:
        super().__init__()
        check_values(DlibFaces, locals())
        if importlib.util.find_spec("dlib") is None:
            raise ArgumentError("network=dlib_faces: dlib is not installed; pip install dlib-bin")
        dlib: Any = importlib.import_module("dlib")
        self.upsample, self._dlib = upsample, dlib
        self._detect = dlib.get_frontal_face_detector()
        self._shape = self._load(dlib.shape_predictor, landmarks, "landmarks")
        self._embed = self._load(dlib.face_recognition_model_v1, embedding, "embedding")

    def _load(self, kind: Any, given: str | Path | None, what: str) -> Any:
        file, sha256 = _FILES[what]
        hint = (
            "the package with dlib's weights is not installed; "
            "pip install face-recognition-models (100 MB)"
        )
        path = given_or_packaged(given, "face_recognition_models", file, what, hint)
        check_hash(path, None if given is not None else sha256, what)
        self.hashes[what] = sha256_of(path)
        try:
            return kind(str(path))
        except RuntimeError as error:
            raise misfit(path, f"dlib's {what}", error, what) from error

    def options(self) -> dict[str, Any]:
        """Return how faces are looked for; the detector is part of dlib."""
        return {"upsample": self.upsample, "dlib": str(self._dlib.__version__)}

    def regions(self, images: Tensor) -> list[list[Region]]:
        """Return the faces in images `(B, C, H, W)` in [-1, 1], with their vectors.

        A place is five landmarks: x and y of each, in pixels.
        """
        found = []
        for image in images:
            pixels, own = _pixels(image), []
            boxes, scores, _ = self._detect.run(pixels, self.upsample, 0.0)
            for box, score in zip(boxes, scores, strict=True):
                points = self._shape(pixels, box).parts()
                place = (box.left(), box.top(), box.right(), box.bottom())
                place += tuple(x for point in points for x in (point.x, point.y))
                own.append(Region(place, self._vector(pixels, place), float(score)))
            found.append(own)
        return found

    def values(self, images: Tensor, regions: list[list[Region]]) -> list[list[Any]]:
        """Return vectors `(128,)` of images at the landmarks of regions."""
        return [
            [self._vector(_pixels(image), region.place) for region in own]
            for image, own in zip(images, regions, strict=True)
        ]

    def _vector(self, pixels: Any, place: tuple[int, ...]) -> Tensor:
        dlib = self._dlib
        points = [dlib.point(*place[i : i + 2]) for i in range(4, len(place), 2)]
        shape = dlib.full_object_detection(dlib.rectangle(*place[:4]), points)
        return torch.tensor(list(self._embed.compute_face_descriptor(pixels, shape)))


def _pixels(image: Tensor) -> Any:
    """Return an array `(H, W, 3)` uint8 of an image `(C, H, W)` in [-1, 1]."""
    rounded = ((image.expand(3, -1, -1) + 1) * 127.5).round().clamp(0, 255).byte()
    return rounded.permute(1, 2, 0).contiguous().cpu().numpy()
