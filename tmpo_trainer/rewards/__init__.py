"""Scorers: what turns a picture and its prompt into a reward."""
