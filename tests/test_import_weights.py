"""Released weights: ids and pictures are those of the published architecture, written down here.

The oracles know the published names, shapes and ranges alone ([0, 1] images), and compute in
float64 by torch's functions. Sizes are small; heads are 64 wide, as in all published ones (ResTok's
say themselves how wide they are).
"""

import pickle
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vistok
from helpers import TINY, Names, config_of, errors_while_learning, images_of
from vistok.cli import evaluate, train
from vistok.cli import import_weights as command
from vistok.core.errors import CheckpointError, ConfigError
from vistok.export.importer import import_weights
from vistok.models.build import build_tokenizer
from vistok.models.maskgit_cnn import MaskGITEncoder

CODES = 24


# ---------------------------------------------------------------------- published tensors


WIDTHS = (64, 64, 128)


def res_block(names, name, width_in, width_out):
    names.norm(f"{name}.norm1", width_in)
    names.layer(f"{name}.conv1", width_out, width_in, 3, 3, bias=False)
    names.norm(f"{name}.norm2", width_out)
    names.layer(f"{name}.conv2", width_out, width_out, 3, 3, bias=False)
    if width_in != width_out:
        names.layer(f"{name}.nin_shortcut", width_out, width_out, 1, 1, bias=False)


def maskgit_decoder(names, prefix, dim):
    width = WIDTHS[-1]
    names.layer(f"{prefix}.conv_in", width, dim, 3, 3)
    for n in range(2):
        res_block(names, f"{prefix}.mid.{n}", width, width)
    for level in reversed(range(len(WIDTHS))):
        for n in range(2):
            res_block(names, f"{prefix}.up.{level}.block.{n}", width, WIDTHS[level])
            width = WIDTHS[level]
        if level:
            names.layer(f"{prefix}.up.{level}.upsample_conv", width, width, 3, 3)
    names.norm(f"{prefix}.norm_out", width)
    names.layer(f"{prefix}.conv_out", 3, width, 3, 3)


def maskgit_encoder(names, prefix, dim):
    names.layer(f"{prefix}.conv_in", WIDTHS[0], 3, 3, 3, bias=False)
    width = WIDTHS[0]
    for level, out in enumerate(WIDTHS):
        for n in range(2):
            res_block(names, f"{prefix}.down.{level}.block.{n}", width, out)
            width = out
    for n in range(2):
        res_block(names, f"{prefix}.mid.{n}", width, width)
    names.norm(f"{prefix}.norm_out", width)
    names.layer(f"{prefix}.conv_out", dim, width, 1, 1)


def maskgit(seed=0, dim=12):
    names = Names(seed)
    maskgit_encoder(names, "encoder", dim)
    maskgit_decoder(names, "decoder", dim)
    names.add("quantize.embedding.weight", CODES, dim, scale=1.0)
    return names.tensors


