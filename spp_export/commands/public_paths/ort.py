"""`spp_export.ort`: the runtime of ONNX exports, and ORTSlimForCausalLM."""

import sys

from spp_export.formats.onnx import runtime

sys.modules[__name__] = runtime
