"""edgetune: from a pretrained language model and a file of examples to a checked edge artifact."""

__version__ = "0.1.0"