def titok(seed=0, two_stages=True, text=False, tokens=8, dim=6, widths=(64, 128), patch=4, side=16):
    names = Names(seed)
    cells = (side // patch) ** 2
    for part, width in zip(("encoder", "decoder"), widths, strict=True):
        names.add(f"{part}.class_embedding", 1, width, scale=0.5)
        names.add(f"{part}.positional_embedding", cells + 1, width, scale=0.5)
        names.add(f"{part}.latent_token_positional_embedding", tokens, width, scale=0.5)
        names.norm(f"{part}.ln_pre", width)
        names.norm(f"{part}.ln_post", width)
        for n in range(2):
            block = f"{part}.transformer.{n}"
            names.norm(f"{block}.ln_1", width)
            names.norm(f"{block}.ln_2", width)
            names.add(f"{block}.attn.in_proj_weight", 3 * width, width, scale=2 * width**-0.5)
            names.add(f"{block}.attn.in_proj_bias", 3 * width, scale=0.1)
            names.layer(f"{block}.attn.out_proj", width, width)
            names.layer(f"{block}.mlp.c_fc", 4 * width, width)
            names.layer(f"{block}.mlp.c_proj", width, 4 * width)
    width, wide = widths
    names.layer("encoder.patch_embed", width, 3, patch, patch)
    names.layer("encoder.conv_out", dim, width, 1, 1)
    names.add("latent_tokens", tokens, width, scale=0.5)
    names.add("quantize.embedding.weight", CODES, dim, scale=1.0)
    names.layer("decoder.decoder_embed", wide, dim)
    names.add("decoder.mask_token", 1, 1, wide, scale=0.5)
    if two_stages:
        names.layer("decoder.ffn.0", 2 * wide, wide, 1, 1)
        names.layer("decoder.ffn.2", 10, 2 * wide, 1, 1)
        names.add("pixel_quantize.embedding.weight", 10, 5, scale=1.0)
        maskgit_decoder(names, "pixel_decoder", 5)
    else:
        names.layer("decoder.ffn.0", patch * patch * 3, wide, 1, 1)
        names.layer("decoder.conv_out", 3, 3, 3, 3)
    if text:
        names.layer("decoder.text_guidance_proj", wide, 7)
        names.add("decoder.text_guidance_positional_embedding", 3, wide, scale=0.5)
        names.add("quantize.embed_prob", CODES, scale=0.1)
    return names.tensors


LEVELS = ((1, 1), (1, 1), (1, 2), (2, 2))  # of ResTok's 8 latents
GRIDS = ((4, 4), (4, 2), (4, 1))  # its image tokens, before and after two merges


def restok(seed=0, dim=6, width=64, head=16, depth=4):
    names = Names(seed)
    maskgit_encoder(names, "pixel_encoder", 12)
    maskgit_decoder(names, "pixel_decoder", 12)
    names.layer("encoder.patch_embed", width, 12, 1, 1)
    for part in ("encoder", "decoder"):
        names.norm(f"{part}.ln_pre", width)
        names.norm(f"{part}.ln_post", width)
        for n in range(depth):
            block = f"{part}.blocks.{n}"
            names.norm(f"{block}.norm1", width)
            names.norm(f"{block}.norm2", width)
            names.norm(f"{block}.attn.q_norm", head)
            names.norm(f"{block}.attn.k_norm", head)
            names.layer(f"{block}.attn.qkv", 3 * width, width, bias=False)
            for bias in ("q_bias", "v_bias"):
                names.add(f"{block}.attn.{bias}", width, scale=0.3)
            for scale in ("gamma_1", "gamma_2"):
                names.add(f"{block}.{scale}", width, scale=0.5)
            names.layer(f"{block}.attn.proj", width, width)
            names.layer(f"{block}.mlp.fc1", 4 * width, width)
            names.layer(f"{block}.mlp.fc2", width, 4 * width)
        for n in range(len(LEVELS)):
            names.add(f"{part}.latent_token_level_embedding.{n}", 1, width, scale=0.5)
    for n in range(len(GRIDS)):
        names.add(f"encoder.level_embedding.{n}", 1, width, scale=0.5)
    for n in range(len(LEVELS)):
        names.layer(f"encoder.conv_out.{n}", dim, width, 1, 1)
        names.layer(f"decoder.decoder_embed.{n}", width, dim)
    names.layer("decoder.ffn", 12, width, 1, 1)
    names.add("decoder.latent_mask_token", 1, 1, dim, scale=0.5)
    names.add("decoder.mask_token", 1, 1, width, scale=0.5)
    names.add("quantize.embedding.weight", CODES, dim, scale=1.0)
    return names.tensors


# ---------------------------------------------------------------------- oracles


def oracle_res_block(p, name, x):
    def part(y, n):
        weight, bias = p[f"{name}.norm{n}.weight"], p[f"{name}.norm{n}.bias"]
        y = F.silu(F.group_norm(y, 32, weight, bias, eps=1e-6))
        return F.conv2d(y, p[f"{name}.conv{n}.weight"], padding=1)

    y = part(part(x, 1), 2)
    shortcut = p.get(f"{name}.nin_shortcut.weight")
    return y + (x if shortcut is None else F.conv2d(y, shortcut))


def oracle_conv(p, name, x, padding=1):
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), padding=padding)


def oracle_end(p, prefix, x, padding):
    x = F.group_norm(x, 32, p[f"{prefix}.norm_out.weight"], p[f"{prefix}.norm_out.bias"], 1e-6)
    return oracle_conv(p, f"{prefix}.conv_out", F.silu(x), padding)


