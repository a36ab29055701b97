"""Prompt files, the lists that come with the package, generated prompts."""
