"""The export step beside Torch-Pruning and a plain transformers script, given the same plans:

`python -m spp_campaigns.peers [--json FILE] [--only NAME]`.

Every export, every load of its result and every reference is a fresh process with a time limit.
What fails is a row with its error. Needs transformers, and torch-pruning for its own rows. Linux
only, where /proc tells how much memory a process had.
"""
