"""Settings of a run: what they are, how they are layered, what is wrong with them. No torch."""
