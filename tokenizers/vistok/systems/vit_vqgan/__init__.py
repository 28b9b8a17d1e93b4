"""ViT-VQGAN: vision transformers around narrow codes of unit length, and its second decoder."""
