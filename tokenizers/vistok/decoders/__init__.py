"""Quantized latents to images."""
