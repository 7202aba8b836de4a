"""Adapters that stay beside the base: read from peft's files, computed by branches in the graph, switched on by name."""
