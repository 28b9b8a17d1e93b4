"""Layouts of tokens that other programs read."""
