"""The contracts of encoders, decoders and tokenizers, and the parts that systems share."""
