"""Code that several scorers share."""
