"""Released GigaTok and ReTok: ids and pictures are those of the published architecture.

The oracle knows the published names and shapes alone ([-1, 1] images), and computes in float64 by
torch's functions. Sizes are small; heads are 64 wide, as in all published ones.
"""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vistok
from helpers import Names
from vistok.core.errors import CheckpointError, ConfigError
from vistok.export.importer import import_weights

CODES, DIM, TOKENS = 64, 12, 8
WIDTHS = (64, 64, 128)  # 16 px to a grid of 4 x 4
FORMERS = {"s2to1encoder": ("encoder_embed", 128), "s1to2decoder": ("decoder_embed", 64)}


# ---------------------------------------------------------------------- published tensors


def cnn(names, part, blocks):
    encodes = part == "encoder"
    widths = WIDTHS if encodes else WIDTHS[::-1]
    width = widths[0]
    names.layer(f"{part}.conv_in", width, 3 if encodes else DIM, 3, 3)
    for level, out in enumerate(widths):
        if not encodes:
            names.layer(f"{part}.adaptive.{level}.gamma", width, DIM)
            names.layer(f"{part}.adaptive.{level}.beta", width, DIM)
        for n in range(blocks):
            names.res_block(f"{part}.conv_blocks.{level}.res.{n}", width, out, "nin_shortcut")
            width = out
        if level < 2 and encodes:
            names.layer(f"{part}.conv_blocks.{level}.downsample.conv", width, width, 3, 3)
        elif level < 2:
            names.layer(f"{part}.conv_blocks.{level}.upsample.conv1", 4 * width, width, 3, 3)
    for n in range(2):
        names.res_block(f"{part}.mid.{n}", WIDTHS[-1], WIDTHS[-1], "nin_shortcut")
    names.norm(f"{part}.norm_out", width)
    names.layer(f"{part}.conv_out", DIM if encodes else 3, width, 3, 3)


def published(seed=0, padding=0):
    names = Names(seed)
    cnn(names, "encoder", 1)
    cnn(names, "decoder", 2)
    for part, (embed, width) in FORMERS.items():
        names.norm(f"{part}.ln_pre", DIM)
        names.norm(f"{part}.ln_post", width)
        names.layer(f"{part}.{embed}", width, DIM)
        names.add(f"{part}.positional_embedding", 16, 1, width, scale=0.5)
        names.add(f"{part}.latent_token_positional_embedding", TOKENS, 1, width, scale=0.5)
        if padding:
            name = f"{part}.latent_token_positional_embedding_comp"
            names.add(name, padding, 1, width, scale=0.5)
        for n in range(2):
            block = f"{part}.transformer.{n}"
            for i in (1, 2, 3):
                names.norm(f"{block}.norm{i}", width)
            for layer in ("self_attn", "multihead_attn"):
                names.add(
                    f"{block}.{layer}.in_proj_weight", 3 * width, width, scale=2 * width**-0.5
                )
                names.add(f"{block}.{layer}.in_proj_bias", 3 * width, scale=0.1)
                names.layer(f"{block}.{layer}.out_proj", width, width)
            names.layer(f"{block}.linear1", 4 * width, width)
            names.layer(f"{block}.linear2", width, 4 * width)
    names.layer("s2to1encoder.global_proj", 128, 128)
    names.layer("s2to1encoder.conv_out", DIM, 128, 1, 1)
    names.layer("s1to2decoder.conv_out", DIM, 64, 3, 3)
    names.layer("s1to2decoder.distill_mlp.0", 5, 64)  # of its training alone
    names.layer("quant_conv", 6, DIM, 1, 1)
    names.layer("post_quant_conv", DIM, 6, 1, 1)
    names.add("quantize.embedding.weight", CODES, 6, scale=1.0)
    names.add("quantize.codebook_used", 9)
    return names.tensors


# ---------------------------------------------------------------------- oracle