def oracle_maskgit_decoder(p, prefix, x):
    x = oracle_conv(p, f"{prefix}.conv_in", x)
    for n in range(2):
        x = oracle_res_block(p, f"{prefix}.mid.{n}", x)
    for level in (2, 1, 0):
        for n in range(2):
            x = oracle_res_block(p, f"{prefix}.up.{level}.block.{n}", x)
        if level:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = oracle_conv(p, f"{prefix}.up.{level}.upsample_conv", x)
    return oracle_end(p, prefix, x, 1)


def oracle_maskgit_encoder(p, prefix, images):
    x = oracle_conv(p, f"{prefix}.conv_in", images)
    for level in range(3):
        for n in range(2):
            x = oracle_res_block(p, f"{prefix}.down.{level}.block.{n}", x)
        if level < 2:
            x = F.avg_pool2d(x, 2)
    for n in range(2):
        x = oracle_res_block(p, f"{prefix}.mid.{n}", x)
    return oracle_end(p, prefix, x, 0)


def oracle_maskgit(p, images):
    x = oracle_maskgit_encoder(p, "encoder", images).permute(0, 2, 3, 1)
    codes = p["quantize.embedding.weight"]
    ids = torch.cdist(x.flatten(0, 2), codes).argmin(1)
    quantized = codes[ids].view(x.shape).permute(0, 3, 1, 2)
    return ids.view(len(images), -1), oracle_maskgit_decoder(p, "decoder", quantized)


def oracle_transformer(p, part, x):
    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    x = norm(x, f"{part}.ln_pre").transpose(0, 1)
    for n in range(2):
        block = f"{part}.transformer.{n}"
        y = norm(x, f"{block}.ln_1")
        y, _ = F.multi_head_attention_forward(
            y, y, y, y.shape[-1], y.shape[-1] // 64,
            p[f"{block}.attn.in_proj_weight"], p[f"{block}.attn.in_proj_bias"], None, None, False,
            0.0, p[f"{block}.attn.out_proj.weight"], p[f"{block}.attn.out_proj.bias"],
        )  # fmt: skip
        x = x + y
        y = F.linear(norm(x, f"{block}.ln_2"), p[f"{block}.mlp.c_fc.weight"], p[f"{block}.mlp.c_fc.bias"])  # fmt: skip
        x = x + F.linear(F.gelu(y), p[f"{block}.mlp.c_proj.weight"], p[f"{block}.mlp.c_proj.bias"])
    return norm(x.transpose(0, 1), f"{part}.ln_post")


def oracle_titok(p, images, keep=None, text=None):
    two_stages = "pixel_quantize.embedding.weight" in p
    batch = len(images)

    def rows(name):
        return p[name].expand(batch, *p[name].shape[-2:])

    x = F.conv2d(images, p["encoder.patch_embed.weight"], p["encoder.patch_embed.bias"], stride=4)
    x = torch.cat([rows("encoder.class_embedding"), x.flatten(2).transpose(1, 2)], 1)
    x = x + p["encoder.positional_embedding"]
    latents = rows("latent_tokens") + p["encoder.latent_token_positional_embedding"]
    x = oracle_transformer(p, "encoder", torch.cat([x, latents], 1))[:, 17:]
    count, width = x.shape[1:]
    if two_stages:  # memory read in another shape
        x = x.reshape(batch, width, count).permute(0, 2, 1)
    x = F.linear(x, p["encoder.conv_out.weight"][:, :, 0, 0], p["encoder.conv_out.bias"])
    codes = p["quantize.embedding.weight"]
    if two_stages:
        x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    ids = torch.cdist(x.flatten(0, 1), codes).argmin(1).view(batch, count)

    x = F.linear(codes[ids[:, :keep]], p["decoder.decoder_embed.weight"], p["decoder.decoder_embed.bias"])  # fmt: skip
    x = x + p["decoder.latent_token_positional_embedding"][: x.shape[1]]
    masks = p["decoder.mask_token"].expand(batch, 16, -1)
    masks = torch.cat([rows("decoder.class_embedding"), masks], 1)
    parts = [masks + p["decoder.positional_embedding"], x]
    if text is not None:
        text = F.linear(text, p["decoder.text_guidance_proj.weight"], p["decoder.text_guidance_proj.bias"])  # fmt: skip
        parts.append(text + p["decoder.text_guidance_positional_embedding"])
    x = oracle_transformer(p, "decoder", torch.cat(parts, 1))[:, 1:17]
    x = x.transpose(1, 2).unflatten(2, (4, 4))
    x = oracle_conv(p, "decoder.ffn.0", x, 0)
    if two_stages:
        logits = oracle_conv(p, "decoder.ffn.2", x.tanh(), 0)
        vectors = torch.einsum("bkhw,kd->bdhw", logits.softmax(1), p["pixel_quantize.embedding.weight"])  # fmt: skip
        return ids, oracle_maskgit_decoder(p, "pixel_decoder", vectors)
    x = x.view(batch, 4, 4, 3, 4, 4).permute(0, 3, 4, 1, 5, 2).reshape(batch, 3, 16, 16)
    return ids, oracle_conv(p, "decoder.conv_out", x)


