"""Measuring a model on held-out prompts, and reporting it."""
