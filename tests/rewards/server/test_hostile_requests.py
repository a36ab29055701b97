"""Requests that a client may send by mistake or on purpose: each gets a 4xx or 5xx, or scores, and the server lives on.

FUZZ=5000 in the environment tries that many.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tmpo_trainer.rewards.remote import RemoteScorer
from tmpo_trainer.rewards.server import serve
from tmpo_trainer.rewards.server.serve import RewardServer

PARTS = (
    b"\r\n", b"\n", b"\0", b":", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Host: evil.example\r\n", b"Origin: null\r\n",
    b"POST /compute HTTP/1.1\r\n", b"GET /health", b"NaN", b"null", b"[" * 2000, b"{}," * 400, b"\x1b[2J", b"\xff\xfe",
    b"x" * 70_000, b"X: y\r\n" * 120, b"\\ud800", b'"images": [],', b"1e999", b"Authorization: Bearer x\r\n",
)  # fmt: skip


class Ones:
    name = "ones"

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        return torch.ones(len(images))


def sound() -> list[bytes]:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(buffer, "PNG")
    body = {
        "images": [base64.b64encode(buffer.getvalue()).decode()] * 2,
        "prompts": ["a", "b"],
        "metadata": [None, {"k": [1]}],
    }
    data = json.dumps(body).encode()
    head = b"POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return [head % len(data) + data, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"]


def changed(mutate: Any, generator: random.Random, data: bytes) -> bytes:
    """A request with another head or body; in half of the cases its Content-Length fits the body."""
    head, _, body = data.partition(b"\r\n\r\n")
    if body and generator.random() < 0.6:
        body = mutate(generator, body, PARTS)
    else:
        head = mutate(generator, head, PARTS)
    if generator.random() < 0.5:
        head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setattr(serve, "LINGER", 0.1)
    monkeypatch.setattr(serve, "HEAD_TIMEOUT", 1.0)
    monkeypatch.setattr(serve, "READ_TIMEOUT", 1.0)
    with RewardServer({"ones": Ones()}, max_bytes=2**20) as server:
        yield server


def reply_to(server: RewardServer, data: bytes, close: bool) -> bytes:
    """Sends bytes, and perhaps no more after that; everything that comes back."""
    found = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if close:
                connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(2**16):
            found += piece
    return found


def test_mutations(server: RewardServer, mutate: Any, capfd: pytest.CaptureFixture[str]) -> None:
    generator, requests = random.Random(1), sound()
    threads = threading.active_count()
    for request in requests:
        assert reply_to(server, request, False).startswith(b"HTTP/1.1 200 ")
    for i in range(int(os.environ.get("FUZZ", "100"))):
        # Most clients end their request; the others make the server wait.
        data, close = changed(mutate, generator, requests[i % 5 == 4]), generator.random() < 0.97
        began = time.monotonic()
        reply = reply_to(server, data, close)
        assert time.monotonic() - began < 10
        # A reply of HTTP/0.9 has no head, and a request that ends in its head has no reply.
        last = reply.rpartition(b"\r\n\r\n")[2]
        if last:
            content = json.loads(last)
            assert content.keys() in ({"rewards"}, {"error"}, {"status", "rewards", "version"})
            assert "error" not in content or content["error"].isprintable()
            assert not re.match(rb"HTTP/1.1 5(?!0[135])", reply), reply
            assert not reply.startswith(b"HTTP/1.1 500"), (data, reply)
    assert RemoteScorer(server.url).score(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"]).tolist() == [1, 1]
    end = time.monotonic() + 30
    while threading.active_count() > threads:
        assert time.monotonic() < end
        time.sleep(0.01)
    log = capfd.readouterr().err
    assert "Traceback" not in log and all(line.isprintable() for line in log.splitlines())


@pytest.mark.parametrize("depth", [100, 900, 960, 980, 990, 1000, 10_000])
def test_nesting(server: RewardServer, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    for body in (
        nested,
        b'{"images": %s, "prompts": []}' % nested,
        b'{"images": [""], "prompts": [""], "metadata": %s}' % nested,
    ):
        request = b"POST /compute HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        assert reply_to(server, request, True).startswith(b"HTTP/1.1 400 ")
