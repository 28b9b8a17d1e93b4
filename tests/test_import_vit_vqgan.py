"""Weights of enhancing-transformers' ViT-VQGAN: ids and pictures are those of its architecture."""

import pytest
import torch
import torch.nn.functional as F

import vistok
from helpers import Names
from vistok.core.errors import CheckpointError
from vistok.export.importer import import_weights

SIDE, WIDTH, HEADS, DEPTH = 8, 128, 2, 2


def published(size, channels=3, seed=0):
    names = Names(seed)
    cells = size[0] * size[1] // SIDE**2
    for part, table in (("encoder", "en"), ("decoder", "de")):
        names.add(f"{part}.{table}_pos_embedding", 1, cells, WIDTH, scale=0.3)
        names.norm(f"{part}.transformer.norm", WIDTH)
        for n in range(DEPTH):
            layer = f"{part}.transformer.layers.{n}"
            names.norm(f"{layer}.0.norm", WIDTH)
            names.norm(f"{layer}.1.norm", WIDTH)
            names.layer(f"{layer}.0.fn.to_qkv", 3 * WIDTH, WIDTH, bias=False)
            names.layer(f"{layer}.0.fn.to_out", WIDTH, WIDTH)
            names.layer(f"{layer}.1.fn.net.0", 4 * WIDTH, WIDTH)
            names.layer(f"{layer}.1.fn.net.2", WIDTH, 4 * WIDTH)
    names.layer("encoder.to_patch_embedding.0", WIDTH, channels, SIDE, SIDE)
    patches = names.tensors["encoder.to_patch_embedding.0.weight"]
    patches -= patches.mean(dim=(1, 2, 3), keepdim=True)  # what pictures differ in
    patches *= 16  # over positions
    names.add("decoder.to_pixel.1.weight", WIDTH, channels, SIDE, SIDE, scale=WIDTH**-0.5)
    names.add("decoder.to_pixel.1.bias", channels)
    names.layer("pre_quant", 8, WIDTH)
    names.layer("post_quant", WIDTH, 8)
    names.add("quantizer.embedding.weight", 64, 8, scale=1.0)
    return names.tensors


class Oracle:
    """The published forward, in float64, of images in [0, 1]."""

    def __init__(self, tensors):
        self.p = {k: v.double() for k, v in tensors.items()}

    def linear(self, name, x):
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def norm(self, name, x):
        return F.layer_norm(x, (WIDTH,), self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def transformer(self, part, x):
        for n in range(DEPTH):
            layer = f"{part}.transformer.layers.{n}"
            y = self.linear(f"{layer}.0.fn.to_qkv", self.norm(f"{layer}.0.norm", x))
            q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in y.chunk(3, dim=2))
            y = (q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).softmax(dim=3) @ v
            x = x + self.linear(f"{layer}.0.fn.to_out", y.transpose(1, 2).flatten(2))
            y = self.linear(f"{layer}.1.fn.net.0", self.norm(f"{layer}.1.norm", x)).tanh()
            x = x + self.linear(f"{layer}.1.fn.net.2", y)
        return self.norm(f"{part}.transformer.norm", x)

    def ids(self, images):
        name = "encoder.to_patch_embedding.0"
        x = F.conv2d(images.double(), self.p[f"{name}.weight"], self.p[f"{name}.bias"], SIDE)
        x = x.flatten(2).transpose(1, 2) + self.p["encoder.en_pos_embedding"]
        z = F.normalize(self.linear("pre_quant", self.transformer("encoder", x)), dim=2)
        return (z @ self.codes().T).argmax(2)

    def codes(self):
        return F.normalize(self.p["quantizer.embedding.weight"], dim=1)

    def pictures(self, ids, grid):
        x = self.linear("post_quant", self.codes()[ids]) + self.p["decoder.de_pos_embedding"]
        x = self.transformer("decoder", x).transpose(1, 2).unflatten(2, grid)
        name = "decoder.to_pixel.1"
        return F.conv_transpose2d(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], SIDE)


def imported(tensors, path, size, source="auto"):
    loss = {"loss.discriminator.blocks.0.bias": torch.zeros(1)}
    torch.save({"state_dict": tensors | loss, "global_step": 3}, path / "w.ckpt")
    return vistok.load(import_weights(source, path / "w.ckpt", path / "out", size))


@pytest.mark.parametrize(("size", "channels"), [((64, 64), 3), ((64, 96), 3), ((32, 48), 1)])
def test_ids_and_pictures_are_the_published_ones(size, channels, tmp_path, capsys):
    tensors = published(size, channels)
    tok, oracle = imported(tensors, tmp_path, list(size)), Oracle(tensors)
    said = capsys.readouterr().out
    assert "source=auto: vit_vqgan, for" in said and "license: MIT" in said
    images = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))
    ids = oracle.ids(images)
    assert torch.equal(tok.tokenize(images)[..., 0], ids) and ids.unique().numel() > 8
    found = (tok.decode(tok.quantizer.decode(ids[..., None])) + 1) / 2
    expected = oracle.pictures(ids, tok.encoder.grid)
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.1 and (expected[0] - expected[1]).std() > 0.01
    # And it learns on.
    tok.train()(2 * images - 1).predictions["image"].value.square().mean().backward()
    assert tok.encoder.embed.weight.grad.any() and tok.decoder.head.weight.grad.any()


def test_what_does_not_fit_is_refused(tmp_path):
    tensors = published((32, 32))
    wide = {k: torch.zeros(3 * 64, WIDTH) if "to_qkv" in k else v for k, v in tensors.items()}
    with pytest.raises(CheckpointError, match="attention is 64 channels wide"):
        imported(wide, tmp_path, None, "vit_vqgan")
    with pytest.raises(CheckpointError, match="has 4 x 6 patches, the file positions for 16"):
        imported(tensors, tmp_path, [32, 48], "vit_vqgan")
    narrow = tensors | {"decoder.to_pixel.1.weight": torch.zeros(64, 3, SIDE, SIDE)}
    with pytest.raises(CheckpointError, match="are 128 and 64 channels wide"):
        imported(narrow, tmp_path, None, "vit_vqgan")
