"""DreamSim on DINO's ViT-B/16: cosine of class tokens, tuned to human judgements."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.files import parse_json
from vistok.core.registry import register
from vistok.models.networks.files import misfit, read_tensors, sha256_of
from vistok.models.networks.timm_models import TimmNetwork

_WHAT = "DreamSim's adapter for DINO ViT-B/16"

#: Where the adapter's names begin that belong to the transformer.
_PREFIX = "base_model.model.extractor_list.0.model."


@register("dreamsim")
class DreamSim(TimmNetwork):
    """DreamSim, the published single model `dino_vitb16`: 1 - cosine of centered class tokens.

    Images are resized to 224 x 224 px. The release's default is an ensemble with two CLIPs, whose
    values are others; it is not here.

    Paper: Fu et al. 2023, https://arxiv.org/abs/2306.09344.

    Args:
        adapter: the release's folder dino_vitb16_single_lora, which holds adapter_config.json and
            adapter_model.safetensors or .bin.
        weights: a file of DINO's ViT-B/16, such as dino_vitbase16_pretrain.pth; None for timm's
            `vit_base_patch16_224.dino` in the hub's cache or the network.
        sha256: first digits that the file of weights must have; None for any.

    Raises:
        ArgumentError: if a file is not at hand or another network's.
    """

    def __init__(
        self, adapter: str | Path, weights: str | Path | None = None, sha256: str | None = None
    ) -> None:
        super().__init__("vit_base_patch16_224.dino", weights, 224, sha256=sha256)
        self.name, self.gives = "dreamsim_dino_vitb16", ("maps", "distances")
        folder = Path(adapter).expanduser()
        files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise ArgumentError(
                f"adapter={adapter}: must be a folder with adapter_config.json and "
                "adapter_model.safetensors or .bin"
            )
        self._merge(read_tensors(found, _WHAT, "adapter"), found, _scale(folder))
        self.hashes["adapter"] = sha256_of(found)

    @torch.no_grad()
    def _merge(self, tensors: dict[str, Tensor], path: Path, alpha: float) -> None:
        """Add the products of low rank to the matrices that they belong to."""
        left = set(tensors)
        for name in sorted(tensors):
            if not name.endswith(".lora_A.weight"):
                continue
            inner = name.removesuffix(".lora_A.weight")
            other, target = f"{inner}.lora_B.weight", inner.removeprefix(_PREFIX)
            try:
                weight = self.model.get_parameter(f"{target}.weight")
                a, b = tensors[name], tensors[other]
                product = (alpha / len(a)) * (b @ a)
                if product.shape != weight.shape or not product.isfinite().all():
                    raise ValueError(f"{tuple(product.shape)}, not {tuple(weight.shape)}")
                weight += product
            except (AttributeError, KeyError, RuntimeError, ValueError) as error:
                raise misfit(path, _WHAT, f"'{name}': {error}", "adapter") from error
            left -= {name, other}
        if left or not tensors:
            said = f"'{min(left)}' has no place" if left else "it is empty"
            raise misfit(path, _WHAT, said, "adapter")

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the class token after the last block, `(B, 768, 1, 1)`."""
        ((_, token),) = self.model.forward_intermediates(  # type: ignore[operator]
            self._resized(images),
            indices=1,
            norm=False,
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        return [token[:, 0, :, None, None]]

    def distances(self, maps: list[Tensor], others: list[Tensor]) -> Tensor:
        """Return 1 - cosine, `(B,)`, 0 to 2."""
        a, b = (x[0].flatten(1) - x[0].flatten(1).mean(1, keepdim=True) for x in (maps, others))
        return 1 - F.cosine_similarity(a, b, dim=1)


def _scale(folder: Path) -> float:
    path = folder / "adapter_config.json"
    try:
        return float(parse_json(path.read_text())["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise misfit(path, _WHAT, error, "adapter") from error
