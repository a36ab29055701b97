"""Pictures of pictures."""
