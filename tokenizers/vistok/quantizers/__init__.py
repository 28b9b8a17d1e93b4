"""Latents to indices and vectors: the maths."""
