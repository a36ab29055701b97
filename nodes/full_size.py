"""Leaves at full resolution, for Tree View's gallery, lightbox and menu."""

from __future__ import annotations

import uuid
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: The files of a batch, as long as ComfyUI keeps it. Choosing a leaf runs the view again with the same batch.
_saved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def full_size(images: Tensor, node: type[io.ComfyNode]) -> list[dict[str, str]]:
    """Saves images `[N, H, W, C]` as temporary files with the workflow in them, as Preview Image does.

    Returns the references by which the browser asks for them. node: the running node, which knows the workflow.
    """
    if images not in _saved:
        prefix = f"tmpo_leaf_{uuid.uuid4().hex[:8]}"
        _saved[images] = list(
            ui.ImageSaveHelper.save_images(images, prefix, io.FolderType.temp, node, compress_level=1)
        )
    return _saved[images]


def with_full_size(report: dict[str, Any], images: Tensor, node: type[io.ComfyNode]) -> dict[str, Any]:
    """Tree View's report with `full` of every leaf: its picture at full resolution."""
    files = full_size(images, node)
    for leaf in report["leaves"]:
        leaf["full"] = files[leaf["index"]]
    return report
