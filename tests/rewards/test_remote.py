"""A remote reward against servers that hang, give wrong replies or stop, over real sockets of this machine."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tmpo_trainer.rewards import load_scorer, remote, score_all, state
from tmpo_trainer.rewards.remote import RemoteError, RemoteScorer
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")
#: Bytes to send, or what is done with a connection whose request has been read.
Reply = bytes | Callable[[socket.socket], None]


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Noise, uint8 `[count, 8, 12, 3]`."""
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)


def http(content: Any, status: str = "200 OK", headers: str = "") -> bytes:
    """A complete reply. Content that is not bytes becomes JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def chunked(*pieces: bytes) -> bytes:
    """The body of a chunked reply, with its end."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


FINE = http({"rewards": [0.5, 2]})
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Fake:
    """A server that gives its replies one after the other, the last one for ever, and keeps what it was asked."""

    def __init__(self, replies: Sequence[Reply], tls: ssl.SSLContext | None = None):
        self.replies: list[Reply] = list(replies)
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.lock = threading.Lock()
        fake = self

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                if tls is not None:
                    self.request = tls.wrap_socket(self.request, server_side=True)
                super().setup()

            def handle(self) -> None:
                line = self.rfile.readline().decode()
                headers = {}
                while header := self.rfile.readline().decode().strip():
                    key, value = header.split(":", 1)
                    headers[key.lower()] = value.strip()
                body = self.rfile.read(int(headers.get("content-length", 0)))
                with fake.lock:
                    fake.asked.append((line.strip(), headers, json.loads(body) if body else None))
                    reply = fake.replies.pop(0) if len(fake.replies) > 1 else fake.replies[0]
                with suppress(OSError):
                    if isinstance(reply, bytes):
                        self.wfile.write(reply)
                    else:
                        reply(self.connection)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client may leave at any time."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fake]]:
    """`fake(*replies)`. Tries follow each other at once."""
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    fakes: list[Fake] = []

    def make(*replies: Reply) -> Fake:
        fakes.append(Fake(replies))
        return fakes[-1]

    yield make
    for each in fakes:
        each.close()


def ask(url: str, timeout: float = 5.0) -> list[float]:
    """The scores of two pictures."""
    return RemoteScorer(url, timeout=timeout).score(pictures(2), ["a", "b"]).tolist()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# What is asked and what comes back


def test_the_request_is_the_protocol_and_the_scores_are_float32(fake):
    server, images = fake(FINE), pictures(2)
    scores = RemoteScorer(server.url).score(images, ["a", "b"], [{"tag": "counting"}, None])
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    assert scores.tolist() == [0.5, 2.0]
    ((line, headers, body),) = server.asked
    assert line == "POST /compute HTTP/1.1"
    assert headers["host"] == server.url.removeprefix("http://")
    assert headers["content-type"] == "application/json"
    assert body.keys() == {"images", "prompts", "metadata"}
    assert body["prompts"] == ["a", "b"]
    assert body["metadata"] == [{"tag": "counting"}, None]
    for text, image in zip(body["images"], images, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text))) as read:
            assert read.format == "PNG"
            assert np.array_equal(np.asarray(read), image)


def test_a_url_with_a_path_and_without_metadata(fake):
    server = fake(FINE)
    RemoteScorer(server.url + "/ocr/").score(pictures(2), ["a", "b"])
    assert server.asked[0][0] == "POST /ocr/compute HTTP/1.1"
    assert server.asked[0][2]["metadata"] == [None, None]


def count_rewards(fake: Callable[..., Fake]) -> Fake:
    """A server whose replies have as many rewards as it was asked for: 0, 1, 2, ..., counted over all requests."""
    server = fake(b"")

    def reply(connection: socket.socket) -> None:
        *before, asked = (len(body["images"]) for _, _, body in server.asked)
        connection.sendall(http({"rewards": list(range(sum(before), sum(before) + asked))}))

    server.replies = [reply]
    return server


