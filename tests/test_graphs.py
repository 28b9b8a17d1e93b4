"""Graphs of encode and decode: what other runtimes compute is what the tokenizer computes."""

import json

import pytest
import torch

import vistok
from helpers import TOKENIZERS, images_of, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.export.graphs import write_graphs

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def ran(path, argument):
    """Return the output of onnxruntime for one input."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {only.name: argument.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(name, marks=[] if name == "one_d_piece_tiny" else pytest.mark.nightly)
        for name in TOKENIZERS
        if name != "flextok_tiny"
    ],
)
def test_onnxruntime_gives_equal_ids_and_pictures(tokenizer, tmp_path):
    """For another number of images than the graph was traced with."""
    tok = tiny_tokenizer(tokenizer=tokenizer).eval()
    images = images_of(5, channels=tok.channels).float() / 255
    assert write_graphs(tok, tmp_path, ["onnx"]) == ["encode.onnx", "decode.onnx"]
    for number in (5, 1):
        ids = tok.tokenize(images[:number])
        assert torch.equal(ran(tmp_path / "encode.onnx", images[:number]), ids)
        pictures = ran(tmp_path / "decode.onnx", ids)
        assert torch.allclose(pictures, tok.detokenize(ids), atol=1e-5)


def test_a_decoder_that_draws_noise_is_refused(tmp_path):
    tok = tiny_tokenizer(tokenizer="flextok_tiny").eval()
    with pytest.raises(ConfigError, match=r"graphs=onnx: .* draws noise"):
        write_graphs(tok, tmp_path, ["onnx"])


@pytest.mark.slow
def test_the_command_writes_both_kinds(cli, fails, finished_run, tmp_path):
    code, lines, _ = cli("export", f"run={finished_run}", "out=out", "graphs=[onnx,torch]")
    assert code == 0, lines
    out = tmp_path / "out"
    sealed = json.loads((out / "checksums.json").read_text())
    names = {f"{part}.{end}" for part in ("encode", "decode") for end in ("onnx", "pt2")}
    assert names <= set(sealed["sha256"])
    images = images_of(3)
    ids = vistok.load(out).tokenize(images)
    graph = torch.export.load(out / "encode.pt2").module()
    assert torch.equal(graph(images.float() / 255), ids)
    assert torch.equal(ran(out / "encode.onnx", images.float() / 255), ids)
    fails(
        "export", f"run={finished_run}", "out=new", "graphs=tflite", words="graphs=tflite: choose"
    )
    assert not (tmp_path / "new").exists()
