"""Weights on ONNX Runtime's integer grids: the grids, the methods that choose codes, the checkpoint and the graph."""
