"""The other end of `remote`: a small HTTP server for any of the scorers. The protocol is in `remote`'s docstring.

Every request has a thread that reads, checks and replies. In between, it waits for the thread of `queue`, which scores.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import FrameType
from typing import Any

import numpy as np
import torch

from ... import __version__
from ...settings.errors import ConfigError, one_line
from .. import Scorer, check_reward, load_scorer
from ..remote import HEAD_LIMIT, TOKEN, Oversized, Timed, is_loopback, shared_token
from .checks import MOST_PIXELS, Budget, Wanted, check_sender, parse
from .queue import Job, Queue, Refused

#: Connections that are served at the same time. As many more are refused in words, and the rest is closed at once.
MOST_CONNECTIONS = 128

#: Limits of what all requests hold together: bytes of bodies, and pixels that wait to be scored.
ALL_BYTES, ALL_PIXELS = 2**29, 2 * MOST_PIXELS

#: Seconds for a request's headers and then its body to arrive, and for its reply to be sent.
HEAD_TIMEOUT, READ_TIMEOUT, WRITE_TIMEOUT = 10.0, 60.0, 30.0

#: Seconds that a request waits while others hold the memory that it needs.
BUSY_TIMEOUT = 30.0

#: Seconds to go on reading a refused request. Closing earlier could reset the connection before the reply is read.
LINGER = 2.0

#: Seconds allowed when the server stops: for the call in progress, and for the last replies.
FINISH, FAREWELL = 60.0, 5.0


class _Http(HTTPServer):
    request_queue_size = 128
    # On Windows it would let a second server take the same address.
    allow_reuse_address = os.name != "nt"

    def __init__(self, scorers: Mapping[str, Scorer], host: str, port: int, max_images: int, max_bytes: int):
        self.scorers, self.max_images, self.max_bytes = scorers, max_images, max_bytes
        self.names: set[str] = {"localhost", host.lower()}
        self.token: str | None = None
        self.queue = Queue(scorers)
        self.bodies, self.pixels = Budget(max(ALL_BYTES, max_bytes), BUSY_TIMEOUT), Budget(ALL_PIXELS, BUSY_TIMEOUT)
        # open: requests that are being answered. served, refused: connections, each of which has a thread.
        self.changed = threading.Condition()
        self.open = self.served = self.refused = 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler, bind_and_activate=False)

    def server_bind(self) -> None:
        # HTTPServer's own method looks up the host's name, which can take long.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.changed:
            busy = self.served >= MOST_CONNECTIONS
            too_many = busy and self.refused >= MOST_CONNECTIONS
            if not too_many:
                self._count(busy, 1)
        if too_many:
            self.shutdown_request(request)
            return
        try:
            threading.Thread(target=self._work, args=(request, client_address, busy), daemon=True).start()
        except RuntimeError:
            # The system gives no further thread.
            self._count(busy, -1)
            raise

    def _work(self, request: Any, client_address: Any, busy: bool) -> None:
        try:
            _Handler(request, client_address, self, busy)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)
            self._count(busy, -1)

    def _count(self, busy: bool, change: int) -> None:
        with self.changed:
            if busy:
                self.refused += change
            else:
                self.served += change

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

    def __init__(self, request: Any, client_address: Any, server: _Http, busy: bool = False):
        """busy: whether the request is refused, because too many others are being served."""
        self.busy = busy
        super().__init__(request, client_address, server)

    def setup(self) -> None:
        super().setup()
        self.started, self.images, self.all_read = time.monotonic(), 0, False
        self.rfile.close()
        self.incoming = Timed(self.connection, LINGER if self.busy else HEAD_TIMEOUT, HEAD_LIMIT)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except Oversized:
            self.send_error(431)

    def do_GET(self) -> None:
        with self.server.changed:
            self.server.open += 1
        try:
            status, reply = 200, self.answer()
        except Refused as error:
            status, reply = error.status, {"error": one_line(error)}
        except TimeoutError:
            status, reply = 408, {"error": f"the body took more than {READ_TIMEOUT:g} s to arrive"}
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
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
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
        if self.busy:
            raise Refused(503, f"{MOST_CONNECTIONS} connections are open: try again later")
        check_sender(self.headers, self.server.names, self.server.token)
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
        length = self.length()
        with self.server.bodies.take(length):
            return {"rewards": self.compute((name or known)[0], self.body(length))}

    def length(self) -> int:
        """The size of the body in bytes."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not any(lengths):
            raise Refused(411, "give the body's size as Content-Length; it may not be chunked")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise Refused(400, "Content-Length is not a number")
        # int() itself limits the number of digits.
        if len(lengths[0]) > 18 or int(lengths[0]) > self.server.max_bytes:
            raise Refused(
                413,
                f"the body has {lengths[0]} bytes, at most {self.server.max_bytes} are allowed: send fewer images at a time",
            )
        return int(lengths[0])

    def body(self, length: int) -> Any:
        """The request's JSON."""
        self.incoming.allow(READ_TIMEOUT)
        self.incoming.most = length
        data = self.rfile.read(length)
        self.all_read = True
        if len(data) < length:
            raise Refused(400, f"the body ended after {len(data)} of {length} bytes")
        return parse(data)

    def compute(self, name: str, content: Any) -> list[float]:
        """The scores of a request's images, in their order."""
        wanted = Wanted(content, self.server.max_images)
        self.images = len(wanted.prompts)
        with self.server.pixels.take(wanted.pixels):
            return self.scores(name, wanted.decode(), wanted.prompts, wanted.metadata)

    def scores(self, name: str, images: list[np.ndarray], prompts: list[str], metadata: list[Any]) -> list[float]:
        """Queues one job for each size of the images, and waits for their scores."""
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
        return [scores[i] for i in range(len(images))]


