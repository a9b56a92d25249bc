"""Smaller numbers: schemes for backends over onnxruntime, scales for those with Q/DQ pairs."""
