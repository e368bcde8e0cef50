"""Our ONNX builder beside others' exporters, on one slim model:

`python -m spp_campaigns.onnx_exporters SLIM_DIR [--json FILE]`.

Every export is a fresh process with a time limit. The graphs then take turns in one process,
beside the PyTorch model they came from; onnxruntime alone runs them, with the inputs that each
graph names. A failure becomes a row with its error. Needs torch, onnxruntime and onnxscript.
"""
