"""transformers opens exports by itself once `vistok.hf` is imported, and runs none of their code."""

import pytest
import torch
from PIL import Image

from helpers import picture
from token_helpers import small_export

transformers = pytest.importorskip("transformers")


def test_auto_classes_open_an_export(tmp_path):
    import vistok.hf

    folder = small_export(tmp_path / "export")
    tok = vistok.load(folder)
    images = [Image.fromarray(picture(seed, 30, 25)) for seed in range(3)]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images)["pixel_values"]
    assert torch.equal(pixels, tok.preprocess(images)) and pixels.dtype == torch.uint8
    model = transformers.AutoModel.from_pretrained(folder)
    ids = tok.tokenize(pixels)
    assert torch.equal(model.encode(pixels), ids) and torch.equal(model(pixels), ids)
    assert torch.equal(model.decode(ids), tok.detokenize(ids))
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "vistok"
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="altered"):
        transformers.AutoModel.from_pretrained(folder)
