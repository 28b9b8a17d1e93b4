"""The one home of the checkpoint format."""