def test_many_pictures_go_in_requests_of_32_in_order(fake):
    server, images = count_rewards(fake), pictures(70)
    prompts = [f"prompt {i}" for i in range(70)]
    assert RemoteScorer(server.url).score(images, prompts, list(range(70))).tolist() == list(range(70))
    assert [len(body["images"]) for _, _, body in server.asked] == [32, 32, 6]
    assert [prompt for _, _, body in server.asked for prompt in body["prompts"]] == prompts
    assert [about for _, _, body in server.asked for about in body["metadata"]] == list(range(70))
    sent = [base64.b64decode(text) for _, _, body in server.asked for text in body["images"]]
    np.testing.assert_array_equal([np.asarray(Image.open(io.BytesIO(data))) for data in sent], images)


def test_large_pictures_go_in_smaller_requests(fake, monkeypatch):
    monkeypatch.setattr(remote, "MOST_PIXELS", 2 * 8 * 12)
    server = count_rewards(fake)
    assert RemoteScorer(server.url).score(pictures(5), list("abcde")).tolist() == [0, 1, 2, 3, 4]
    assert [len(body["images"]) for _, _, body in server.asked] == [2, 2, 1]


def test_no_pictures_no_request(fake):
    server = fake(FINE)
    scores = RemoteScorer(server.url).score(pictures(0), [])
    assert scores.shape == (0,)
    assert scores.dtype == torch.float32
    assert server.asked == []


@pytest.mark.parametrize(
    ("images", "prompts", "metadata"),
    [
        (pictures(2), ["a"], None),
        (pictures(2), ["a", "b"], [None]),
        (pictures(2).astype(np.float32), ["a", "b"], None),
        (pictures(2)[..., 0], ["a", "b"], None),
        (pictures(2), ["a", "b"], [None, object()]),
        (pictures(2), ["a", "b"], [None, float("nan")]),
    ],
    ids=["prompts", "metadata", "float", "grey", "not JSON", "NaN"],
)
def test_arguments_that_do_not_fit_are_not_sent(fake, images, prompts, metadata):
    server = fake(FINE)
    with pytest.raises(ValueError):
        RemoteScorer(server.url).score(images, prompts, metadata)
    assert server.asked == []


def test_two_servers_are_asked_at_the_same_time(fake):
    both = threading.Barrier(2, timeout=5)

    def reply(connection: socket.socket) -> None:
        both.wait()
        connection.sendall(FINE)

    pairs = [(name, RemoteScorer(fake(reply).url, name=name)) for name in ("remote-a", "remote-b")]
    scores = score_all(pairs, pictures(2), ["a", "b"], None)
    assert {name: values.tolist() for name, values in scores.items()} == {"remote-a": [0.5, 2], "remote-b": [0.5, 2]}


def test_chunked_replies_and_those_that_end_with_the_connection_are_read(fake):
    body = json.dumps({"rewards": [0.5, 2]}).encode()
    assert ask(fake(CHUNKED + chunked(body[:5], body[5:])).url) == [0.5, 2]
    assert ask(fake(b"HTTP/1.0 200 OK\r\n\r\n" + body).url) == [0.5, 2]


