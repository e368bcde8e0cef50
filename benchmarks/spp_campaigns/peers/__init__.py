"""The export step beside Torch-Pruning and a plain transformers script, given the same plans:

`python -m spp_campaigns.peers [--json FILE] [--only NAME]`.

Every export, every load of its result and every reference runs in a fresh process with a time
limit. A failure becomes a row with its error. Needs transformers, and torch-pruning for its own
rows. Linux only, since /proc tells how much memory a process held.
"""
