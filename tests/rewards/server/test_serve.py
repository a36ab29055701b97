"""The reward server, asked over real sockets by the remote reward and by faulty or hostile clients."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tmpo_trainer import __version__
from tmpo_trainer.demo import domain
from tmpo_trainer.rewards import load_scorer, remote
from tmpo_trainer.rewards.remote import RemoteError, RemoteScorer
from tmpo_trainer.rewards.server import checks, queue, serve
from tmpo_trainer.rewards.server.serve import RewardServer
from tmpo_trainer.rewards.shapes import ShapesScorer
from tmpo_trainer.settings.errors import ConfigError


class Mean:
    """Scores a picture by its first pixel's red, in 0..255; fails as the prompt tells it to.

    calls: `(shape, prompts, metadata)` of each. It goes on only while `free` is set.
    """

    name = "mean"

    def __init__(self):
        self.calls: list[tuple[tuple[int, ...], list[str], Any]] = []
        self.begun, self.free = threading.Event(), threading.Event()
        self.free.set()

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        self.calls.append((images.shape, list(prompts), metadata))
        self.begun.set()
        assert self.free.wait(60)
        assert images.dtype == np.uint8
        scores = torch.tensor(images[:, 0, 0, 0], dtype=torch.float32)
        for i, prompt in enumerate(prompts):
            if prompt == "bad":
                raise ValueError(f"prompt {prompt!r}\nis not for me")
            if prompt == "broken":
                raise RuntimeError("out of memory")
            if prompt == "nan":
                scores[i] = torch.nan
            if prompt == "short":
                return scores[1:]
        return scores


def pictures(*reds: int, size: tuple[int, int] = (6, 4)) -> np.ndarray:
    """One picture per number, uint8 `[N, height, width, 3]`."""
    return np.stack([np.full((*size, 3), (red, 7, 9), np.uint8) for red in reds])


def png(image: Image.Image | np.ndarray, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def header_only(width: int, height: int, repeat: int = 1) -> str:
    """A PNG that claims a size; each repetition of the header claims twice the width."""
    chunks = b""
    for i in range(repeat):
        chunk = b"IHDR" + struct.pack(">IIBBBBB", width << i, height, 8, 2, 0, 0, 0)
        chunks += struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def ask(server: RewardServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and content of a reply. A body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.closing(connection):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())


def compute(server: RewardServer, images: Iterable[np.ndarray], prompts: Sequence[str], **more: Any) -> tuple[int, Any]:
    return ask(
        server, "POST", "/compute", {"images": [png(image) for image in images], "prompts": list(prompts), **more}
    )


@pytest.fixture
def mean(monkeypatch: pytest.MonkeyPatch) -> Mean:
    monkeypatch.setattr(remote, "PAUSES", ())
    monkeypatch.setattr(serve, "LINGER", 0.5)
    return Mean()


@pytest.fixture
def server(mean: Mean) -> Iterator[RewardServer]:
    with RewardServer({"mean": mean}, max_images=5, max_bytes=20_000) as server:
        yield server
        mean.free.set()


def until(condition: Callable[[], bool]) -> None:
    # Long, because a busy machine may not run a thread for seconds.
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# The remote reward and the server together


def test_the_shapes_scorer_gives_the_same_scores_from_afar():
    rng = np.random.default_rng(1)
    scenes = [domain.sample_scene(rng, family) for family in domain.FAMILIES for _ in range(8)]
    images = np.stack([domain.render(scene, rng) for scene in scenes])
    # Half the pictures belong to another prompt, so that scores differ.
    prompts = [scene.text() for scene in (*scenes[:20], *scenes[:19:-1])]
    scorer = ShapesScorer("partial")
    with RewardServer({"shapes": scorer}) as server:
        for url in (server.url, f"{server.url}/shapes"):
            far = load_scorer("remote", path=url).score(images, prompts)
            assert torch.equal(far, scorer.score(images, prompts))
        assert 0 < far.mean() < 1
        with pytest.raises(RemoteError, match=r"replied 400: shapes: .*a purple cow"):
            RemoteScorer(server.url).score(images[:1], ["a purple cow"])


def test_prompts_metadata_and_float32_arrive_as_they_were(mean, server):
    about = [{"tag": "counting", "include": [{"class": "dög", "count": 2}]}, None]
    scores = RemoteScorer(server.url).score(pictures(3, 250), ["ein Zug →", 'say "hi"'], about)
    assert scores.tolist() == [3, 250]
    RemoteScorer(server.url).score(pictures(1), ["a"], [None])
    assert mean.calls == [((2, 6, 4, 3), ["ein Zug →", 'say "hi"'], about), ((1, 6, 4, 3), ["a"], None)]


def test_float32_scores_survive(server, mean):
    exact = torch.tensor([0.1, 1 / 3, 1e-38, -3.4e38])
    mean.score = lambda images, prompts, metadata=None: exact
    assert torch.equal(RemoteScorer(server.url).score(pictures(1, 2, 3, 4), [""] * 4), exact)


def test_several_rewards_have_a_path_each(mean):
    other = Mean()
    other.score = lambda images, prompts, metadata=None: torch.full((len(images),), -1.0)
    with RewardServer({"mean": mean, "other": other}) as server:
        assert load_scorer("remote", path=f"{server.url}/mean").score(pictures(3), ["a"]).tolist() == [3]
        assert load_scorer("remote", path=f"{server.url}/other").score(pictures(3), ["a"]).tolist() == [-1]
        with pytest.raises(ConfigError, match="hosts mean, other: add one of them to the URL"):
            load_scorer("remote", path=server.url)
        with pytest.raises(ConfigError, match="replied 404: no /mena/health here: there are /health, /mean/compute, "):
            load_scorer("remote", path=f"{server.url}/mena")
        status, reply = compute(server, pictures(3), ["a"])
        assert (status, reply) == (400, {"error": "the server has several rewards: use /mean/compute, /other/compute"})
        assert ask(server, "GET", "/health")[1] == {
            "status": "ok",
            "rewards": ["mean", "other"],
            "version": __version__,
        }
        assert ask(server, "GET", "/other/health")[1]["rewards"] == ["other"]


def test_a_request_of_several_sizes_is_scored_by_size_in_its_order(mean, server):
    images = [*pictures(1, 2), *pictures(3, size=(4, 6)), *pictures(4), *pictures(5, size=(4, 6))]
    status, reply = compute(server, images, list("abcde"), metadata=list(range(5)))
    assert (status, reply) == (200, {"rewards": [1, 2, 3, 4, 5]})
    assert mean.calls == [((3, 6, 4, 3), ["a", "b", "d"], [0, 1, 3]), ((2, 4, 6, 3), ["c", "e"], [2, 4])]


# Requests at the same time


def test_requests_that_wait_share_a_call(mean, server):
    mean.free.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(compute, server, pictures(100), ["first"])
        assert mean.begun.wait(60)
        futures = [pool.submit(compute, server, pictures(2 * i, 2 * i + 1), [f"{i}", f"{i}"]) for i in range(6)]
        futures.append(pool.submit(compute, server, pictures(77, size=(2, 2)), ["small"], metadata=[{"k": 1}]))
        until(lambda: server.waiting == 7)
        # Health does not wait in the queue.
        assert ask(server, "GET", "/health")[0] == 200
        mean.free.set()
        assert first.result() == (200, {"rewards": [100]})
        assert [future.result()[1]["rewards"] for future in futures] == [[2 * i, 2 * i + 1] for i in range(6)] + [[77]]
    assert sorted(shape for shape, _, _ in mean.calls) == [(1, 2, 2, 3), (1, 6, 4, 3), (12, 6, 4, 3)]


def test_requests_with_and_without_metadata_share_a_call(mean, server):
    mean.free.clear()
    with ThreadPoolExecutor(3) as pool:
        pool.submit(compute, server, pictures(100), ["first"])
        assert mean.begun.wait(60)
        pool.submit(compute, server, pictures(1), ["without"])
        until(lambda: server.waiting == 1)
        pool.submit(compute, server, pictures(2), ["with"], metadata=[{"k": 1}])
        until(lambda: server.waiting == 2)
        mean.free.set()
    assert mean.calls[1] == ((2, 6, 4, 3), ["without", "with"], [None, {"k": 1}])


def test_a_call_has_a_largest_size_and_nobody_starves(mean, server, monkeypatch):
    monkeypatch.setattr(queue, "MOST_MERGED", 4)
    mean.free.clear()
    with ThreadPoolExecutor(8) as pool:
        pool.submit(compute, server, pictures(100), ["first"])
        assert mean.begun.wait(60)
        # 3 + 1, then 2 + 1, then 5, which is more than are merged.
        for waits, (prompt, count) in enumerate((("a", 3), ("b", 2), ("c", 5), ("d", 1), ("e", 1)), 1):
            pool.submit(compute, server, pictures(*range(count)), [prompt] * count)
            until(lambda waits=waits: server.waiting == waits)
        mean.free.set()
    assert [prompts for _, prompts, _ in mean.calls] == [["first"], [*"aaad"], [*"bbe"], [*"ccccc"]]


def test_rewards_do_not_share_calls(mean):
    other = Mean()
    with RewardServer({"mean": mean, "other": other}) as server, ThreadPoolExecutor(3) as pool:
        mean.free.clear()
        body = {"images": [png(pictures(1)[0])], "prompts": ["a"]}
        futures = [pool.submit(ask, server, "POST", "/mean/compute", body)]
        assert mean.begun.wait(60)
        futures += [pool.submit(ask, server, "POST", f"/{name}/compute", body) for name in ("mean", "other")]
        until(lambda: server.waiting == 2)
        assert other.calls == []
        mean.free.set()
        assert [future.result()[0] for future in futures] == [200] * 3
    assert (len(mean.calls), len(other.calls)) == (2, 1)


@pytest.mark.parametrize(
    ("prompt", "status", "text"),
    [
        ("bad", 400, "mean: prompt 'bad' is not for me"),
        ("broken", 500, "mean: RuntimeError: out of memory"),
        ("nan", 500, "mean: nan for an image of prompt 'nan'"),
        ("short", 500, "mean: [0] scores for 1 images"),
    ],
)
def test_only_the_request_that_caused_an_error_gets_it(mean, server, prompt, status, text):
    mean.free.clear()
    with ThreadPoolExecutor(4) as pool:
        pool.submit(compute, server, pictures(100), ["first"])
        assert mean.begun.wait(60)
        futures = []
        for red, text_of_it in ((1, "fine"), (2, prompt), (3, "fine")):
            futures.append(pool.submit(compute, server, pictures(red), [text_of_it]))
            until(lambda: server.waiting == len(futures))
        mean.free.set()
        assert futures[0].result() == (200, {"rewards": [1]})
        assert futures[1].result() == (status, {"error": text})
        assert futures[2].result() == (200, {"rewards": [3]})
    assert len(mean.calls[1][1]) == 3
    # It goes on.
    assert compute(server, pictures(4), ["fine"])[0] == 200


# What is refused


def good() -> dict[str, Any]:
    return {"images": [png(image) for image in pictures(1, 2)], "prompts": ["a", "b"], "metadata": [None, {}]}


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/", 404, "no / here: there are /health, /compute, /mean/compute"),
        ("POST", "/other/compute", 404, "no /other/compute here"),
        ("POST", "/mean/mean/compute", 404, "no /mean/mean/compute here"),
        ("POST", "/mean", 404, "no /mean here"),
        ("POST", "/\x7f\x9b31m/compute", 404, "here"),
        ("GET", "/favicon.ico", 404, "no /favicon.ico here"),
        ("GET", "/compute", 405, "/compute needs POST"),
        ("POST", "/health", 405, "/health needs GET"),
        ("PUT", "/compute", 405, "PUT"),
        ("DELETE", "/health", 405, "DELETE"),
    ],
)
def test_other_paths_and_methods(mean, server, capfd, method, path, status, text):
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 5)) as connection:
        body = json.dumps(good()).encode()
        connection.sendall(f"{method} {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status
        assert (response.headers["Allow"] == "GET, POST") == (status == 405)
        assert text in json.loads(response.read())["error"]
    assert mean.calls == []
    assert "\x9b" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        (b"", 400, "the body is not JSON"),
        (b"\x80\x04pickle.", 400, "the body is not JSON"),
        (b"[" * 15_000, 400, "the body is not JSON"),
        ([], 400, "the body must be an object"),
        ({"metdata": []}, 400, "the body must be an object with images, prompts and"),
        ({"images": None}, 400, "images must be a list of strings"),
        ({"images": [1, 2]}, 400, "images must be a list of strings"),
        ({"prompts": "ab"}, 400, "prompts must be a list of strings"),
        ({"prompts": ["a", None]}, 400, "prompts must be a list of strings"),
        ({"prompts": ["a"]}, 400, "must be lists of the same length"),
        ({"metadata": [None]}, 400, "must be lists of the same length"),
        ({"metadata": {"0": 1, "1": 2}}, 400, "must be lists of the same length"),
        ({"images": [], "prompts": [], "metadata": []}, 400, "and not empty"),
        (
            {"images": ["a"] * 6, "prompts": ["a"] * 6, "metadata": None},
            413,
            "the request has 6 images, at most 5 are allowed",
        ),
    ],
)
def test_bodies_that_are_no_request(mean, server, change, status, text):
    got, reply = ask(server, "POST", "/compute", good() | change if isinstance(change, dict) else change)
    assert (got, text in reply["error"]) == (status, True), reply
    assert mean.calls == []


@pytest.mark.parametrize(
    ("image", "status", "text"),
    [
        ("???", 400, "image 1: not base64"),
        ("Zm9v\nZm9v", 400, "image 1: not base64"),
        ("ä" * 8, 400, "image 1: not base64"),
        ("", 400, "image 1: not a PNG"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(), 400, "image 1: not a PNG"),
        (png(Image.new("P", (4, 6)), "GIF"), 400, "image 1: not a PNG"),
        (png(pictures(1)[0], "JPEG"), 400, "image 1: not a PNG"),
        (png(pictures(1)[0])[:64], 400, "image 1: not a readable PNG"),
        (header_only(4, 6, repeat=2), 400, "image 1: not a readable PNG: two sizes"),
        (header_only(0, 6), 400, "image 1: not a readable PNG"),
        (header_only(4, 600), 400, "image 1: not a readable PNG"),
        (header_only(2**16, 2**16), 413, "more than 67108864 pixels in a request"),
        (header_only(2**13, 2**13), 413, "more than 67108864 pixels in a request"),
        (header_only(2**24, 1), 400, "16777216 x 1 pixels, one side is more than 2000 times the other"),
        (png(Image.fromarray(np.full((6, 4), 300, np.uint16))), 400, "image 1: not a readable PNG: mode I;16"),
    ],
)
def test_images_that_are_refused(mean, server, image, status, text):
    got, reply = ask(server, "POST", "/compute", good() | {"images": [good()["images"][0], image]})
    assert (got, text in reply["error"]) == (status, True), reply
    assert mean.calls == []


def test_the_pixels_of_a_request_count_together(mean, server, monkeypatch):
    monkeypatch.setattr(checks, "MOST_PIXELS", 3 * 24)
    assert compute(server, pictures(1, 2, 3), "abc")[0] == 200
    assert compute(server, pictures(1, 2, 3, 4), "abcd")[0] == 413


@pytest.mark.parametrize("mode", checks.MODES)
def test_pictures_become_rgb(mean, server, mode):
    image = Image.fromarray(pictures(255)[0]).convert(mode)
    assert ask(server, "POST", "/compute", {"images": [png(image)], "prompts": ["a"]}) == (
        200,
        {"rewards": [int(np.asarray(image.convert("RGB"))[0, 0, 0])]},
    )
    assert mean.calls[0][0] == (1, 6, 4, 3)


def test_a_body_that_is_too_large_is_not_read_and_the_client_hears_why(mean, server):
    assert ask(server, "POST", "/compute", b" " * 20_000)[0] == 400
    status, reply = ask(server, "POST", "/compute", b" " * 20_001)
    assert (status, reply["error"]) == (
        413,
        "the body has 20001 bytes, at most 20000 are allowed: send fewer images at a time",
    )
    # These bodies do not fit into the sockets' buffers. The second client sends everything before it reads.
    noise = np.random.default_rng(0).integers(0, 256, (4, 1024, 1024, 3), dtype=np.uint8)
    with pytest.raises(RemoteError, match=r"replied 413: the body has \d+ bytes, at most 20000"):
        RemoteScorer(server.url).score(noise, ["a"] * 4)
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 5)) as connection:
        connection.sendall(b"POST /compute HTTP/1.1\r\nContent-Length: 16777216\r\n\r\n" + b" " * 2**24)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("", 411),
        ("Transfer-Encoding: chunked\r\n", 411),
        ("Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", 411),
        ("Content-Length: -1\r\n", 400),
        ("Content-Length: 2\r\nContent-Length: 2\r\n", 400),
        ("X: y\r\n" * 101, 431),
        (f"X: {'y' * 70_000}\r\n", 431),
        (f"X: {'y' * 60_000}\r\n" * 3, 431),
        ("Content-Length: +2\r\n", 400),
        ("Content-Length: two\r\n", 400),
        ("Content-Length: 1_0\r\n", 400),
        (f"Content-Length: {'9' * 5000}\r\n", 413),
        ("Content-Length: 999999999999\r\n", 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_without_a_proper_length(server, headers, status):
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 5)) as connection:
        connection.sendall(f"POST /compute HTTP/1.1\r\n{headers}\r\n{{}}".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status
        assert json.loads(response.read())["error"]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("nonsense with a lot of words", 400), ("GET /" + "x" * 70_000, 414), ("GET /health HTTP/9.9", 505)],
    ids=["words", "long", "version"],
)
def test_what_is_not_http_is_refused_in_json(server, request_line, status):
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 5)) as connection:
        connection.sendall(f"{request_line}\r\n\r\n".encode())
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while piece := connection.recv(2**16):
            data += piece
    assert json.loads(data[data.index(b"{") :])["error"]
    assert str(status).encode() in data.split(b"\r\n")[0] or not data.startswith(b"HTTP")
    assert b"<html" not in data.lower()


def test_a_body_that_ends_early(mean, server):
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 5)) as connection:
        connection.sendall(b"POST /compute HTTP/1.1\r\nContent-Length: 100\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, json.loads(response.read())["error"]) == (400, "the body ended after 2 of 100 bytes")


@pytest.mark.parametrize("start", [b"POST /compute HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b"POST /compute", b""])
def test_a_request_that_drips_is_cut_off(monkeypatch, server, start):
    monkeypatch.setattr(serve, "HEAD_TIMEOUT", 0.3)
    monkeypatch.setattr(serve, "READ_TIMEOUT", 0.3)
    began = time.monotonic()
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 5)) as connection:
        connection.sendall(start)
        connection.settimeout(0.05)
        data = b""
        while time.monotonic() < began + 5:
            with contextlib.suppress(TimeoutError):
                if not (piece := connection.recv(2**16)):
                    break
                data += piece
                continue
            with contextlib.suppress(OSError):
                connection.sendall(b" ")
    assert time.monotonic() - began < 3
    assert data.startswith(b"HTTP/1.1 408") or (not data and b"\r\n" not in start)


def hear(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to stderr from now on. pytest's own capture loses of a line that is written while it is read."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    return said


def test_a_client_that_leaves_disturbs_nobody(mean, server, monkeypatch):
    said = hear(monkeypatch)
    mean.free.clear()
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 5)) as connection:
        body = json.dumps(good()).encode()
        connection.sendall(b"POST /compute HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert mean.begun.wait(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    mean.free.set()
    assert compute(server, pictures(3), ["a"]) == (200, {"rewards": [3]})
    until(lambda: "connection lost" in said.getvalue())
    assert "Traceback" not in said.getvalue()


def test_one_line_is_logged_per_request(server, monkeypatch):
    said = hear(monkeypatch)
    for request, pattern in (
        (lambda: compute(server, pictures(1, 2), "ab"), r"POST /compute 200, 2 images, \d+\.\d\d s"),
        (
            lambda: compute(server, pictures(1), ["bad"]),
            r"POST /compute 400, 1 images, .* s: mean: prompt 'bad' is not for me",
        ),
        (lambda: ask(server, "GET", "/health"), r"GET /health 200, 0 images, .* s"),
        (lambda: ask(server, "GET", "/nothing"), r"GET /nothing 404, 0 images, .* s: no /nothing here.*"),
    ):
        before = len(said.getvalue())
        request()
        # The line comes after the reply, and could come after that of the next request.
        until(lambda before=before: said.getvalue()[before:].endswith("\n"))
        assert re.fullmatch(r"\d\d:\d\d:\d\d " + pattern, said.getvalue()[before:].removesuffix("\n"))


def test_a_body_of_many_small_values_is_refused(mean, monkeypatch):
    """As Python objects it would take a multiple of its bytes."""
    with RewardServer({"mean": mean}) as server:
        status, reply = ask(server, "POST", "/compute", b'{"metadata": [' + b"{}," * 2**18 + b"0]}")
    assert (status, reply["error"]) == (413, "the body has 524290 values, at most 262144 are allowed")


def test_a_long_prompt_is_refused(mean):
    with RewardServer({"mean": mean}) as server:
        assert compute(server, pictures(1), ["a" * 2**16])[0] == 200
        assert compute(server, pictures(1), ["a" * (2**16 + 1)])[0] == 413


def test_requests_wait_for_memory(mean, monkeypatch):
    """The pictures of one request fit. The second waits, the third waits too long, and the stop ends all waiting."""
    monkeypatch.setattr(serve, "ALL_PIXELS", 30)
    monkeypatch.setattr(serve, "BUSY_TIMEOUT", 1.0)
    monkeypatch.setattr(serve, "FAREWELL", 60.0)
    server = RewardServer({"mean": mean})
    server.start()
    mean.free.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(compute, server, pictures(1), ["first"])
        assert mean.begun.wait(60)
        second = pool.submit(compute, server, pictures(2), ["second"])
        assert second.result() == (503, {"error": "the server is busy: try again later"})
        server._http.pixels._seconds = 60.0
        third = pool.submit(compute, server, pictures(3), ["third"])
        time.sleep(0.1)
        assert not third.done()
        mean.free.set()
        assert (first.result()[0], third.result()) == (200, (200, {"rewards": [3]}))
        mean.free.clear()
        mean.begun.clear()
        first = pool.submit(compute, server, pictures(1), ["first"])
        assert mean.begun.wait(60)
        second = pool.submit(compute, server, pictures(2), ["second"])
        time.sleep(0.1)
        stopped = pool.submit(server.stop)
        assert second.result() == (503, {"error": "the server is stopping"})
        mean.free.set()
        assert first.result()[0] == 200
        stopped.result()


# Who may ask


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:18085", 200),
        ("LOCALHOST", 200),
        ("[::1]:18085", 200),
        # An address is not a domain that a web page could have.
        ("192.168.3.4:18085", 200),
        ("gpu.lan:18085", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:18085", 403),
        ("user@evil.example", 403),
        ("[::1", 400),
        ("", 400),
    ],
)
def test_the_name_by_which_a_client_knows_the_server(mean, host, status):
    """A web page whose domain leads here would have its domain as Host."""
    with RewardServer({"mean": mean}, names=["GPU.lan"]) as server:
        for method, path, body in (("GET", "/health", None), ("POST", "/compute", good())):
            got, reply = ask(server, method, path, body, Host=host)
            assert got == status
            name = host.rpartition("@")[2].removesuffix(":18085")
            assert status != 403 or reply["error"].endswith(f"start it with --server-names {name}")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:18085", ""])
def test_web_pages_are_refused(mean, server, origin):
    status, reply = ask(server, "POST", "/compute", good(), Origin=origin)
    assert (status, reply["error"]) == (403, "requests from web pages are refused (the request has the header Origin)")
    assert mean.calls == []


def test_a_token_is_asked_for_before_anything_is_read(mean, monkeypatch, capfd):
    with RewardServer({"mean": mean}, token="open-sesame") as server:
        for headers in (
            {},
            {"Authorization": "Bearer open-sesam"},
            {"Authorization": "Bearer öpen"},
            {"Authorization": ""},
        ):
            status, reply = ask(server, "POST", "/compute", b"not JSON", **headers)
            assert status == 401
            assert reply["error"].startswith("wrong token or none: set TMPO_REWARD_TOKEN")
        with pytest.raises(ConfigError, match="replied 401: wrong token or none: set TMPO_REWARD_TOKEN to the value"):
            load_scorer("remote", path=server.url)
        monkeypatch.setenv("TMPO_REWARD_TOKEN", "open-sesame")
        assert load_scorer("remote", path=server.url).score(pictures(3), ["a"]).tolist() == [3]
    assert "open-sesame" not in capfd.readouterr().err


def test_200_clients_at_once(mean, monkeypatch):
    """Each gets its score or a 503, and no thread is left."""
    monkeypatch.setattr(serve, "MOST_CONNECTIONS", 100)
    with RewardServer({"mean": mean}) as server:
        mean.free.clear()
        before = threading.active_count()
        body = json.dumps({"images": [png(pictures(9)[0])], "prompts": ["a"]}).encode()
        request = b"POST /compute HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(200):
                clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60)))
                clients[-1].sendall(request)
            statuses = []
            for client in (*clients[100:], *clients[:100]):
                # Those beyond the limit do not wait for the scorer.
                if len(statuses) == 100:
                    mean.free.set()
                response = http.client.HTTPResponse(client)
                response.begin()
                statuses.append(response.status)
                assert json.loads(response.read()).keys() == ({"rewards"} if response.status == 200 else {"error"})
        assert statuses == [503] * 100 + [200] * 100
        until(lambda: threading.active_count() <= before)
        assert compute(server, pictures(4), ["a"])[0] == 200


def test_idle_connections_do_not_keep_others_out(mean, monkeypatch):
    """Beyond twice the limit a connection is closed at once; after the time limit there is room again."""
    monkeypatch.setattr(serve, "MOST_CONNECTIONS", 4)
    monkeypatch.setattr(serve, "HEAD_TIMEOUT", 0.5)
    with RewardServer({"mean": mean}) as server, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
        until(lambda: server._http.served + server._http.refused == 8)
        until(lambda: server._http.served + server._http.refused == 0)
        assert compute(server, pictures(4), ["a"])[0] == 200


# Start and stop


def test_a_stop_does_not_wait_for_ever_for_a_scorer(mean, monkeypatch, capfd):
    monkeypatch.setattr(serve, "FINISH", 0.2)
    monkeypatch.setattr(serve, "FAREWELL", 0.1)
    server = RewardServer({"mean": mean})
    server.start()
    mean.free.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(compute, server, pictures(1), ["first"])
        assert mean.begun.wait(60)
        server.stop()
        assert not first.done()
        assert "stopped, although a scorer has not finished within 0.2 s" in capfd.readouterr().err
        mean.free.set()


def test_a_stop_finishes_what_is_scored_and_refuses_what_waits(mean):
    server = RewardServer({"mean": mean})
    server.start()
    mean.free.clear()
    with ThreadPoolExecutor(4) as pool, contextlib.closing(socket.create_connection(("127.0.0.1", server.port))):
        first = pool.submit(compute, server, pictures(1), ["first"])
        assert mean.begun.wait(60)
        second = pool.submit(compute, server, pictures(2), ["second"])
        until(lambda: server.waiting == 1)
        began = time.monotonic()
        stopped = pool.submit(server.stop)
        assert second.result(5) == (503, {"error": "the server is stopping"})
        with pytest.raises(ConnectionRefusedError):
            compute(server, pictures(3), ["third"])
        assert not stopped.done()
        mean.free.set()
        assert first.result(5) == (200, {"rewards": [1]})
        stopped.result(5)
        # The connection that sends nothing does not delay it.
        assert time.monotonic() - began < 2
    assert [prompts for _, prompts, _ in mean.calls] == [["first"]]
    RewardServer({}, port=server.port).stop()


def test_a_request_that_is_still_arriving_at_the_stop_is_refused(mean):
    server = RewardServer({"mean": mean})
    server.start()
    mean.free.clear()
    body = json.dumps(good()).encode()
    with (
        ThreadPoolExecutor(3) as pool,
        contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as late,
    ):
        late.sendall(b"POST /compute HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:-1])
        # Connections are accepted in order, so the late one is open once the next request is being scored.
        first = pool.submit(compute, server, pictures(1), ["first"])
        assert mean.begun.wait(60)
        second = pool.submit(compute, server, pictures(2), ["second"])
        until(lambda: server.waiting == 1)
        stopped = pool.submit(server.stop)
        assert second.result(5)[0] == 503
        late.sendall(body[-1:])
        response = http.client.HTTPResponse(late)
        response.begin()
        assert response.status == 503
        mean.free.set()
        assert first.result(5)[0] == 200
        stopped.result(5)
    assert [prompts for _, prompts, _ in mean.calls] == [["first"]]


def test_a_port_in_use(mean, server):
    cause = rf"cannot serve at 127.0.0.1:{server.port}: Address already in use; give another --host or --port \(0: "
    with pytest.raises(ConfigError, match=cause):
        RewardServer({}, port=server.port)
    # Before anything is loaded.
    with pytest.raises(ConfigError, match=cause):
        serve.serve(["pickscore"], "127.0.0.1", server.port, torch.device("cpu"), {})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((["shape"], "127.0.0.1", 0, {}), "unknown reward shape"),
        ((["shapes"], "127.0.0.1", 70000, {}), "--port 70000"),
        ((["shapes"], "127.0.0.1", -1, {}), "--port -1"),
        ((["shapes"], "no such host", 0, {}), "cannot serve at no such host:0"),
        ((["shapes"], "192.0.2.1", 0, {}), "cannot serve at 192.0.2.1:0"),
        ((["shapes"], "127.0.0.1", 0, {"ocr": "x"}), "--reward-models ocr=...: ocr is not among --reward shapes"),
        ((["remote"], "127.0.0.1", 0, {}), "reward remote needs its address"),
        ((["shapes"], "127.0.0.1", 0, {"shapes": "x"}), "shapes has no weights"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_served_is_one_line(arguments, text):
    rewards, host, port, paths = arguments
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        serve.serve(rewards, host, port, torch.device("cpu"), paths)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6(mean):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no ::1 here")
    with RewardServer({"mean": mean}, "::1") as server:
        assert server.url == f"http://[::1]:{server.port}"
        assert load_scorer("remote", path=server.url).score(pictures(3), ["a"]).tolist() == [3]


PROGRAM = """
import sys, time
import torch
from tmpo_trainer import rewards
from tmpo_trainer.rewards.server import serve

