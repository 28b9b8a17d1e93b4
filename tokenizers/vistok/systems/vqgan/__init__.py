"""VQGAN: an image as a 2D grid of tokens, in the layouts of taming-transformers and diffusers."""
