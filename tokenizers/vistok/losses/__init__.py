"""What a tokenizer is trained on."""
