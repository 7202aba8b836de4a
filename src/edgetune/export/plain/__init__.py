"""Artifacts of encoders and sequence-to-sequence models, for plain ONNX Runtime."""
