"""Texts written behind contexts with virtual tokens."""
