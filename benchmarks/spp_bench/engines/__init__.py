"""Engines that `spp bench` runs: one runner per engine."""
