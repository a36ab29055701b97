"""The server that offers scorers over HTTP."""
