"""`python -m spp_export.transformers_cli`: transformers' own command line, for our layouts too."""

import runpy

runpy.run_module("spp_export.models.modeling.transformers_cli", run_name=__name__)
