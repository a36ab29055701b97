"""The command line: `main` dispatches, one file per command."""
