"""Metrics and pictures of a trained tokenizer."""
