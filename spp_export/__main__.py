"""`python -m spp_export` is `spp`, for starters of processes such as torchrun."""

from importlib import import_module

# The command line stands on a floor above.
import_module("spp_cli.main").main()
