"""What a checkpoint can be written as: one folder per format, one line each in the registry.

README.md shows how to add one.
"""
