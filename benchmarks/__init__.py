"""Measurements and tools of this repository, run by `python -m benchmarks`; not part of the installed package."""
