"""Patterns, architectures, their cost, and how they are matched.

Nothing is imported here, so that a report reads certificates without importing torch.
"""
