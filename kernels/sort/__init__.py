"""Stable sort along one dimension, on the GPU: for compiled graphs that sort."""
