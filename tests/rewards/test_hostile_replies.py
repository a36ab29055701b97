"""Replies that a server may send by mistake or on purpose: each gives scores or a RemoteError in one line, within its time.

FUZZ=5000 in the environment tries that many.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tmpo_trainer.rewards import remote
from tmpo_trainer.rewards.remote import RemoteError, RemoteScorer
from tmpo_trainer.settings.errors import ConfigError

PARTS = (
    b"\r\n", b"\n", b"\0", b" ", b":", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"ffffffffffffffff\r\n",
    b"-1\r\n", b"0\r\n\r\n", b"NaN", b"Infinity", b"1e999", b"true", b"null", b'"1"', b"[" * 2000, b"{" * 990, b"\x1b[2J",
    b'"rewards": [1, 2],', b"x" * 70_000, b"X: y\r\n" * 120, b"\xff\xfe", b"\\ud800",
)  # fmt: skip


def sound() -> list[bytes]:
    body = json.dumps({"rewards": [0.5, 2]}).encode()
    error = json.dumps({"error": "the scorer failed"}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:7], body[7:], b""))
    return [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks,
        b"HTTP/1.0 200 OK\r\n\r\n" + body,
        b"HTTP/1.1 500 Error\r\nContent-Length: %d\r\n\r\n" % len(error) + error,
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\n\r\n{"rewards": ["a", "b"], "status": "ok"}',
    ]


class Replier:
    """A server that sends `reply` to every request, at once or in pieces, and closes."""

    def __init__(self) -> None:
        self.reply, self.pieces = b"", 1
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.settimeout(5)
                    self.read(connection)
                    step = max(1, -(-len(self.reply) // self.pieces))
                    for first in range(0, len(self.reply), step):
                        connection.sendall(self.reply[first : first + step])
                except OSError:
                    pass

    def read(self, connection: socket.socket) -> None:
        """Reads a whole request, so that closing does not reset the connection."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(2**16) or b"\r\n\r\n"
        head, body = data.split(b"\r\n\r\n", 1)
        size = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]) if b"Content-Length: " in head else 0
        while len(body) < size:
            body += connection.recv(2**16) or b" " * size


@pytest.fixture
def replier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replier]:
    monkeypatch.setattr(remote, "PAUSES", ())
    replier = Replier()
    yield replier
    replier.listener.close()


def outcome(replier: Replier, reply: bytes) -> Any:
    """The scores, or the error's line."""
    replier.reply = reply
    images = np.zeros((2, 4, 4, 3), np.uint8)
    began = time.monotonic()
    try:
        scores = RemoteScorer(replier.url, timeout=5).score(images, ["a", "b"])
    except RemoteError as error:
        assert str(error).startswith(f"reward remote at {replier.url}: ")
        assert str(error).isprintable() and len(str(error)) < 500
        return str(error)
    finally:
        assert time.monotonic() - began < 10
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores.isfinite().all()
    return scores.tolist()


def test_mutations(replier: Replier, mutate: Any) -> None:
    generator, replies = random.Random(1), sound()
    assert [outcome(replier, reply) for reply in replies[:3]] == [[0.5, 2.0]] * 3
    for i in range(int(os.environ.get("FUZZ", "100"))):
        replier.pieces = generator.choice((1, 1, 3, 50))
        outcome(replier, mutate(generator, replies[i % len(replies)], PARTS))
        # Before a run, the same server is asked for its health.
        try:
            remote.load(torch.device("cpu"), replier.url, remote_timeout=5)
        except ConfigError as error:
            assert "\x1b" not in str(error)


@pytest.mark.parametrize("depth", [100, 900, 960, 980, 990, 1000, 10_000])
@pytest.mark.parametrize("start", ['{"rewards": [1, ', '{"rewards": ["a", ', '{"error": '])
def test_nesting(replier: Replier, start: str, depth: int) -> None:
    """Whether JSON can be read, shown and compared depends on how much of the stack is left."""
    end = "]}" if "[" in start else "}"
    body = (start + "[" * depth + "]" * depth + end).encode()
    assert isinstance(outcome(replier, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body), str)
    assert isinstance(outcome(replier, b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body), str)
    replier.reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    remote.load(torch.device("cpu"), replier.url, remote_timeout=5)
