"""Our ONNX builder beside others' exporters, on one slim model:

`python -m spp_campaigns.onnx_exporters SLIM_DIR [--json FILE]`.

Every export is a fresh process with a time limit. The graphs then run in turn in one process, by
onnxruntime alone and by the inputs each graph names, beside the PyTorch model they came from. What
fails is a row with its error. Needs torch, onnxruntime and onnxscript.
"""
