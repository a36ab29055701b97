"""The other end of `remote`: a small HTTP server for any of the scorers. The protocol is in `remote`'s docstring.

Every request has a thread that reads, checks and replies. In between, it waits for the thread of `queue`, which scores.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ... import __version__
from ...settings.errors import ConfigError, one_line
from .. import Scorer, check_reward, load_scorer
from ..remote import Timed, is_loopback
from .queue import Job, Queue, Refused

#: Limit of the pixels in a request: 192 MiB as RGB. PNG can compress a thousandfold, so a limit in bytes is not enough.
MOST_PIXELS = 2**26

#: Seconds for a request to arrive in full, and for its reply to be sent.
READ_TIMEOUT, WRITE_TIMEOUT = 60.0, 30.0

#: Seconds to go on reading a refused request. Closing earlier could reset the connection before the reply is read.
LINGER = 2.0

#: Seconds allowed for the last replies when the server stops.
FAREWELL = 5.0

#: Pillow's modes that can become RGB without changing the picture. Grey with 16 bits would be clipped to white.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def decode(text: str, most_pixels: int) -> np.ndarray:
    """Decodes a base64 PNG to uint8 RGB `[H, W, 3]`; transparency is dropped.

    Raises:
        ValueError: the text is not a readable PNG. Refused: it has more pixels than `most_pixels`.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("not a PNG")
    # This comes before Pillow, which has a limit of its own but only warns.
    width, height = struct.unpack(">II", data[16:24])
    if width * height > most_pixels:
        raise Refused(413, f"{width} x {height} pixels: more than {MOST_PIXELS} in a request")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # Pillow would follow a second header.
            if image.size != (width, height):
                raise ValueError("two sizes")
            if image.mode not in MODES:
                raise ValueError(f"mode {image.mode}, not one of {', '.join(MODES)}")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("not a readable PNG") from None
    except Exception as error:
        # Pillow raises OSError, SyntaxError, struct.error and others for a damaged file.
        raise ValueError(f"not a readable PNG: {error}") from None


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, scorers: Mapping[str, Scorer], host: str, port: int, max_images: int, max_bytes: int):
        self.scorers, self.max_images, self.max_bytes = scorers, max_images, max_bytes
        self.queue = Queue(scorers)
        self.changed, self.open = threading.Condition(), 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler, bind_and_activate=False)

    def server_bind(self) -> None:
        # HTTPServer's own method looks up the host's name, which can take long.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log(f"connection lost: {one_line(repr(sys.exception()))}")


