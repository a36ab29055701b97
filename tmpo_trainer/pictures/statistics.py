"""Statistics of single pictures: one number each, no network. Drift reports show them, and the neutral advantage fits on them.

Each function maps uint8 RGB pictures `[N, H, W, 3]`, at least 3 by 3 pixels, to float64 `[N]`. `PICTURE_STATISTICS` lists
them by name, so a new one needs only an entry there. They work picture by picture: a batch costs no more memory than one.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

#: Weights of red, green and blue in luma (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114])
#: A pixel is on an edge if luma (0..1) changes by more than this per pixel.
EDGE = 0.1
#: The part of the spectrum that counts as high: from this many cycles per pixel on. The most that a row can have is 0.5.
HIGH = 0.25
#: Levels of each colour channel in the histogram of colours.
LEVELS = 8
#: The quality of the JPEG whose size is measured.
JPEG_QUALITY = 90

PictureStatistic = Callable[[np.ndarray], np.ndarray]


def _each(images: np.ndarray, measure: Callable[[np.ndarray], float]) -> np.ndarray:
    return np.array([measure(image) for image in images], dtype=np.float64)


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` -> float64 `[H, W]` in 0..1."""
    return image @ (LUMA / 255)


def brightness(images: np.ndarray) -> np.ndarray:
    """Mean luma, in 0..1."""
    return _each(images, lambda image: luma(image).mean())


def contrast(images: np.ndarray) -> np.ndarray:
    """Standard deviation of luma over the pixels, in 0..0.5."""
    return _each(images, lambda image: luma(image).std())


def saturation(images: np.ndarray) -> np.ndarray:
    """Mean over pixels of the largest channel less the smallest (chroma), in 0..1.

    HSV divides that by the largest channel, which makes the noise of nearly black pixels count as much as pure colours.
    """
    return _each(images, lambda image: (image.max(2) - image.min(2)).mean() / 255)


def sharpness(images: np.ndarray) -> np.ndarray:
    """Variance of the Laplacian (4 neighbours, without the border) of luma in 0..1."""

    def measure(image: np.ndarray) -> float:
        light = luma(image)
        around = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:]
        return (around - 4 * light[1:-1, 1:-1]).var()

    return _each(images, measure)


def edge_density(images: np.ndarray) -> np.ndarray:
    """Share of pixels, without the border, whose gradient of luma (central differences) is longer than `EDGE`, in 0..1."""

    def measure(image: np.ndarray) -> float:
        light = luma(image)
        down, right = (light[2:, 1:-1] - light[:-2, 1:-1]) / 2, (light[1:-1, 2:] - light[1:-1, :-2]) / 2
        return (np.hypot(down, right) > EDGE).mean()

    return _each(images, measure)


def high_frequency(images: np.ndarray) -> np.ndarray:
    """Share of luma's variance that is in frequencies of at least `HIGH` cycles per pixel, in 0..1; 0 for a flat picture."""

    def measure(image: np.ndarray) -> float:
        light = luma(image)
        power = np.abs(np.fft.fft2(light - light.mean())) ** 2
        down, right = np.fft.fftfreq(light.shape[0]), np.fft.fftfreq(light.shape[1])
        # Rounding leaves about 1e-32 per pixel squared in a flat picture.
        total = power.sum()
        return power[np.hypot(down[:, None], right) >= HIGH].sum() / total if total > 1e-20 * light.size**2 else 0.0

    return _each(images, measure)


def colour_entropy(images: np.ndarray) -> np.ndarray:
    """Entropy in bits of the histogram of colours, with `LEVELS` levels per channel: in 0..9."""

    def measure(image: np.ndarray) -> float:
        red, green, blue = np.moveaxis(image // (256 // LEVELS), 2, 0).astype(np.int64)
        count = np.bincount(((red * LEVELS + green) * LEVELS + blue).ravel())
        share = count[count > 0] / count.sum()
        return -(share * np.log2(share)).sum() + 0.0

    return _each(images, measure)


def file_size(images: np.ndarray) -> np.ndarray:
    """Bytes of the picture as a JPEG of quality `JPEG_QUALITY`: how much detail it has."""

    def measure(image: np.ndarray) -> float:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
        return file.tell()

    return _each(images, measure)


#: Every statistic by its name in settings and reports.
PICTURE_STATISTICS: dict[str, PictureStatistic] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "sharpness": sharpness,
    "edge_density": edge_density,
    "high_frequency": high_frequency,
    "colour_entropy": colour_entropy,
    "file_size": file_size,
}
