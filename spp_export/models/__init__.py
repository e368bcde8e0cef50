"""The dense model: its shape, its family's record, its files, how it is loaded and run.

Nothing here knows of scenarios or plans.
"""
