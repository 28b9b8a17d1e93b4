"""Published systems, one folder or file each."""
