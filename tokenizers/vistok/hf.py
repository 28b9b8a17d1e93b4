"""Exports in transformers: `import vistok.hf`, and `AutoModel` and `AutoImageProcessor` open them.

No code comes with an export, so `trust_remote_code` is never needed: this module has it all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
)

from vistok.checkpoints.hub import find_export
from vistok.checkpoints.load import load
from vistok.data.preprocess import preprocess
from vistok.models.tokenizer import Tokenizer

#: The `model_type` of an export's `config.json`.
MODEL_TYPE = "vistok"


class VistokConfig(PretrainedConfig):
    """The `config.json` of an export."""

    model_type = MODEL_TYPE


class VistokModel(PreTrainedModel):
    """A tokenizer as transformers knows models; `model.tokenizer` is the one of `vistok.load`."""

    config_class = VistokConfig  # pyright: ignore[reportAssignmentType]
    base_model_prefix = "tokenizer"
    main_input_name = "pixel_values"
    tokenizer: Tokenizer

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, place: Any, *args: Any, revision: str | None = None, **kwargs: Any
    ) -> VistokModel:
        """Open an export, here or on the Hub, with all its checks.

        Args:
            place: folder, or owner/name.
            *args: not used.
            revision: on the Hub.
            **kwargs: `dtype` and `device_map` as one name are looked at.
        """
        folder = find_export(place, None if revision in (None, "main") else revision)
        model = cls(VistokConfig.from_pretrained(folder))
        model.tokenizer = load(folder)
        if isinstance(device := kwargs.get("device_map"), (str, torch.device)):
            model.to(device if device != "auto" else "cpu")  # pyright: ignore[reportArgumentType]
        return model.eval()

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return ids `(B, N, Q)` int64 of images `(B, C, H, W)`, uint8 or float in [0, 1]."""
        return self.tokenizer.tokenize(pixel_values)

    def decode(self, ids: Tensor) -> Tensor:
        """Return images `(B, C, H, W)`, float in [0, 1], of ids `(B, N, Q)`."""
        return self.tokenizer.detokenize(ids)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `encode`."""
        return self.encode(pixel_values)


class VistokImageProcessor(BaseImageProcessor):
    """Cuts images as the export's `preprocess.json` says, bit for bit as its evaluation did."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' own form)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, place: Any, revision: str | None = None, **kwargs: Any
    ) -> VistokImageProcessor:
        """Open the `preprocess.json` of an export, here or on the Hub."""
        import json

        folder = find_export(place, None if revision in (None, "main") else revision)
        return cls(**json.loads(Path(folder, "preprocess.json").read_bytes()))

    def __call__(
        self, images: Any, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Return `pixel_values` `(B, C, H, W)` uint8 of paths or PIL images, one or a list."""
        size = tuple(self.image_size)  # pyright: ignore[reportAttributeAccessIssue]
        pixels = preprocess(images, size, self.channels, self.crop)  # pyright: ignore
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


AutoConfig.register(MODEL_TYPE, VistokConfig, exist_ok=True)
AutoModel.register(VistokConfig, VistokModel, exist_ok=True)
AutoImageProcessor.register(
    VistokConfig, slow_image_processor_class=VistokImageProcessor, exist_ok=True
)
