"""Whole runs through the command line: files, resume, fine-tuning, loggers, precision, plugins."""