class Oracle:
    """The published forward, in float64."""

    def __init__(self, tensors):
        self.p = {k: v.double() for k, v in tensors.items()}

    def pair(self, name):
        return self.p[f"{name}.weight"], self.p[f"{name}.bias"]

    def conv(self, name, x, padding=1, stride=1):
        return F.conv2d(x, *self.pair(name), padding=padding, stride=stride)

    def linear(self, name, x):
        weight, bias = self.pair(name)
        return x @ weight.flatten(1).T + bias

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], *self.pair(name))

    def rest(self, name, x):
        return F.silu(F.group_norm(x, 32, *self.pair(name), eps=1e-6))

    def res_block(self, name, x):
        y = self.conv(f"{name}.conv1", self.rest(f"{name}.norm1", x))
        y = self.conv(f"{name}.conv2", self.rest(f"{name}.norm2", y))
        shortcut = f"{name}.nin_shortcut"
        return y + (self.conv(shortcut, x, 0) if f"{shortcut}.bias" in self.p else x)

    def middle(self, part, x):
        return self.res_block(f"{part}.mid.1", self.res_block(f"{part}.mid.0", x))

    def cnn_encoder(self, images):
        x = self.conv("encoder.conv_in", images)
        for level in range(3):
            x = self.res_block(f"encoder.conv_blocks.{level}.res.0", x)
            if level < 2:
                x = F.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.conv_blocks.{level}.downsample.conv", x, 0, 2)
        x = self.rest("encoder.norm_out", self.middle("encoder", x))
        return self.conv("encoder.conv_out", x)

    def cnn_decoder(self, cells):
        x = self.middle("decoder", self.conv("decoder.conv_in", cells))
        for level in range(3):
            flat = cells.flatten(2)
            mean = flat.mean(2)
            spread = (flat - mean[..., None]).square().sum(2) / (flat.shape[2] - 1)
            scale = self.linear(f"decoder.adaptive.{level}.gamma", (spread + 1e-6).sqrt())
            shift = self.linear(f"decoder.adaptive.{level}.beta", mean)
            x = F.group_norm(x, 32, eps=1e-6) * scale[..., None, None] + shift[..., None, None]
            for n in range(2):
                x = self.res_block(f"decoder.conv_blocks.{level}.res.{n}", x)
            if level < 2:
                y = self.conv(f"decoder.conv_blocks.{level}.upsample.conv1", x)
                x = y.new_empty(len(y), y.shape[1] // 4, 2 * y.shape[2], 2 * y.shape[3])
                for place, part in enumerate(y.chunk(4, dim=1)):
                    x[:, :, place // 2 :: 2, place % 2 :: 2] = part
        return self.conv("decoder.conv_out", self.rest("decoder.norm_out", x))

    def attend(self, name, q, k, v):
        width = q.shape[2]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.multi_head_attention_forward(
            q, k, v, width, width // 64, self.p[f"{name}.in_proj_weight"],
            self.p[f"{name}.in_proj_bias"], None, None, False, 0.0, *self.pair(f"{name}.out_proj"),
        )[0].transpose(0, 1)  # fmt: skip

    def former(self, part, x, memory, places, memory_places):
        for n in range(2):
            block = f"{part}.transformer.{n}"
            y = self.norm(f"{block}.norm1", x)
            x = x + self.attend(f"{block}.self_attn", y + places, y + places, y)
            y = self.norm(f"{block}.norm2", x) + places
            x = x + self.attend(f"{block}.multihead_attn", y, memory + memory_places, memory)
            y = F.gelu(self.linear(f"{block}.linear1", self.norm(f"{block}.norm3", x)))
            x = x + self.linear(f"{block}.linear2", y)
        return self.norm(f"{part}.ln_post", x)

    def places(self, part):
        codes = f"{part}.latent_token_positional_embedding"
        all_ = torch.cat([self.p[codes], self.p.get(f"{codes}_comp", self.p[codes][:0])])
        return all_[:, 0], self.p[f"{part}.positional_embedding"][:, 0]

    def codes(self, images):
        cells = self.cnn_encoder(images).flatten(2).transpose(1, 2)
        memory = self.linear("s2to1encoder.encoder_embed", self.norm("s2to1encoder.ln_pre", cells))
        rows = memory.unflatten(1, (4, 4))
        halves = rows.split(2, dim=2)
        quarters = [part for half in rows.split(2, dim=1) for part in half.split(2, dim=2)]
        parts = [rows, rows, *halves, *quarters]  # 1 + 1 + 2 + 4 tokens
        queries = torch.stack([part.mean(dim=(1, 2)) for part in parts], dim=1)
        queries = self.linear("s2to1encoder.global_proj", queries)
        places, grid = self.places("s2to1encoder")
        start = 2 * TOKENS - len(places)  # ReTok: queries from here on stand there twice
        queries = torch.cat([queries, queries[:, start:]], dim=1)
        x = self.former("s2to1encoder", queries, memory, places, grid)[:, :TOKENS]
        x = F.normalize(self.linear("quant_conv", self.linear("s2to1encoder.conv_out", x)), dim=2)
        table = F.normalize(self.p["quantize.embedding.weight"], dim=1)
        ids = (x @ table.T).argmax(2)
        return ids, table[ids]

    def pictures(self, codes):
        x = self.norm("s1to2decoder.ln_pre", self.linear("post_quant_conv", codes))
        x = self.linear("s1to2decoder.decoder_embed", x)
        places, grid = self.places("s1to2decoder")
        first = x[:, :1].expand(-1, 16, -1)
        x = self.former("s1to2decoder", first, x, grid, places[: x.shape[1]])
        cells = self.conv("s1to2decoder.conv_out", x.transpose(1, 2).unflatten(2, (4, 4)))
        return (self.cnn_decoder(cells) + 1) / 2


# ---------------------------------------------------------------------- tests


def images(count=6):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def imported(source, tensors, path, **more):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "w.safetensors")
    return vistok.load(import_weights(source, path / "w.safetensors", path / "out", **more))


@pytest.mark.parametrize(("source", "padding"), [("gigatok", 0), ("retok", 6)])
def test_ids_and_pictures_are_the_published_ones(source, padding, tmp_path):
    tensors = published(padding=padding)
    tok, oracle = imported(source, tensors, tmp_path), Oracle(tensors)
    ids, codes = oracle.codes(2 * images().double() - 1)
    assert torch.equal(tok.tokenize(images())[..., 0], ids) and ids.unique().numel() > 8
    found, expected = tok.decode(tok.quantizer.decode(ids[..., None])), oracle.pictures(codes)
    assert torch.allclose((found + 1) / 2, expected.float(), atol=1e-4)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).std() > 0.01


