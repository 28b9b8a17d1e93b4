"""What a tokenizer is judged by."""
