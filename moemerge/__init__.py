"""Consolidate the experts of several fine-tuned mixture-of-experts checkpoints into one bundle."""

__version__ = "0.1.0"
