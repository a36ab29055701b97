"""What the geneval reward finds in a picture: objects with their outlines (Mask2Former), and their colours (CLIP).

GenEval's own detector is mmdet's Mask2Former with Swin-S. Here the detector is the version of the network's authors in
transformers. It has the same architecture and data but other weights, so scores differ slightly from published ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import Mask2FormerModel, Mask2FormerPreTrainedModel

from ...hub import checked_model
from ...prompts.compositional import CLASSES, COLORS
from ...settings.errors import ConfigError
from .clip import ClipTowers

#: GenEval's own templates, including their "a orange": other words would give other features.
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

#: The grey, #999, that hides everything but the object in the picture whose colour is named.
GREY = 0x99

#: Score above which an object counts at all.
THRESHOLD = 0.3

#: At most this many pairs of query and class are considered in a picture.
MOST = 100

#: Shortest and longest side of the detector's input, as in its training.
SIDES = (800, 1333)

#: Pictures in one call of the detector. Each takes about .8 GB.
BATCH = 4

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """An object in a picture."""

    name: str
    """One of CLASSES."""
    score: float
    """0..1."""
    box: Box
    """Left, top, right, bottom in pixels, y downwards; right and bottom are just outside."""
    color: str | None = None
    """One of COLORS; None if the colour was not determined."""
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Bool `[h, w]`: which pixels of the box are the object."""


class Mask2Former(Mask2FormerPreTrainedModel):
    """transformers' Mask2FormerForUniversalSegmentation without its loss, which needs scipy. The weights fit."""

    _keys_to_ignore_on_load_unexpected = ["criterion.empty_weight"]  # noqa: RUF012

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        classes: Any = config.num_labels
        self.class_predictor = torch.nn.Linear(config.hidden_dim, classes + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, 3, H, W]` -> logits of classes `[N, Q, C + 1]`, the last one for no object, and of masks `[N, Q, h, w]`."""
        output: Any = self.model(pixel_values, output_hidden_states=True)
        # The model's own last hidden state lacks the final norm.
        queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), output.masks_queries_logits[-1]


def instances(classes: Tensor, masks: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> list[Detection]:
    """The objects of one picture above THRESHOLD, most likely class first.

    As in mmdet, only the MOST likeliest pairs of query and class are considered. A pair's score is the probability of the
    class times the mean probability of the pixels that are more likely inside than outside. Outlines of objects may
    overlap. (The library's own post-processing goes through masks of 384 x 384, which makes boxes coarse.)

    Args:
        classes: logits `[Q, 81]`. masks: logits `[Q, h, w]` of the whole picture.
        seen: height and width of the detector's input. size: height and width of the picture, which boxes refer to.
    """
    chances, order = classes.softmax(-1)[:, :-1].flatten().sort(descending=True, stable=True)
    # The pixels can only lower a score, so no object is lost here.
    order = order[:MOST][chances[:MOST] > THRESHOLD]
    found = []
    for chance, index in zip(chances.tolist(), order.tolist(), strict=False):
        query, label = divmod(index, len(CLASSES))
        logits = masks[query][None, None]
        for target in (seen, size):
            logits = torch.nn.functional.interpolate(logits, target, mode="bilinear", align_corners=False)
        logits = logits[0, 0]
        inside = logits > 0
        if not inside.any():
            continue
        score = chance * logits.sigmoid()[inside].mean().item()
        if score <= THRESHOLD:
            continue
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        mask = inside[top:bottom, left:right].cpu().numpy()
        found.append(Detection(CLASSES[label], score, (left, top, right, bottom), mask=mask))
    return found


class Detector:
    """Finds objects, in float32 on any device. Keeps the result of the last call and reuses it for the same pictures.

    Args:
        sides: shortest and longest side, in pixels, to which pictures are resized. batch: pictures per call.
    """

    def __init__(self, network: Mask2Former, device: torch.device, sides: tuple[int, int] = SIDES, batch: int = BATCH):
        self.network: Any = network.eval().requires_grad_(False)
        self.batch = batch
        # Sides become multiples of 32, so no padding is needed.
        self._processor = Mask2FormerImageProcessorPil(size={"shortest_edge": sides[0], "longest_edge": sides[1]})
        self._last: tuple[bytes, list[list[Detection]]] | None = None
        self.to(device)

    def to(self, device: torch.device) -> None:
        self.device = device
        self.network.to(device)

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """The objects of every picture, uint8 RGB `[N, H, W, 3]`. Raises ValueError if an output is not finite."""
        key = hashlib.sha256(np.ascontiguousarray(images).data)
        key.update(repr(images.shape).encode())
        if self._last is None or self._last[0] != key.digest():
            found = [
                objects
                for first in range(0, len(images), self.batch)
                for objects in self._look(images[first : first + self.batch], first)
            ]
            self._last = (key.digest(), found)
        return self._last[1]

    @torch.no_grad()
    def _look(self, images: np.ndarray, first: int) -> list[list[Detection]]:
        pixels = self._processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
        classes, masks = self.network(pixels.to(self.device))
        for i in range(len(images)):
            if not (classes[i].isfinite().all() and masks[i].isfinite().all()):
                raise ValueError(f"the detector of geneval gave no finite numbers for image {first + i}")
        seen, size = (int(pixels.shape[2]), int(pixels.shape[3])), (images.shape[1], images.shape[2])
        return [instances(classes[i], masks[i], seen, size) for i in range(len(images))]


def cut(image: np.ndarray, item: Detection) -> np.ndarray:
    """The box of an object in a picture `[H, W, 3]`: uint8 `[h, w, 3]`, grey outside the object's outline."""
    assert item.mask is not None
    left, top, right, bottom = (int(edge) for edge in item.box)
    return np.where(item.mask[..., None], image[top:bottom, left:right], np.uint8(GREY))


class ColorClassifier:
    """Names the colour of objects, zero-shot: the nearest of COLORS, each the mean of its TEMPLATES' features.

    Args:
        towers: CLIP's. GenEval uses OpenAI's ViT-L/14.
    """

    def __init__(self, towers: ClipTowers):
        self.towers = towers

    def to(self, device: torch.device) -> None:
        self.towers.to(device)

    def colors(self, cuts: Sequence[np.ndarray], names: Sequence[str]) -> list[str]:
        """One of COLORS for every cut-out, uint8 RGB `[h, w, 3]` of any size, of an object of the class in `names`.

        Raises:
            ValueError: CLIP's features are not finite.
        """
        if not cuts:
            return []
        pictures: Any = list(cuts)
        features = self.towers.image_features(pictures)
        scores = torch.stack([self._means(name) @ feature for name, feature in zip(names, features, strict=True)])
        if not scores.isfinite().all():
            raise ValueError("the colour classifier of geneval gave no finite numbers")
        return [COLORS[int(index)] for index in scores.argmax(1)]

    def _means(self, name: str) -> Tensor:
        """Unit vectors `[10, D]` of the colours of a class."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        features = self.towers.text_features(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
        return torch.nn.functional.normalize(features.mean(1), dim=-1)


def load_detector(folder: Path, device: torch.device) -> Detector:
    """The detector in a folder with transformers' Mask2Former for COCO. Raises ConfigError if the folder has none."""
    network = checked_model(Mask2Former, "reward geneval", folder, dtype=torch.float32)
    if network.config.num_labels != len(CLASSES):
        raise ConfigError(
            f"reward geneval: {folder} has {network.config.num_labels} classes, not COCO's {len(CLASSES)}: "
            "use facebook/mask2former-swin-small-coco-instance"
        )
    return Detector(network, device)