def oracle_norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def oracle_linear(p, name, x):
    weight = p[f"{name}.weight"]
    return F.linear(x, weight.flatten(1), p.get(f"{name}.bias"))


def oracle_rotary_block(p, name, x, places, levels, between=lambda x: x):
    """One block of ResTok; a token sees those of no higher level."""
    y = oracle_norm(p, f"{name}.norm1", x)
    width, head = x.shape[-1], p[f"{name}.attn.q_norm.weight"].numel()
    q, k, v = oracle_linear(p, f"{name}.attn.qkv", y).split(width, dim=-1)
    heads = [
        part.unflatten(-1, (-1, head)).transpose(1, 2)
        for part in (q + p[f"{name}.attn.q_bias"], k, v + p[f"{name}.attn.v_bias"])
    ]
    speeds = 1e4 ** -(torch.arange(head // 4, dtype=torch.float64) * 4 / head)
    angles = torch.tensor(places, dtype=torch.float64)[:, :, None] * speeds  # rows, then columns
    turns = torch.polar(torch.ones_like(angles), angles).flatten(1)
    turned = []
    for part, norm in zip(heads[:2], ("q_norm", "k_norm"), strict=True):
        pairs = oracle_norm(p, f"{name}.attn.{norm}", part).unflatten(-1, (-1, 2)).contiguous()
        turned.append(torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2))
    logits = turned[0] @ turned[1].mT / head**0.5
    hidden = torch.tensor([[own < theirs for theirs in levels] for own in levels])
    y = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ heads[2]
    y = oracle_linear(p, f"{name}.attn.proj", y.transpose(1, 2).flatten(2))
    x = between(x + p[f"{name}.gamma_1"] * y)
    y = F.gelu(oracle_linear(p, f"{name}.mlp.fc1", oracle_norm(p, f"{name}.norm2", x)))
    return x + p[f"{name}.gamma_2"] * oracle_linear(p, f"{name}.mlp.fc2", y)


def oracle_places(*parts):
    """Grids, and numbers of tokens on the diagonal, each behind all tokens before it."""
    places = []
    for part in parts:
        rows, columns = (part, 0) if isinstance(part, int) else part
        start = len(places)
        for row in range(rows):
            places += [(start + row, start + column) for column in range(columns)]
            places += [(start + row, start + row)] * (not columns)
    return places


def oracle_restok_encoder(p, images):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()
    x = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = oracle_conv(p, "encoder.patch_embed", oracle_maskgit_encoder(p, "pixel_encoder", x), 0)
    edges = [0]
    tokens, left = [x.flatten(2).mT + p["encoder.level_embedding.0"]], x
    for level, (rows, columns) in enumerate(LEVELS):
        high, wide = 4 // rows, 4 // columns
        pooled = F.avg_pool2d(left, (high, wide))
        left = left - pooled.repeat_interleave(high, dim=2).repeat_interleave(wide, dim=3)
        vector = p[f"encoder.latent_token_level_embedding.{level}"]
        tokens.append(pooled.flatten(2).mT + vector)
        edges.append(edges[-1] + rows * columns)
    x = oracle_norm(p, "encoder.ln_pre", torch.cat(tokens, dim=1))
    count = edges[-1]
    for n in range(4):
        merges = min(n, 2)
        grids = GRIDS[merges::-1]
        sizes = [r * c for r, c in (*grids, *LEVELS)]
        levels = [level for level, size in enumerate(sizes) for _ in range(size)]
        first, last = sizes[0], n >= 2

        def merge(x, first=first):
            taken = x[:, :first:2]
            rest = x[:, :first] - taken.repeat_interleave(2, dim=1)
            return torch.cat([taken, rest, x[:, first:]], dim=1)

        x = oracle_rotary_block(
            p, f"encoder.blocks.{n}", x, oracle_places(*grids, count), levels,
            *([] if last else [merge]),
        )  # fmt: skip
        if not last:
            x[:, : first // 2] += p[f"encoder.level_embedding.{merges + 1}"]
    x = oracle_norm(p, "encoder.ln_post", x[:, -count:])
    x = x.flatten(1).view(len(x), -1, count).mT  # memory read in another shape
    parts = [
        oracle_linear(p, f"encoder.conv_out.{level}", x[:, start:stop])
        for level, (start, stop) in enumerate(pairwise(edges))
    ]
    return torch.cat(parts, dim=1)


def oracle_restok(p, images, keep=None):
    z = F.normalize(oracle_restok_encoder(p, images), dim=-1)
    codes = F.normalize(p["quantize.embedding.weight"], dim=-1)
    ids = torch.cdist(z.flatten(0, 1), codes).argmin(1).view(len(z), -1)

    x, count = codes[ids], ids.shape[1]
    edges = [0, 1, 2, 4, 8]  # of the levels
    x[:, count if keep is None else keep :] = p["decoder.latent_mask_token"]
    parts = [
        oracle_linear(p, f"decoder.decoder_embed.{level}", x[:, start:stop])
        + p[f"decoder.latent_token_level_embedding.{level}"]
        for level, (start, stop) in enumerate(pairwise(edges))
    ]
    x = torch.cat([*parts, p["decoder.mask_token"].expand(len(x), 16, -1)], dim=1)
    x = oracle_norm(p, "decoder.ln_pre", x)
    for n in range(4):
        places = oracle_places(count, (4, 4))
        x = oracle_rotary_block(p, f"decoder.blocks.{n}", x, places, [0] * (count + 16))
    x = oracle_linear(p, "decoder.ffn", oracle_norm(p, "decoder.ln_post", x[:, count:]))
    return ids, oracle_maskgit_decoder(p, "pixel_decoder", x.mT.unflatten(2, (4, 4)))


# ---------------------------------------------------------------------- tests

TEXT = torch.randn(6, 3, 7, generator=torch.Generator().manual_seed(3))
CASES = {
    "maskgit_vqgan": (maskgit, oracle_maskgit, {}),
    "titok": (titok, oracle_titok, {}),
    "titok, one stage": (lambda: titok(two_stages=False), oracle_titok, {}),
    "one_d_piece": (titok, oracle_titok, {}),
    "ta_titok": (lambda: titok(two_stages=False, text=True), oracle_titok, {"text": TEXT}),
    "restok": (restok, oracle_restok, {}),
}
#: Sources without positions that are learned: any size will do.
ANY_SIZE = ("maskgit_vqgan", "restok")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_ids_and_pictures_are_the_published_ones(case, suffix, tmp_path):
    make, oracle, given = CASES[case]
    tensors, source = make(), case.partition(",")[0]
    file = tmp_path / f"weights{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    size = 16 if source in ANY_SIZE else None
    tok = vistok.load(import_weights(source, file, tmp_path / "out", image_size=size))
    license = "unknown" if source in ("one_d_piece", "restok") else "Apache-2.0"
    assert f'"license": "{license}"' in (tmp_path / "out" / "config.json").read_text()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    p = {k: v.double() for k, v in tensors.items()}
    ids, pictures = oracle(p, images.double(), **{k: v.double() for k, v in given.items()})
    assert torch.equal(tok.tokenize(images)[..., 0], ids) and ids.unique().numel() > 3
    found = tok.detokenize(ids[..., None], **given)
    assert torch.allclose(found, pictures.clamp(0, 1).float(), atol=5e-5)
    assert found.std() > 0.05
    raw = tok.decode(
        tok.quantizer.decode(ids[..., None]), **given
    )  # not clamped: all of them count
    assert torch.allclose((raw + 1) / 2, pictures.float(), atol=1e-4)


@pytest.mark.parametrize("widths", [(64, 64, 128), (32, 32, 64)])
def test_maskgit_vqgan_is_recognized_and_takes_sizes_that_are_not_square(
    widths, tmp_path, capsys, monkeypatch
):
    """Of 32 channels too, which are as many as the groups of a norm."""
    monkeypatch.setattr(sys.modules[__name__], "WIDTHS", widths)
    tensors = maskgit()
    save_file(tensors, tmp_path / "w.safetensors")
    out = import_weights("auto", tmp_path / "w.safetensors", tmp_path / "out", image_size=16)
    assert "source=auto: maskgit_vqgan, for it has" in capsys.readouterr().out
    assert '"license": "Apache-2.0"' in (out / "config.json").read_text()
    tok, p = vistok.load(out), {k: v.double() for k, v in tensors.items()}
    for size in ((16, 24), (32, 16)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
        ids, pictures = oracle_maskgit(p, images.double())
        sized = tok.at(size)
        assert torch.equal(sized.tokenize(images)[..., 0], ids) and ids.unique().numel() > 3
        raw = sized.decode(sized.quantizer.decode(ids[..., None]))
        assert torch.allclose((raw + 1) / 2, pictures.float(), atol=1e-4)


@pytest.mark.parametrize("source", ["one_d_piece", "restok"])
def test_prefixes_are_decoded_as_published(source, tmp_path):
    make, oracle = {"one_d_piece": (titok, oracle_titok), "restok": (restok, oracle_restok)}[source]
    tensors, size = make(), 16 if source in ANY_SIZE else None
    save_file(tensors, tmp_path / "weights.safetensors")
    tok = vistok.load(
        import_weights(source, tmp_path / "weights.safetensors", tmp_path / "o", image_size=size)
    )
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    p = {k: v.double() for k, v in tensors.items()}
    for count in (1, 3, 8):
        ids, pictures = oracle(p, images.double(), keep=count)
        found = tok.tokenize(images, num_tokens=count)
        assert torch.equal(found[..., 0], ids[:, :count])
        assert torch.allclose(tok.detokenize(found), pictures.clamp(0, 1).float(), atol=5e-5)


@pytest.mark.slow
def test_imported_weights_are_a_proxy_and_a_start(tmp_path, photos):
    """The commands that a user gives: a proxy for stage 1, a released TiTok for stage 2."""
    torch.save(maskgit(), tmp_path / "vqgan.bin")
    save_file(titok(), tmp_path / "titok.safetensors")
    proxy, start = tmp_path / "proxy", tmp_path / "start"
    assert command(["source=maskgit_vqgan", f"weights={tmp_path / 'vqgan.bin'}", f"out={proxy}", "image_size=16"]) == 0  # fmt: skip
    assert command(["source=titok", f"weights={tmp_path / 'titok.safetensors'}", f"out={start}"]) == 0  # fmt: skip
    words = [w for w in TINY if w != "loss=mse"]
    words += ["data=folder", f"data.train={photos}", "data.val_fraction=0.2", "data.image_size=16"]
    words += ["trainer.max_steps=2", "trainer.val_check_interval=2", "experiment=titok_tiny"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert train([*words, "stage=proxy", f"stage.proxy={proxy}", f"hydra.run.dir={first}"]) == 0
    images = images_of(5)
    targets = vistok.load(proxy).tokenize(images)[..., 0]
    assert vistok.load(first).decoder.code_vectors.weight.shape == (CODES, 12)
    assert torch.equal(vistok.load(first).decoder.pixel_decoder.conv_out.weight, vistok.load(proxy).decoder.conv_out.weight)  # fmt: skip
    assert targets.unique().numel() > 3
    words = [w for w in words if not w.startswith(("tokenizer.", "quantizer."))]  # start's hold
    assert (
        train([*words, "stage=decoder", f"stage.weights={start}", f"hydra.run.dir={second}"]) == 0
    )
    before, after = vistok.load(start), vistok.load(second, weights="last")
    assert torch.equal(before.tokenize(images), after.tokenize(images))  # encoder and codes stay
    assert not torch.equal(before.decoder.head[0].weight, after.decoder.head[0].weight)
    assert not torch.equal(before.decoder.pixel_decoder.conv_out.weight, after.decoder.pixel_decoder.conv_out.weight)  # fmt: skip
    evaluated = [f"run={start}", "data=folder", f"data.val={photos}", f"out={tmp_path / 'eval'}"]
    assert evaluate(evaluated) == 0


def test_restoks_latents_are_the_published_ones(tmp_path):
    """What ids hide: all levels, and what each place, mask and level vector does to them."""
    tensors = restok()
    save_file(tensors, tmp_path / "w.safetensors")
    tok = vistok.load(
        import_weights("restok", tmp_path / "w.safetensors", tmp_path / "o", image_size=16)
    )
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    wanted = oracle_restok_encoder({k: v.double() for k, v in tensors.items()}, images.double())
    with torch.no_grad():
        assert torch.allclose(tok.encoder(2 * images - 1), wanted.float(), atol=1e-4)


def test_restoks_checkpoint_of_a_training_is_taken_without_its_teacher(tmp_path):
    plain = restok()
    more = ("foundation_model.model.norm.weight", "vf_proj.weight", "vf_proj_dec.weight")
    tensors = plain | {name: torch.zeros(2) for name in (*more, "decoder.feat_mask_token")}
    torch.save({f"_orig_mod.{k}": v for k, v in tensors.items()}, tmp_path / "w.bin")
    tok = vistok.load(import_weights("restok", tmp_path / "w.bin", tmp_path / "o", image_size=16))
    assert torch.equal(tok.decoder.mask_token, plain["decoder.mask_token"])
    assert tok.encoder.merge_layers == [0, 1] and tok.length.budgets(8) == [4, 8]
    assert not any("foundation" in name for name in tok.state_dict())
    del plain["encoder.level_embedding.1"]
    save_file(plain, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError):
        import_weights("restok", tmp_path / "less.safetensors", tmp_path / "l", image_size=16)


def test_released_restok_starts_the_preset(tmp_path):
    """`experiment=restok_l tokenizer.encoder._target_=... init_from=`, in small."""
    save_file(restok(), tmp_path / "w.safetensors")
    out = import_weights("restok", tmp_path / "w.safetensors", tmp_path / "o", image_size=16)
    sizes = ["width=64", "depth=4", "num_heads=4", "cnn.latent_dim=12"]
    config = config_of(
        "experiment=restok_l", "data.image_size=16", "tokenizer.latent_dim=6",
        "tokenizer.encoder.cnn.base_channels=64", "tokenizer.encoder.merge_layers=[0,1]",
        "tokenizer.encoder.cnn.channel_multipliers=[1,1,2]",
        "tokenizer.encoder.num_latent_tokens=8",
        "tokenizer.encoder._target_=reshaped_restok_encoder",
        *(f"tokenizer.{part}.{size}" for part in ("encoder", "decoder") for size in sizes),
        f"quantizer.codebook_size={CODES}", "quantizer.codebook_dim=6",
    )  # fmt: skip
    tok, released = build_tokenizer(config).eval(), vistok.load(out)
    tok.load_state_dict(released.state_dict())
    images = images_of(4)
    ids = released.tokenize(images)
    assert torch.equal(tok.tokenize(images), ids) and ids.unique().numel() > 3
    assert torch.equal(tok.detokenize(ids), released.detokenize(ids))


def test_restok_l_has_the_published_number_of_parameters():
    """Counted there, but for the vectors of 8 levels in the decoder, which go into biases."""
    config = config_of("experiment=restok_l")
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
    assert sum(p.numel() for p in tokenizer.parameters()) == 659_693_771 - 8 * 1024


def test_a_tokenizer_config_has_the_published_shapes():
    """tokenizer=maskgit_vqgan_f16 is what the importer finds in the released file, to the number."""
    words = ["tokenizer=maskgit_vqgan_f16", "quantizer=vq", "quantizer.codebook_dim=256"]
    config = config_of(*words, "data.image_size=256")
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
    assert tokenizer.num_tokens == 256
    counts = [
        sum(p.numel() for p in m.parameters()) for m in (tokenizer.encoder, tokenizer.decoder)
    ]
    assert counts == [23_775_104, 30_478_339]  # of the published modules, counted there


def test_means_are_those_of_the_channels():
    with pytest.raises(ConfigError, match="mean: 3 values for 1 channels"):
        MaskGITEncoder(16, 1, 32, [1, 2], 8, mean=[0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match=r"std=\[0.2, 0.0, 0.2\]: must be a number above 0"):
        MaskGITEncoder(16, 3, 32, [1, 2], 8, std=[0.2, 0.0, 0.2])
    torch.manual_seed(0)
    plain = MaskGITEncoder(16, 3, 32, [1, 2], 8)
    normed = MaskGITEncoder(16, 3, 32, [1, 2], 8, mean=[0.1, 0.2, 0.3], std=0.5)
    normed.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16)
    given = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5  # of [0, 1]
    assert torch.allclose(normed(2 * images - 1), plain(2 * given - 1), atol=1e-5)


@pytest.mark.slow
def test_maskgit_vqgan_learns_from_scratch():
    """What is imported can also be trained: every weight of encoder and decoder takes part."""
    words = ["channel_multipliers=[1,2]", "base_channels=32", "num_res_blocks=1"]
    config = config_of(
        "experiment=vqgan_tiny", "tokenizer=maskgit_vqgan_f16", "data.image_size=16",
        "tokenizer.latent_dim=16", "tokenizer.decoder.num_res_blocks=1",
        "quantizer.codebook_size=64", *(f"tokenizer.encoder.{word}" for word in words),
    )  # fmt: skip
    torch.manual_seed(0)
    tok = build_tokenizer(config)
    images = tok.to_model_range(images_of(16))
    before = {name: p.clone() for name, p in tok.named_parameters()}
    errors = errors_while_learning(tok, images, lr=2e-3, steps=60)
    assert errors[-1] < 0.5 * errors[0]
    still = [name for name, p in tok.named_parameters() if torch.equal(p, before[name])]
    assert not still


class Sneaky:
    def __reduce__(self):
        return print, ("never printed",)


def test_what_is_not_as_it_says_is_refused(tmp_path, capsys):
    good = titok()

    def fails(tensors, source="titok", **more):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "w.safetensors")
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            import_weights(source, tmp_path / "w.safetensors", tmp_path / "out", **more)
        assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert "did you mean 'titok'" in fails(good, source="titoc")
    assert "'stranger' has no place" in fails({**good, "stranger": torch.zeros(1)})
    assert "'decoder.mask_token' is missing" in fails({k: v for k, v in good.items() if k != "decoder.mask_token"})  # fmt: skip
    assert "positions for 16 px" in fails(good, image_size=32)
    assert "'encoder.conv_in.weight' is missing" in fails(good, source="maskgit_vqgan")
    assert "'decoder.text_guidance_proj.weight' is missing" in fails(good, source="ta_titok")
    continuous = {k: v for k, v in good.items() if not k.startswith("quantize.")}
    assert "no ids" in fails(continuous)
    blocks = {k: v for k, v in good.items() if "transformer.1.mlp.c_fc" not in k}
    assert "c_fc.weight' is missing" in fails(blocks)

    (tmp_path / "bad.bin").write_bytes(pickle.dumps({"a": Sneaky()}))
    torch.save({"a": Sneaky()}, tmp_path / "sneaky.bin")
    torch.save({"net": good}, tmp_path / "nested.bin")
    for name, words in (
        ("sneaky.bin", "refused"),
        ("bad.bin", "bad.bin: "),
        ("nested.bin", "not a plain state_dict"),
        ("nowhere.bin", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            import_weights("titok", tmp_path / name, tmp_path / "out")
    assert "never printed" not in capsys.readouterr().out
    assert command(["source=titok", "out=there"]) == 2
    assert "weights is missing" in capsys.readouterr().err
    there = tmp_path / "there"
    there.mkdir()
    save_file(good, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="already exists"):
        import_weights("titok", tmp_path / "w.safetensors", there)
    with pytest.raises(ConfigError, match="not an export"):
        import_weights("titok", tmp_path / "w.safetensors", there, overwrite=True)