class Slow:
    name = "slow"
    def score(self, images, prompts, metadata=None):
        print("scoring", file=sys.stderr, flush=True)
        time.sleep(float(prompts[0]))
        return torch.ones(len(images))

serve.load_scorer = lambda name, device, path: Slow()
sys.exit(serve.serve(["ocr", "shapes"], sys.argv[1], 0, torch.device("cpu"), {}))
"""


class Process:
    """`serve` in a process of its own, whose scorer takes as many seconds as the prompt says."""

    def __init__(self, host: str):
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, host], stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []

    def line(self, pattern: str) -> re.Match[str]:
        """Waits for a line of stderr."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(self.lines)

    def compute(self, port: int, seconds: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection):
            body = json.dumps({"images": [png(pictures(1)[0])], "prompts": [seconds]})
            connection.request("POST", "/shapes/compute", body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())


@pytest.fixture
def process() -> Iterator[Callable[[str], Process]]:
    processes: list[Process] = []

    def start(host: str) -> Process:
        processes.append(Process(host))
        return processes[-1]

    yield start
    for each in processes:
        each.process.kill()
        each.process.communicate()


def test_signals_stop_it(process):
    # Both at once: most of the time is that of importing torch.
    gentle, hasty = process("127.0.0.1"), process("0.0.0.0")
    port = int(gentle.line(r"^serving ocr, shapes at http://127\.0\.0\.1:(\d+) \(health: /health\)$").group(1))
    assert gentle.lines[-1:] == gentle.lines
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gentle.compute, port, "0.8")
        gentle.line("^scoring$")
        second = pool.submit(gentle.compute, port, "0")
        time.sleep(0.2)
        gentle.process.send_signal(signal.SIGTERM)
        assert second.result() == (503, {"error": "the server is stopping"})
        assert first.result() == (200, {"rewards": [1.0]})
        assert gentle.process.wait(10) == 0

        port = int(hasty.line(r"^serving ocr, shapes at http://0\.0\.0\.0:(\d+) ").group(1))
        assert "can use it: set TMPO_REWARD_TOKEN" in "".join(hasty.lines)
        third = pool.submit(hasty.compute, port, "15")
        hasty.line("^scoring$")
        hasty.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert hasty.process.poll() is None
        hasty.process.send_signal(signal.SIGTERM)
        assert hasty.process.wait(5) == -signal.SIGTERM
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            third.result()
