"""Arguments of schemas that only newer versions of ComfyUI know, as keywords to spread: `**aliases("picker")`, `**ADVANCED`."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any

from comfy_api.latest import io

#: Hides an input behind the node's "advanced" button. ComfyUI 0.3.64 shows it as any other.
ADVANCED: dict[str, Any] = {"advanced": True} if "advanced" in signature(io.Int.Input.__init__).parameters else {}


def aliases(*words: str) -> dict[str, Any]:
    """Further words under which the page's search finds a node. ComfyUI 0.3.64 has no such argument."""
    known = "search_aliases" in {field.name for field in fields(io.Schema)}
    return {"search_aliases": list(words)} if known else {}
