"""A directory that transformers loads."""
