"""Merge trained checkpoints into one model, and federate the adaptation of a model, on one engine."""

__version__ = "0.1.0"
