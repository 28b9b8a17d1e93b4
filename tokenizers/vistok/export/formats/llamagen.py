"""LlamaGen's folders: a file of codes and one of the class for each image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import ConfigError, DataError
from vistok.core.files import replacing
from vistok.data.tokens import TokenFolder, TokenSample
from vistok.export.formats.base import Alphabet, Layout, needed, shards_of


class LlamaGen(Layout):
    """`imagenet{S}_codes/{i}.npy` `(1, A, n)` int64 and `imagenet{S}_labels/{i}.npy` `(1,)` int64.

    A is the number of views. LlamaGen's trainer asks for a class of every image, and for codes of
    one length.
    """

    name = "llamagen"

    @staticmethod
    def _folders(folder: Path, manifest: dict[str, Any]) -> tuple[Path, Path]:
        side = manifest["image_size"][0]
        return folder / f"imagenet{side}_codes", folder / f"imagenet{side}_labels"

    def write(self, folder: Path, tokens: TokenFolder) -> None:
        """Write the files of all images, numbered in their order.

        Raises:
            ConfigError: if an image has no class, or lengths differ.
        """
        manifest = tokens.manifest
        if manifest["lengths"] != "fixed":
            raise ConfigError("format=llamagen: has codes of one length; leave psnr= out")
        alphabet = Alphabet.of(manifest)
        codes, labels = self._folders(folder, manifest)
        codes.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        views, number = len(manifest["views"]), 0
        for shard in shards_of(tokens):
            for row in range(0, len(shard), views):
                label = int(shard.labels[row])
                if label < 0:
                    raise ConfigError(
                        f"format=llamagen: {shard.key(row)} has no class, and LlamaGen wants one "
                        "of every image; leave the format out"
                    )
                joint = [alphabet.join(shard.tokens(row + view)) for view in range(views)]
                for place, array in (
                    (codes, np.stack(joint)[None]),
                    (labels, np.array([label], dtype=np.int64)),
                ):
                    with replacing(place / f"{number}.npy") as file:
                        np.save(file, array)
                number += 1

    def read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[TokenSample]:
        """Yield the samples with their labels, the views of an image one after the other."""
        alphabet = Alphabet.of(manifest)
        codes, labels = self._folders(folder, manifest)
        count = len(list(needed(codes, "it has the codes").glob("*.npy")))
        for number in range(count):
            path = codes / f"{number}.npy"
            try:
                found = np.load(path, allow_pickle=False)
                label = np.load(labels / f"{number}.npy", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise DataError(f"{path}: not readable ({error})") from None
            if found.ndim != 3 or found.shape[0] != 1 or found.dtype != np.int64:
                raise DataError(
                    f"{path}: expected (1, A, n) int64, found {found.dtype} {found.shape}"
                )
            for view, joint in enumerate(found[0]):
                ids = alphabet.split(joint, str(path))
                yield TokenSample(ids, int(label[0]), None, str(number), view)
