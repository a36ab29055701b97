"""Statistics of single pictures and their latents that are followed from the base to the trained model, see `drift`."""

from __future__ import annotations

import numpy as np

from ..pictures.statistics import PICTURE_STATISTICS

PICTURES = ("brightness", "contrast", "saturation", "edge_density", "high_frequency", "colour_entropy")
#: Those of pictures, and the root mean square of a picture's latent.
NAMES = (*PICTURES, "latent_norm")


def measure(images: np.ndarray, latents: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The statistics of `NAMES`, float64 `[N]` each.

    Args:
        images: uint8 `[N, H, W, 3]`. latents: `[N, ...]`; without them `latent_norm` is left out.
    """
    found = {name: PICTURE_STATISTICS[name](images) for name in PICTURES}
    if latents is not None:
        found["latent_norm"] = np.sqrt(np.square(latents.reshape(len(latents), -1), dtype=np.float64).mean(1))
    return found
