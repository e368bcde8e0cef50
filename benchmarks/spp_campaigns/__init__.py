"""What only the repository runs, by `make`: each module is `python -m spp_campaigns.<name>`."""
