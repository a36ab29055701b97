"""What several scorers share."""