def log(text: str) -> None:
    """Writes a line with the time to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request, after which the connection closes."""

    server: _Http
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"tmpo_trainer/{__version__}", ""

    def setup(self) -> None:
        super().setup()
        self.started, self.images, self.all_read = time.monotonic(), 0, False
        self.rfile.close()
        self.rfile = io.BufferedReader(Timed(self.connection, READ_TIMEOUT))

    def do_GET(self) -> None:
        with self.server.changed:
            self.server.open += 1
        try:
            status, reply = 200, self.answer()
        except Refused as error:
            status, reply = error.status, {"error": one_line(error)}
        except TimeoutError:
            status, reply = 408, {"error": f"the request took more than {READ_TIMEOUT:g} s to arrive"}
        except Exception as error:
            status, reply = 500, {"error": one_line(f"{type(error).__name__}: {error}")}
        try:
            self.reply(status, reply)
        finally:
            with self.server.changed:
                self.server.open -= 1
                self.server.changed.notify_all()
        self.linger()

    do_POST = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replies to what http.server itself refuses: malformed requests, and methods without a `do_`."""
        self.reply(405 if code == 501 else code, {"error": one_line(message or self.responses[code][0])})
        self.linger()

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.connection.settimeout(WRITE_TIMEOUT)
        self.send_response(status)
        if status == 405:
            self.send_header("Allow", "GET, POST")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        what = one_line(" ".join(self.requestline.split()[:2]))
        why = f": {content['error']}" if "error" in content else ""
        log(f"{what} {status}, {self.images} images, {time.monotonic() - self.started:.2f} s{why}")

    def linger(self) -> None:
        """Reads and drops the rest of a request that was refused before it was read in full."""
        if self.all_read:
            return
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            rest, buffer = Timed(self.connection, LINGER), bytearray(2**16)
            while rest.readinto(buffer):
                pass

    def log_message(self, format: str, *args: Any) -> None:
        """`reply` has logged it."""

    def answer(self) -> dict[str, Any]:
        """The content of a 200 reply. Raises Refused."""
        path = self.path.split("?")[0]
        *name, what = path.strip("/").split("/")
        known = list(self.server.scorers)
        computes = ["/compute"] if len(known) == 1 else []
        computes += [f"/{each}/compute" for each in known]
        if what not in ("health", "compute") or (name and (len(name) > 1 or name[0] not in known)):
            raise Refused(404, f"no {path} here: there are /health, {', '.join(computes)}")
        method = "GET" if what == "health" else "POST"
        if self.command != method:
            raise Refused(405, f"{path} needs {method}")
        if what == "health":
            self.all_read = True
            return {"status": "ok", "rewards": name or known, "version": __version__}
        if not name and len(known) > 1:
            raise Refused(400, f"the server has several rewards: use {', '.join(computes)}")
        return {"rewards": self.compute((name or known)[0], self.body())}

    def body(self) -> Any:
        """The request's JSON."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise Refused(411, "give the body's size as Content-Length; it may not be chunked")
        if not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length is not a number")
        # int() itself limits the number of digits.
        if len(length) > 18 or int(length) > self.server.max_bytes:
            raise Refused(
                413,
                f"the body has {length} bytes, at most {self.server.max_bytes} are allowed: send fewer images at a time",
            )
        data = self.rfile.read(int(length))
        self.all_read = True
        if len(data) < int(length):
            raise Refused(400, f"the body ended after {len(data)} of {length} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None

    def compute(self, name: str, content: Any) -> list[float]:
        """The scores of a request's images, in their order."""
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
        if len(texts) > self.server.max_images:
            raise Refused(413, f"the request has {len(texts)} images, at most {self.server.max_images} are allowed")
        self.images = len(texts)
        left, images = MOST_PIXELS, []
        for i, text in enumerate(texts):
            try:
                images.append(decode(text, left))
            except ValueError as error:
                raise Refused(400, f"image {i}: {error}") from None
            left -= images[-1].shape[0] * images[-1].shape[1]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(image.shape, []).append(i)
        jobs = [
            Job(name, np.stack([images[i] for i in group]), [prompts[i] for i in group], [metadata[i] for i in group])
            for group in groups.values()
        ]
        for job in jobs:
            self.server.queue.add(job)
        scores = {
            i: score
            for group, job in zip(groups.values(), jobs, strict=True)
            for i, score in zip(group, job.scores.result(), strict=True)
        }
        return [scores[i] for i in range(len(texts))]


class RewardServer:
    """Serves scorers until `stop`; `with` starts and stops it.

    The address is bound at once, so that one in use is reported before scorers are loaded. Clients wait until `start`.

    Args:
        scorers: by name. /NAME/compute is the path of each; a single one also has /compute. Read from `start` on.
        port: 0 picks a free one, which the attribute `port` gives. max_images, max_bytes: limits of a request.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        host: str = "127.0.0.1",
        port: int = 0,
        max_images: int = 256,
        max_bytes: int = 2**28,
    ):
        if not 0 <= port < 2**16:
            raise ConfigError(f"--port {port}: give a number up to 65535, or 0 for any that is free")
        self._http = _Http(scorers, host, port, max_images, max_bytes)
        self._thread: threading.Thread | None = None
        try:
            self._http.server_bind()
            self._http.server_activate()
        except OSError as error:
            self._http.server_close()
            raise ConfigError(
                f"cannot serve at {host}:{port}: {error.strerror}; give another --host or --port (0: any that is free)"
            ) from None
        self.port: int = self._http.server_address[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def waiting(self) -> int:
        """The number of jobs that wait to be scored: pictures of one size from one request."""
        return self._http.queue.waiting

    def start(self) -> None:
        """Begins to answer requests, in threads."""
        self._http.queue.thread.start()
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops taking requests, finishes the call in progress, answers 503 to waiting requests and frees the port."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._thread = None
            # The socket closes at once, so that no client waits for a connection that will not be answered.
            self._http.server_close()
            self._http.queue.stop()
            with self._http.changed:
                self._http.changed.wait_for(lambda: self._http.open == 0, FAREWELL)
        self._http.server_close()

    def __enter__(self) -> RewardServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve(rewards: Sequence[str], host: str, port: int, device: torch.device, paths: Mapping[str, str]) -> int:
    """Serves rewards by name until SIGTERM or Ctrl-C; a second one ends it at once. Call it in the main thread. Returns 0.

    Args:
        device, paths: the scorers', see `rewards.load_scorer`.

    Raises:
        ConfigError: a reward is unknown or cannot be loaded, or the address cannot be bound.
    """
    for name in paths:
        if name not in rewards:
            raise ConfigError(f"--reward-models {name}=...: {name} is not among --reward {' '.join(rewards)}")
    for name in rewards:
        check_reward(name, paths.get(name))
    scorers: dict[str, Scorer] = {}
    server = RewardServer(scorers, host, port)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    try:
        for name in rewards:
            scorers[name] = load_scorer(name, device, paths.get(name))
        if not is_loopback(host):
            print(
                f"tmpo_trainer: warning: whoever reaches {server.url} can use it: there is no password", file=sys.stderr
            )
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.start()
            print(f"serving {', '.join(scorers)} at {server.url} (health: /health)", file=sys.stderr, flush=True)
            # On Windows, Ctrl-C is handled only between waits.
            while not ended.wait(0.5):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        server.stop()
    return 0
