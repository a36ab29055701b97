"""Training methods, one file each."""

#: Files that are no methods.
SHARED = ("base",)