def test_retok_decodes_prefixes_as_published(tmp_path):
    tensors = published(padding=6)
    tok, oracle = imported("retok", tensors, tmp_path), Oracle(tensors)
    assert tok.encoder.padding_start == 2
    _, codes = oracle.codes(2 * images().double() - 1)
    for count in (1, 3, TOKENS):
        found = tok.detokenize(tok.tokenize(images(), num_tokens=count))
        expected = oracle.pictures(codes[:, :count]).clamp(0, 1)
        assert torch.allclose(found, expected.float(), atol=5e-5)


def test_of_a_training_checkpoint_the_averaged_weights_are_taken(tmp_path):
    """As the published files are: dictionaries, with the arguments of the run among them."""
    last, averaged = published(seed=0), published(seed=1)
    checkpoint = {"model": last, "steps": 3, "args": Namespace(lr=1e-4), "optimizer": {"state": {}}}
    torch.save(checkpoint, tmp_path / "last.pt")
    torch.save({**checkpoint, "ema": averaged}, tmp_path / "averaged.pt")
    for name, tensors in (("last", last), ("averaged", averaged)):
        out = import_weights("gigatok", tmp_path / f"{name}.pt", tmp_path / name)
        expected = imported("gigatok", tensors, tmp_path, overwrite=True).state_dict()
        found = vistok.load(out).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_what_is_not_as_it_says_is_refused(tmp_path):
    good = published()

    def fails(tensors, source="gigatok", **more):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            imported(source, tensors, tmp_path, **more)
        assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    def without(part):
        return {k: v for k, v in good.items() if part not in k}

    assert "'stranger' has no place" in fails({**good, "stranger": torch.zeros(1)})
    assert "positions for 16 px" in fails(good, image_size=32)
    assert "embedding_comp' is missing" in fails(good, source="retok")
    assert "embedding_comp' has no place" in fails(published(padding=6))
    for part in ("transformer.1.linear1", "res.0.conv1", "adaptive.2.gamma", "mid.1.norm2"):
        assert "missing" in fails(without(part))
    assert "'quantize.embedding.weight' is missing" in fails(without("quantize."))
