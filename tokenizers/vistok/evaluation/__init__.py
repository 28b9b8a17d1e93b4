"""Metrics and pictures of a trained tokenizer."""

import logging

# Where no home can be written to, matplotlib keeps its cache in a temporary folder and says so when
# it is imported. That is fine, and nothing for a user to act on.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
