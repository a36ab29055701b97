"""Scorers behind HTTP: the server."""
