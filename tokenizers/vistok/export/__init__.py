"""Codebooks and weights for other programs."""
