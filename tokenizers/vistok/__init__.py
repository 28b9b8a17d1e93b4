"""vistok: an open training framework for discrete visual tokenizers."""

__version__ = "0.1.0"