# Replies that are no scores


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ({"rewards": [1.0]}, "1 rewards for 2 images"),
        ({"rewards": [1.0, 2.0, 3.0]}, "3 rewards for 2 images"),
        ({"rewards": []}, "0 rewards for 2 images"),
        (b'{"rewards": [1, NaN]}', "the reward of image 1 is NaN, not a finite number"),
        (b'{"rewards": [Infinity, 1]}', "the reward of image 0 is Infinity,"),
        (b'{"rewards": [1, -Infinity]}', "image 1 is -Infinity,"),
        (b'{"rewards": [1, 1e999]}', "image 1 is Infinity,"),
        (b'{"rewards": [1, 1e39]}', "image 1 is 1e[+]39,"),
        (b'{"rewards": [1, 1%s]}' % (b"0" * 400), "image 1 is 10000"),
        ({"rewards": [1, None]}, "image 1 is null,"),
        ({"rewards": [True, 1]}, "image 0 is true,"),
        ({"rewards": [1, "1"]}, 'image 1 is "1",'),
        ({"rewards": [1, [1]]}, "image 1 is a list,"),
        (b'{"rewards": [1, %s1%s]}' % (b"[" * 900, b"]" * 900), "image 1 is a list,|not JSON"),
        ({"rewards": [1, {"a": 1}]}, "image 1 is an object,"),
        (b'{"rewards": [1, 2], "rewards": [3, 4]}', "not JSON"),
        ({"rewards": "12"}, 'no list "rewards"'),
        ({"rewards": {"0": 1, "1": 2}}, 'no list "rewards"'),
        ({"reward": [1, 2]}, 'no list "rewards"'),
        ([1, 2], 'no list "rewards"'),
        (b"", "not JSON"),
        (b"fine", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"rewards": [1%s, 1]}' % (b"0" * 5000), "not JSON"),
        (b'{"rewards": [1, 2]} {}', "not JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_finite_number_per_picture_is_an_error(fake, reply, cause):
    server = fake(http(reply))
    with pytest.raises(RemoteError, match=cause) as caught:
        ask(server.url)
    assert str(caught.value).startswith(f"reward remote at {server.url}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450
    assert len(server.asked) == 1


def test_the_picture_at_fault_is_counted_over_all_requests(fake):
    server = fake(http({"rewards": [1] * 32}), http({"rewards": [1, None]}))
    with pytest.raises(RemoteError, match="the reward of image 33 is null"):
        RemoteScorer(server.url).score(pictures(34), [""] * 34)


class Boom:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_opened(fake, tmp_path):
    server = fake(http(pickle.dumps(Boom(tmp_path / "opened")), headers="Content-Type: application/x-pickle\r\n"))
    with pytest.raises(RemoteError, match="not JSON"):
        ask(server.url)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (CHUNKED + b"3b9aca00\r\n", b" "),
        (CHUNKED, b"1;" + b"x" * 1000 + b"\r\n \r\n"),
        (CHUNKED + b"0\r\n", b"x: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["declared", "undeclared", "chunked", "chunk extensions", "trailers", "continue"],
)
def test_a_reply_that_is_too_large_is_not_read(fake, start, piece):
    def reply(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(piece * (2**16 // len(piece)))

    server, began = fake(reply), time.monotonic()
    with pytest.raises(RemoteError, match=f"more than {2**20 + 2 * 256}"):
        ask(server.url)
    assert time.monotonic() - began < 4
    assert len(server.asked) == 1


def test_the_largest_reply_depends_on_the_number_of_pictures(fake, monkeypatch):
    monkeypatch.setattr(remote, "REPLY_LIMIT", 0)
    for size, fits in ((2 * 256, True), (2 * 256 + 1, False)):
        body = json.dumps({"rewards": [0.5, 2]}).encode().ljust(size)
        for reply in (http(body), CHUNKED + chunked(body)):
            if fits:
                assert ask(fake(reply).url) == [0.5, 2]
            else:
                with pytest.raises(RemoteError, match="more than 512"):
                    ask(fake(reply).url)


@pytest.mark.parametrize(
    ("headers", "cause"),
    [
        ("Content-Length: 23\r\nContent-Length: 23", "its length is stated twice"),
        ("Content-Length: 23\r\nTransfer-Encoding: chunked", "its length is stated twice"),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "its length is stated twice"),
        ("Content-Length: -23", "its Content-Length is not a number"),
        ("Content-Length: +23", "its Content-Length is not a number"),
        ("Content-Length: 23, 23", "its Content-Length is not a number"),
        ("Content-Length: 2_3", "its Content-Length is not a number"),
        ("Transfer-Encoding: gzip, chunked", "its Transfer-Encoding is not chunked"),
    ],
)
def test_a_reply_states_its_length_in_one_way(fake, headers, cause):
    server = fake(f'HTTP/1.1 200 OK\r\n{headers}\r\n\r\n{{"rewards": [0.5, 2.0]}}\n'.encode())
    with pytest.raises(RemoteError, match=f"the reply is not HTTP: {cause}$"):
        ask(server.url)
    assert len(server.asked) == 1


@pytest.mark.parametrize("size", [b"-5", b"-1", b"zz", b"1_0"])
def test_sizes_of_chunks_that_are_none(fake, size):
    with pytest.raises(RemoteError):
        ask(fake(CHUNKED + size + b"\r\n" + FINE).url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(fake, status):
    target = fake(FINE)
    server = fake(http(b"", f"{status} Moved", f"Location: {target.url}/compute\r\n"))
    with pytest.raises(RemoteError, match=f"replied {status}: redirects are not followed$"):
        ask(server.url)
    assert target.asked == []
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [201, 400, 404, 413, 429, 500, 501])
def test_other_statuses_are_errors_after_one_try_with_the_servers_words(fake, status):
    server = fake(http({"error": "ocr: no \x1b[31mtarget\n" + "x" * 300, "rewards": [1, 2]}, f"{status} Text"), FINE)
    with pytest.raises(RemoteError, match=rf"replied {status}: ocr: no \[31mtarget x+\.\.\.$") as caught:
        ask(server.url)
    assert len(server.asked) == 1
    assert str(caught.value).isprintable()
    assert len(str(caught.value).split(f"replied {status}: ")[1]) == 300


@pytest.mark.parametrize("body", [b"<html>", b'{"error": 1}', b"[]", b"[" * 200_000])
def test_an_error_without_words_is_named_by_its_status(fake, body):
    with pytest.raises(RemoteError, match=r"replied 500$"):
        ask(fake(http(body, "500 Text")).url)


def test_a_reply_to_a_request_that_was_not_read_is_heard():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(http({"error": "too large"}, "413 Text"))

        thread = threading.Thread(target=refuse)
        thread.start()
        images = np.random.default_rng(0).integers(0, 256, (4, 1024, 1024, 3), dtype=np.uint8)
        with pytest.raises(RemoteError, match=r"replied 413: too large$"):
            RemoteScorer(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=5).score(images, [""] * 4)
        thread.join()


def test_what_is_not_http_is_an_error_after_one_try(fake):
    server = fake(b"220 mail.example.com ESMTP\r\n")
    with pytest.raises(RemoteError, match="the reply is not HTTP"):
        ask(server.url)
    assert len(server.asked) == 1


# Tries


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_busy_server_is_asked_again(fake, status):
    busy = http({"error": "loading"}, f"{status} Busy")
    server = fake(busy, busy, FINE)
    assert ask(server.url) == [0.5, 2]
    assert len(server.asked) == 3
    assert server.asked[0][2] == server.asked[2][2]


def test_a_server_busy_for_ever_is_an_error(fake):
    server = fake(http({"error": "loading"}, "503 Busy"))
    with pytest.raises(RemoteError, match=r"replied 503: loading \(4 tries\)$"):
        ask(server.url)
    assert len(server.asked) == 4


def reset(connection: socket.socket) -> None:
    """Closes with RST in place of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize(
    "reply", [b"", FINE[:-3], FINE[:20], CHUNKED + b"10\r\n{", reset], ids=["nothing", "body", "head", "chunk", "reset"]
)
def test_a_connection_that_closes_early_is_tried_again(fake, reply):
    assert ask(fake(reply, FINE).url) == [0.5, 2]
    server = fake(reply)
    with pytest.raises(RemoteError, match=r"(closed|reset).* \(4 tries\)$"):
        ask(server.url)
    assert len(server.asked) == 4


def test_a_server_that_is_down_is_tried_with_growing_pauses(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    with pytest.raises(RemoteError, match=r"Connection refused \(5 tries\)$"):
        ask(f"http://127.0.0.1:{free_port()}")
    assert waited == [0, *remote.PAUSES]
    assert list(remote.PAUSES) == sorted(set(remote.PAUSES))


def test_a_server_that_does_not_take_the_connection(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT", 0.2)
    # Connections beyond the backlog stay unanswered.
    with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (one, two):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"cannot connect within 0.2 s \(2 tries\)$"):
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - began < 2


# Time


def slow(connection: socket.socket) -> None:
    time.sleep(4)
    connection.sendall(FINE)


def drip(start: bytes) -> Callable[[socket.socket], None]:
    """A reply that goes on for ten seconds, with never more than a twentieth without a byte."""

    def reply(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(200):
            time.sleep(0.05)
            connection.sendall(b" ")

    return reply


@pytest.mark.parametrize(
    "reply",
    [
        slow,
        drip(b""),
        drip(b"HTTP/1.1 200 OK\r\nX: "),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\n\r\n"),
        drip(CHUNKED + b"100\r\n"),
        drip(b"HTTP/1.1 500 Text\r\nContent-Length: 500\r\n\r\n"),
    ],
    ids=["slow", "status line", "header", "body", "endless body", "chunk", "error"],
)
def test_the_whole_reply_has_a_deadline(fake, reply):
    server, began = fake(reply), time.monotonic()
    with pytest.raises(RemoteError, match=r"no complete reply within 0.3 s$|replied 500$"):
        ask(server.url, timeout=0.3)
    assert time.monotonic() - began < 2
    assert len(server.asked) == 1


def test_so_has_sending():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []
        stop = threading.Event()

        def take_slowly() -> None:
            connection, _ = listener.accept()
            taken.append(connection)
            while not stop.wait(0.02):
                connection.recv(2**12)

        thread = threading.Thread(target=take_slowly)
        thread.start()
        began = time.monotonic()
        # More than the buffers of two sockets hold.
        images = np.random.default_rng(0).integers(0, 256, (4, 1024, 1024, 3), dtype=np.uint8)
        with pytest.raises(RemoteError, match=r"no complete reply within 0.3 s$"):
            RemoteScorer(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3).score(images, [""] * 4)
        assert time.monotonic() - began < 3
        stop.set()
        thread.join()
        taken[0].close()


# Whom it asks


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "127.0.0.1:18085",
        "localhost",
        "http://",
        "http:///compute",
        "",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX: y",
        "http://127.0.0.1?key=1",
        "http://127.0.0.1/#part",
        "http://[::1",
        "http://a..b",
    ],
)
def test_urls_that_are_refused(url):
    with pytest.raises(ConfigError) as caught:
        RemoteScorer(url, hosts=["127.0.0.1", "etc"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1", "http://me@127.0.0.1", "http://me:secret@127.0.0.1:port"]
)
def test_credentials_are_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match="user name or password") as caught:
        RemoteScorer(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "10.0.0.1",
        "128.0.0.1",
        "0.0.0.0",
        "[::2]",
        "[::ffff:10.0.0.1]",
        "localhost.example.com",
        "127.0.0.1.example.com",
        "127.1",
        "2130706433",
    ],
)
def test_other_hosts_must_be_allowed_by_name(host):
    name = host.strip("[]")
    with pytest.raises(ConfigError, match=re.escape(f"--remote-hosts {name}")):
        RemoteScorer(f"http://{host}:18085", hosts=["other.example.com"])
    RemoteScorer(f"http://{host}:18085", hosts=["other.example.com", name])
    RemoteScorer(f"https://{host.upper()}", hosts=[host.upper()])


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.255.0.9", "[::1]"])
def test_this_machine_is_always_allowed(host):
    RemoteScorer(f"http://{host}:18085")


def test_a_name_is_resolved(fake):
    server = fake(FINE)
    assert ask(server.url.replace("127.0.0.1", "localhost")) == [0.5, 2]


def test_proxies_of_the_environment_are_not_used(fake, monkeypatch):
    proxy, server = fake(FINE), fake(FINE)
    for key in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(key, proxy.url)
    for key in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(key, raising=False)
    ask(server.url)
    assert proxy.asked == []
    assert len(server.asked) == 1


def test_the_token_goes_to_the_server_and_nowhere_else(fake, monkeypatch):
    monkeypatch.setenv("TMPO_REWARD_TOKEN", "open-sesame")
    target = fake(FINE)
    server = fake(http(b"", "307 Moved", f"Location: {target.url}/compute\r\n"))
    with pytest.raises(RemoteError, match="redirects are not followed") as caught:
        ask(server.url)
    assert server.asked[0][1]["authorization"] == "Bearer open-sesame"
    assert target.asked == [] and "sesame" not in str(caught.value)
    monkeypatch.setenv("TMPO_REWARD_TOKEN", "open\r\nX: sesame")
    with pytest.raises(ConfigError, match=r"^TMPO_REWARD_TOKEN must be printable ASCII without spaces or line ends$"):
        RemoteScorer(server.url)
    monkeypatch.delenv("TMPO_REWARD_TOKEN")
    assert ask(target.url) == [0.5, 2] and "authorization" not in target.asked[0][1]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_https_wants_a_certificate_that_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server = Fake([FINE], context)
    try:
        port = server.server.server_address[1]
        with pytest.raises(RemoteError, match="certificate verify failed") as caught:
            ask(f"https://localhost:{port}")
        assert "tries" not in str(caught.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
        assert ask(f"https://localhost:{port}") == [0.5, 2]
        with pytest.raises(RemoteError, match=r"certificate verify failed.*127\.0\.0\.1"):
            ask(f"https://127.0.0.1:{port}")
        # A proxy that restarts: the connection ends without TLS's own farewell.
        server.replies = [lambda connection: connection.shutdown(socket.SHUT_RDWR), FINE]
        assert ask(f"https://localhost:{port}") == [0.5, 2]
        server.replies = [drip(b"HTTP/1.1 200 OK\r\n\r\n")]
        with pytest.raises(RemoteError, match=r"no complete reply within 0.3 s$"):
            ask(f"https://localhost:{port}", timeout=0.3)
        assert len(server.asked) == 4
    finally:
        server.close()


# Before a run


def test_load_asks_whether_the_server_is_there(fake):
    server = fake(http({"status": "ok", "rewards": ["shapes"]}), FINE)
    scorer = load_scorer("remote-b", path=server.url)
    assert scorer.name == "remote-b"
    assert server.asked[0][0] == "GET /health HTTP/1.1"
    assert scorer.score(pictures(2), ["a", "b"]).tolist() == [0.5, 2]


@pytest.mark.parametrize("health", [b"", b"OK", b"[]", b'{"rewards": ["a"]}', b'{"rewards": 3}', b"[" * 200_000])
def test_other_servers_may_say_anything_at_health(fake, health):
    remote.load(CPU, fake(http(health)).url)


def test_load_says_how_to_start_a_server_that_is_down():
    port = free_port()
    with pytest.raises(ConfigError) as caught:
        remote.load(CPU, f"http://127.0.0.1:{port}")
    assert str(caught.value) == (
        f"reward remote at http://127.0.0.1:{port}: Connection refused; is it running? To start one: "
        f"`python -m tmpo_trainer serve --reward NAME --port {port}`"
    )


def test_load_tries_once_and_takes_its_arguments(fake):
    server = fake(slow)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"reward ocr2 at .*: no complete reply within 0.2 s"):
        remote.load(CPU, server.url, remote_timeout=0.2, name="ocr2")
    assert time.monotonic() - began < 2
    for status in ("503 Busy", "500 Error", "404 Not Found"):
        server = fake(http({"error": "loading"}, status))
        with pytest.raises(ConfigError, match=f"replied {status[:3]}: loading$"):
            remote.load(CPU, server.url)
        assert len(server.asked) == 1
    with pytest.raises(ConfigError, match=r"--remote-hosts example\.com$"):
        remote.load(CPU, "http://example.com", ["example.org"])


def test_load_wants_one_of_several_rewards(fake):
    server = fake(http({"rewards": ["ocr", "shapes"]}))
    with pytest.raises(ConfigError, match=rf"hosts ocr, shapes: add one of them to the URL, as in {server.url}/ocr$"):
        remote.load(CPU, server.url)


def test_kept_evaluations_know_what_a_server_hosts(fake) -> None:
    """Not what else a server may report, such as its uptime; a server that says nothing has no state."""
    replies = [{"rewards": ["ocr"], "version": "1", "uptime": n} for n in (1, 2)] + [{"rewards": ["geneval"]}, ["ok"]]
    server = fake(*[http(reply) for reply in replies], http({"error": "no"}, "404 Not Found"))
    found = [state("remote", server.url, {"remote_timeout": 5.0, "method": "tmpo"}) for _ in range(5)]
    assert found[0] == found[1] != found[2] and None not in found[:3] and found[3:] == [None, None]
