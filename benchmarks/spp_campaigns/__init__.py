"""What is run only in this repository, by `make`: each module is
`python -m spp_campaigns.<name>`."""
