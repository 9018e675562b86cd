"""Benchmark and evaluation harness for sparse autoencoders."""

__version__ = "0.1.0"
