"""Measurements: each is a module run as `python -m spp_bench.<name>`, and states its machine."""