class RewardServer:
    """Serves scorers until `stop`; `with` starts and stops it.

    The address is bound at once, so that one in use is reported before scorers are loaded. Clients wait until `start`.

    Args:
        scorers: by name. /NAME/compute is the path of each; a single one also has /compute. Read from `start` on.
        port: 0 picks a free one, which the attribute `port` gives. max_images, max_bytes: limits of a request.
        names: further names under which clients know the server, besides localhost, `host` and IP addresses.
        token: what a request must bring as `Authorization: Bearer`; None if nothing.

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
        names: Sequence[str] = (),
        token: str | None = None,
    ):
        if not 0 <= port < 2**16:
            raise ConfigError(f"--port {port}: give a number up to 65535, or 0 for any that is free")
        self._http = _Http(scorers, host, port, max_images, max_bytes)
        self._http.names |= {name.lower() for name in names}
        self._http.token = token
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
        """Stops taking requests, answers 503 to those that wait, finishes the call in progress and frees the port.

        A call that takes more than `FINISH` seconds is given up, and so are its requests.
        """
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._thread = None
            # The socket closes at once, so that no client waits for a connection that will not be answered.
            self._http.server_close()
            self._http.bodies.stop()
            self._http.pixels.stop()
            if not self._http.queue.stop(FINISH):
                log(f"stopped, although a scorer has not finished within {FINISH:g} s")
            with self._http.changed:
                self._http.changed.wait_for(lambda: self._http.open == 0, FAREWELL)
        self._http.server_close()

    def __enter__(self) -> RewardServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve(
    rewards: Sequence[str],
    host: str,
    port: int,
    device: torch.device,
    paths: Mapping[str, str],
    names: Sequence[str] = (),
) -> int:
    """Serves rewards by name until SIGTERM or Ctrl-C; a second one ends it at once. Call it in the main thread. Returns 0.

    Args:
        device, paths: the scorers', see `rewards.load_scorer`. names: the server's, see `RewardServer`.

    Raises:
        ConfigError: a reward is unknown or cannot be loaded, the address cannot be bound, or the token in the environment
            cannot be used.
    """
    for name in paths:
        if name not in rewards:
            raise ConfigError(f"--reward-models {name}=...: {name} is not among --reward {' '.join(rewards)}")
    for name in rewards:
        check_reward(name, paths.get(name))
    scorers: dict[str, Scorer] = {}
    token = shared_token()
    server = RewardServer(scorers, host, port, names=names, token=token)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    try:
        for name in rewards:
            scorers[name] = load_scorer(name, device, paths.get(name))
        if not is_loopback(host) and token is None:
            print(
                f"tmpo_trainer: warning: whoever reaches {server.url} can use it: set {TOKEN} here and for the trainer",
                file=sys.stderr,
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
