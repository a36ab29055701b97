"""ComfyUI entry point: the nodes of `nodes/`. Outside ComfyUI it does nothing."""

from importlib.util import find_spec

# ComfyUI imports this folder as a package by its path; anything else (pytest, an IDE) has no comfy_api.
if __package__ and find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    #: Named here and not in pyproject.toml, so that help pages are found whatever the folder is called.
    WEB_DIRECTORY = "./web"

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
