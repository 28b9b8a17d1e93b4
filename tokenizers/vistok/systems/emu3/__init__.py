"""Emu3's tokenizer: a CNN over space and short convolutions over time, as images use it."""
