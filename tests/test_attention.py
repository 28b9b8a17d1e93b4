"""FlexAttention gives what the dense mask gives."""

import copy
import gc
import pickle

import pytest
import torch

from helpers import TINY, config_of, images_of, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.models.build import build_tokenizer
from vistok.models.latent_vit import prefix_causal_mask
from vistok.nn import attention as attentions
from vistok.nn.attention import attend, in_blocks
from vistok.nn.blocks import NORMALIZED, Transformer

flex = pytest.importorskip("torch.nn.attention.flex_attention")


def masks(batch, length):
    """A prefix-causal mask for all, and a prefix of its own for each sample."""
    torch.manual_seed(0)
    kept = torch.randint(1, length + 1, (batch,))
    each = (torch.arange(length) < kept[:, None])[:, None, None]
    return {"causal": prefix_causal_mask(length // 3, length - length // 3), "each": each}


@pytest.mark.parametrize("length", [7, 128, 200])
@pytest.mark.parametrize("which", ["causal", "each"])
def test_flex_equals_dense(which, length):
    mask = masks(3, length)[which]
    q, k, v = torch.randn(3, 3, 2, length, 8)
    with torch.no_grad():
        blocks = attend(q, k, v, in_blocks(mask, length))
        scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(~mask, float("-inf"))
        exact = scores.softmax(-1) @ v.double()
        assert torch.allclose(blocks.double(), exact, atol=1e-5)
        assert torch.allclose(blocks, attend(q, k, v, mask), atol=1e-5)
        assert not torch.allclose(blocks, attend(q, k, v), atol=1e-2)


def test_hidden_blocks_are_passed_over():
    """Of 3 x 3 blocks of 128, those above the diagonal, and what lies behind a short prefix."""
    counts = in_blocks(torch.ones(384, 384).tril().bool(), 384).to_dense()[0, 0]
    assert counts.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    kept = torch.tensor([384, 100])
    mask = (torch.arange(384) < kept[:, None])[:, None, None]
    blocks = in_blocks(mask, 384).to_dense()[:, 0]
    assert blocks[0].all() and blocks[1].tolist() == [[1, 0, 0]] * 3


@pytest.fixture
def created(monkeypatch):
    """How often FlexAttention was asked for blocks."""
    calls, create = [], flex.create_block_mask
    monkeypatch.setattr(
        flex, "create_block_mask", lambda *a, **k: calls.append(1) or create(*a, **k)
    )
    return calls


def test_blocks_of_a_constant_mask_are_made_once(created):
    mask, kept = torch.ones(20, 20).tril().bool(), len(attentions._BLOCKS)
    blocks = in_blocks(mask, 20)
    assert in_blocks(mask, 20) is blocks and len(created) == 1
    assert in_blocks(mask.clone(), 20) is not blocks and len(created) == 2
    mask[0] = True  # it is not constant after all
    assert in_blocks(mask, 20) is not blocks and len(created) == 3
    each = masks(3, 20)["each"]
    assert in_blocks(each, 20) is not in_blocks(each, 20)
    del mask
    gc.collect()
    assert len(attentions._BLOCKS) == kept


def test_blocks_that_inference_made_serve_training():
    with torch.inference_mode():
        mask = torch.ones(20, 20).tril().bool()
        assert in_blocks(mask, 20) is in_blocks(mask, 20)
    blocks = in_blocks(mask, 20)
    assert not blocks.kv_num_blocks.is_inference() and not blocks.kv_indices.is_inference()


def test_a_tokenizer_with_blocks_is_copied_pickled_and_moved(created):
    tok = tiny_tokenizer(
        "tokenizer.encoder.attention=flex", "tokenizer.encoder.depth=2", tokenizer="flextok_tiny"
    )
    x = tok.to_model_range(images_of(2))
    with torch.no_grad():
        expected = tok.encode(x)
        assert torch.equal(tok.encode(x), expected) and len(created) == 1
        copied = copy.deepcopy(tok)
        pickled = pickle.loads(pickle.dumps(tok))
        for other in (copied, pickled):
            assert torch.equal(other.encode(x), expected)
        assert len(created) == 3
        assert copied.to(torch.float64).encode(x.double()).dtype == torch.float64
        assert in_blocks(copied.to("meta").encoder.mask, 8).kv_indices.device.type == "meta"
        assert torch.equal(tok.encode(x), expected)


def test_the_option_changes_the_path_and_not_the_numbers(monkeypatch):
    calls = []
    original = attentions.in_blocks
    monkeypatch.setattr(attentions, "in_blocks", lambda *a: calls.append(1) or original(*a))
    x = torch.randn(3, 20, 16)
    outputs, gradients = [], []
    for attention in ("dense", "flex"):
        torch.manual_seed(0)
        net = Transformer(16, 2, 2, attention=attention, **NORMALIZED)
        with torch.no_grad():
            outputs += [[net(x, mask) for mask in masks(3, 20).values()]]
            net(x)  # without a mask there is nothing to pass over
        assert len(calls) == (2 if attention == "flex" else 0)
        net(x, masks(3, 20)["causal"]).square().sum().backward()  # dense on a CPU
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*outputs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(calls) == 2
    with pytest.raises(ConfigError, match=r"attention=flx: must be dense or flex.*'flex'"):
        Transformer(16, 1, 2, attention="flx")


@pytest.mark.parametrize("name", ["flextok_tiny", "one_d_piece_tiny"])
def test_tokenizers_take_the_option(name):
    toks = [
        tiny_tokenizer(f"tokenizer.encoder.attention={a}", tokenizer=name)
        for a in ("dense", "flex")
    ]
    toks[1].load_state_dict(toks[0].state_dict())
    x = toks[0].to_model_range(images_of(4))
    with torch.no_grad():
        assert torch.allclose(toks[1].encode(x), toks[0].encode(x), atol=1e-5)
    ids, lengths = toks[0].tokenize(images_of(4)), torch.tensor([4, 1, 3, 2])
    pictures = [tok.detokenize(ids, lengths) for tok in toks]
    assert torch.allclose(*pictures, atol=1e-5)


def test_both_in_one_config():
    tok = build_tokenizer(config_of(*TINY, "tokenizer.encoder.attention=flex"))
    assert tok.encoder.transformer.attention == tok.decoder.transformer.attention == "flex"


@pytest.mark.parametrize("name", ["restok_tiny", "hita_tiny"])
def test_systems_with_other_masks_take_the_option(name):
    toks = [
        tiny_tokenizer(f"tokenizer.encoder.attention={a}", tokenizer=name)
        for a in ("dense", "flex")
    ]
    toks[1].load_state_dict(toks[0].state_dict())
    x = toks[0].to_model_range(images_of(4))
    with torch.no_grad():
        assert torch.allclose(toks[1].encode(x), toks[0].encode(x), atol=1e-5)
    ids = toks[0].tokenize(images_of(4))
    assert torch.allclose(*(tok.detokenize(ids) for tok in toks), atol=1e-5)


@pytest.mark.slow
def test_compiled_flex_equals_dense():
    """The fused kernel, as on a GPU; a CPU has its forward only."""
    mask = masks(2, 160)["causal"]
    q, k, v = torch.randn(3, 2, 2, 160, 32)
    with torch.no_grad():
        fused = attentions._flex_attention(True)(q, k, v, block_mask=in_blocks(mask, 160))
        assert torch.allclose(fused, attend(q, k, v, mask), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [None, "causal", "each"])
def test_attention_in_training_equals_its_definition(which, dtype):
    """Values and gradients, against float64."""
    mask = None if which is None else masks(3, 20)[which]
    torch.manual_seed(1)
    parts = torch.randn(3, 3, 2, 20, 8).to(dtype)
    slope = torch.randn(3, 2, 20, 8)
    ours, exact = (parts.to(kind, copy=True).requires_grad_() for kind in (dtype, torch.float64))
    value = attend(*ours, mask)
    (value * slope).sum().backward()
    scores = exact[0] @ exact[1].mT / 8**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ exact[2]
    (expected * slope).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert value.dtype == dtype
    assert torch.allclose(value.double(), expected, atol=tolerance)
    assert torch.allclose(ours.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------- tokens that are kept


@pytest.mark.parametrize("block", [{}, NORMALIZED], ids=["vit", "normalized"])
@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("keep", [slice(-6, None), slice(1, 15)])
@pytest.mark.parametrize("which", [None, "causal", "each"])
def test_kept_tokens_are_those_of_the_whole_sequence(which, keep, attention, block):
    mask = None if which is None else masks(3, 20)[which]
    torch.manual_seed(0)
    net = Transformer(16, 2, 2, attention=attention, **block)
    x = torch.randn(3, 20, 16)
    with torch.no_grad():
        assert torch.allclose(net(x, mask, keep), net(x, mask)[:, keep], atol=1e-5)
    gradients = []
    for checkpointing in (None, False, True):
        net.activation_checkpointing = bool(checkpointing)
        out = net(x, mask)[:, keep] if checkpointing is None else net(x, mask, keep)
        net.zero_grad()
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for whole, kept, again in zip(*gradients, strict=True):
        assert torch.allclose(whole, kept, atol=1e-4) and torch.equal(kept, again)


@pytest.mark.parametrize("name", ["titok_tiny", "one_d_piece_tiny"])
def test_the_last_block_computes_what_is_read(name):
    """The encoder's its latent tokens, the decoder's its patches; the others all of them."""
    tok = tiny_tokenizer(
        "tokenizer.encoder.depth=2", "tokenizer.decoder.depth=2", tokenizer=name
    ).train()
    rows = {}
    for part in ("encoder", "decoder"):
        for number, block in enumerate(getattr(tok, part).transformer.blocks):

            def hook(module, inputs, output, key=(part, number)):
                rows[key] = inputs[0].shape[1]

            block.mlp.register_forward_hook(hook)
    tok(tok.to_model_range(images_of(2)))
    patches = len(tok.decoder.patch_positions)
    assert (rows["encoder", 0], rows["encoder", 1]) == (1 + patches + 4, 4)  # a class token first
    # One-D-Piece leaves out a tail, here of a random length.
    assert rows["decoder", 0] > patches == rows["decoder", 1]
