"""Priors: generators over the ids of a tokenizer."""
