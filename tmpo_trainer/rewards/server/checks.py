"""What the reward server accepts: who asks, how large a request is, and which pictures it holds."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import io
import ipaddress
import json
import struct
import threading
from collections.abc import Collection, Iterator
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...pictures.reading import MOST_RATIO
from ..remote import TOKEN
from .queue import Refused

#: Limit of the pixels in a request: 192 MiB as RGB. PNG can compress a thousandfold, so a limit in bytes is not enough.
MOST_PIXELS = 2**26

#: Limit of the lists, objects and commas in a request. As Python objects, small values take twenty times their bytes.
MOST_VALUES = 2**18

#: Limit of a prompt in characters.
LONGEST_PROMPT = 2**16

#: Pillow's modes that can become RGB without changing the picture. Grey with 16 bits would be clipped to white.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


class Budget:
    """An amount of memory that the requests of a server share.

    Args:
        most: the amount. seconds: how long a request waits for its part.
    """

    def __init__(self, most: int, seconds: float):
        self._left, self._seconds, self._stopping = most, seconds, False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Holds a part, once others have given enough back. Raises Refused if that takes too long, or after `stop`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._stopping or self._left >= amount, self._seconds):
                raise Refused(503, "the server is busy: try again later")
            if self._stopping:
                raise Refused(503, "the server is stopping")
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()

    def stop(self) -> None:
        """Refuses all that wait, and all that come."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()


def check_sender(headers: Message, names: Collection[str], token: str | None) -> None:
    """Refuses what a web page in somebody's browser sends, and what lacks the token.

    Args:
        names: the server's own, in lower case. Any IP address is fine as well. token: None if none is needed.

    Raises:
        Refused: 403, 401, or 400 for a Host that is none.
    """
    if "Origin" in headers:
        raise Refused(403, "requests from web pages are refused (the request has the header Origin)")
    hosts = headers.get_all("Host", [])
    try:
        name = urlsplit(f"//{hosts[0]}").hostname or "" if hosts else None
    except ValueError:
        name = ""
    if len(hosts) > 1 or name == "":
        raise Refused(400, "the request needs one valid header Host")
    # A page can give its own domain this machine's address, and then reads what the server replies. An address is no domain.
    if name is not None and name not in names and not _is_address(name):
        raise Refused(403, f"this server is not called {name}: if it is, start it with --server-names {name}")
    given = str(headers.get("Authorization", "")).encode()
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refused(401, f"wrong token or none: set {TOKEN} to the value that it has on the server")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def png_data(text: str) -> tuple[bytes, int]:
    """A base64 PNG's bytes, and the pixels that it claims. Raises ValueError for what is no PNG."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("not a PNG")
    width, height = struct.unpack(">II", data[16:24])
    # Scorers resize the shorter side to some hundred pixels.
    if max(width, height) > MOST_RATIO * min(width, height):
        raise ValueError(
            f"not a readable PNG: {width} x {height} pixels, one side is more than {MOST_RATIO} times the other"
        )
    return data, width * height


def decode(data: bytes) -> np.ndarray:
    """Decodes a PNG of `png_data` to uint8 RGB `[H, W, 3]`; transparency is dropped. Raises ValueError."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # Pillow would follow a second header.
            if image.size != struct.unpack(">II", data[16:24]):
                raise ValueError("two sizes")
            if image.mode not in MODES:
                raise ValueError(f"mode {image.mode}, not one of {', '.join(MODES)}")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("not a readable PNG") from None
    except Exception as error:
        # Pillow raises OSError, SyntaxError, struct.error and others for a damaged file.
        raise ValueError(f"not a readable PNG: {error}") from None


def parse(data: bytes) -> Any:
    """A body's JSON. Raises Refused."""
    values = sum(data.count(mark) for mark in b"[{,")
    if values > MOST_VALUES:
        raise Refused(413, f"the body has {values} values, at most {MOST_VALUES} are allowed")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None


class Wanted:
    """What a request asks to be scored.

    Args:
        content: the body's JSON. max_images: the most images.

    Attributes:
        prompts, metadata: one for each image. pixels: those of all images together.

    Raises:
        Refused: the content is no request, or it is too large.
    """

    def __init__(self, content: Any, max_images: int):
        if not isinstance(content, dict) or content.keys() - {"images", "prompts", "metadata"}:
            raise Refused(400, "the body must be an object with images, prompts and optionally metadata")
        texts, prompts = content.get("images"), content.get("prompts")
        for key, value in (("images", texts), ("prompts", prompts)):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise Refused(400, f"{key} must be a list of strings")
        assert isinstance(texts, list) and isinstance(prompts, list)
        metadata = content.get("metadata")
        if metadata is None:
            metadata = [None] * len(texts)
        if not texts or not isinstance(metadata, list) or not len(texts) == len(prompts) == len(metadata):
            raise Refused(400, "images, prompts and metadata must be lists of the same length, and not empty")
        if len(texts) > max_images:
            raise Refused(413, f"the request has {len(texts)} images, at most {max_images} are allowed")
        if any(len(prompt) > LONGEST_PROMPT for prompt in prompts):
            raise Refused(413, f"a prompt has more than {LONGEST_PROMPT} characters")
        self.prompts: list[str] = prompts
        self.metadata: list[Any] = metadata
        self.pixels = 0
        self._files: list[bytes] = []
        for i, text in enumerate(texts):
            try:
                data, pixels = png_data(text)
            except ValueError as error:
                raise Refused(400, f"image {i}: {error}") from None
            self._files.append(data)
            self.pixels += pixels
            # This comes before Pillow, which has a limit of its own but only warns.
            if self.pixels > MOST_PIXELS:
                raise Refused(413, f"more than {MOST_PIXELS} pixels in a request: send fewer images at a time")

    def decode(self) -> list[np.ndarray]:
        """The images, uint8 RGB `[H, W, 3]`. Raises Refused for a damaged one."""
        images = []
        for i, data in enumerate(self._files):
            try:
                images.append(decode(data))
            except ValueError as error:
                raise Refused(400, f"image {i}: {error}") from None
        return images
