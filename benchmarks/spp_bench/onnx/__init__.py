"""Measurements of ONNX export."""
