"""A scorer behind HTTP, such as `python -m tmpo_trainer serve` offers.

`POST {url}/compute` `{"images": [base64 PNG, ...], "prompts": [...], "metadata": [...]}` ->
`{"rewards": [number, ...]}`, and `GET {url}/health`. Both directions are JSON; nothing is ever unpickled. The server is not
trusted. Only allowed hosts are asked, and redirects and proxies are not followed. A reply has a deadline and a size limit.
Anything but one finite number per picture is an error, never a score of 0.

A server that others can reach may ask for a token, which both sides take from the environment variable TMPO_REWARD_TOKEN. It is
no setting, because settings are stored with a run and flags are shown in the list of processes.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..settings.errors import ConfigError, one_line

WEIGHTS = "server"
OPTIONS = ("remote_hosts", "remote_timeout")
#: Only the server knows which prompts it can score.
default_prompts = None

#: Seconds to wait before each further try, if the server cannot be reached or reports that it is busy.
PAUSES = (1.0, 3.0, 10.0, 20.0)
UNAVAILABLE = (502, 503, 504)
#: Seconds allowed for connecting.
CONNECT_TIMEOUT = 10.0
#: Limits of one request: pictures, and their pixels, which are 128 MiB of base64 if they do not compress at all.
MOST_PICTURES, MOST_PIXELS = 32, 2**25
#: Limit of a reply in bytes: a constant, and an amount for each picture.
REPLY_LIMIT, REPLY_LIMIT_EACH = 2**20, 256
#: Limit in bytes of what surrounds the content of a message: its headers, and what chunks add.
HEAD_LIMIT = 2**17
#: The environment variable that holds the token.
TOKEN = "TMPO_REWARD_TOKEN"
FLOAT32_MAX = torch.finfo(torch.float32).max


class RemoteError(RuntimeError):
    """A remote scorer gave no scores. The message is one line that names the scorer and the reason."""


class _Unavailable(Exception):
    """There was no reply, or one that asks to try again: another try may help."""


class Oversized(Exception):
    """The other side sends more than is allowed."""


class Timed(io.RawIOBase):
    """A connected socket whose reads and writes must finish within some seconds, however slowly the bytes arrive.

    After that time every call raises TimeoutError. Closing this object leaves the socket open.

    Attributes:
        most: bytes that may still be read. Beyond them, reading raises Oversized.
    """

    def __init__(self, connection: socket.socket, seconds: float, most: int = sys.maxsize):
        self._connection, self.most = connection, most
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """Counts the seconds from now on."""
        self._deadline = time.monotonic() + seconds

    def _use(self) -> socket.socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)
        return self._connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._use().recv_into(buffer)
        self.most -= count
        if self.most < 0:
            raise Oversized
        return count

    def sendall(self, data: bytes) -> None:
        # With TLS, a timeout applies to one record, not to all the data.
        for first in range(0, len(data), 2**16):
            self._use().sendall(data[first : first + 2**16])

    def makefile(self, mode: str) -> io.BufferedReader:
        """The file object that http.client reads from."""
        return io.BufferedReader(self)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine. Names other than localhost are not looked up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address in ipaddress.ip_network("127.0.0.0/8" if address.version == 4 else "::1/128")


def shared_token() -> str | None:
    """The token in the environment, or None. Raises ConfigError, which does not show it, if a header cannot hold it."""
    token = os.environ.get(TOKEN)
    if token and not all("!" <= c <= "~" for c in token):
        raise ConfigError(f"{TOKEN} must be printable ASCII without spaces or line ends")
    return token or None


class RemoteScorer:
    """Scores by asking a server.

    Args:
        url: the server's, e.g. http://127.0.0.1:18085 or http://127.0.0.1:18085/ocr.
        hosts: names or addresses, as a URL writes them, that are allowed besides this machine's.
        timeout: seconds from the request to the end of the reply. name: the reward's.

    Raises:
        ConfigError: the URL is not http(s), its host is not allowed, or it has a part that does not belong there; or the token
            in the environment cannot be sent.
    """

    #: See `rewards.Scoring`.
    waits = True

    def __init__(self, url: str, hosts: Sequence[str] = (), timeout: float = 120.0, name: str = "remote"):
        self.name, self.url, self._timeout = name, url.rstrip("/"), timeout
        self._what = f"reward {name} at {one_line(self.url)}"
        if "@" in url:
            # The URL is not shown, because it may hold a password.
            raise ConfigError(f"reward {name}: its URL has a user name or password, which is not supported")
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")
        except ValueError as error:
            raise ConfigError(f"{self._what}: not a URL ({error})") from None
        if parts.scheme not in ("http", "https") or not host or not all("!" <= c <= "~" for c in self.url):
            raise ConfigError(f"{self._what}: give a URL such as http://127.0.0.1:18085")
        if "?" in self.url or "#" in self.url:
            raise ConfigError(f"{self._what}: leave out what follows the path")
        if not is_loopback(host) and host not in [allowed.strip("[]").lower() for allowed in hosts]:
            raise ConfigError(
                f"{self._what}: {host} is not this machine; if it may see the pictures, give --remote-hosts {host}"
            )
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        default = 443 if self._tls else 80
        self._host, self._port, self._path = host, default if port is None else port, parts.path
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if token := shared_token():
            self._headers["Authorization"] = f"Bearer {token}"

    def health(self) -> bytes:
        """The body of the server's /health. Raises RemoteError after one failed try."""
        return self._ask("GET", "/health", None, REPLY_LIMIT, ())

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """Scores pictures, uint8 RGB `[N, H, W, 3]`, for N prompts: float32 `[N]` on the CPU. A request has at most 32.

        Args:
            metadata: N values that JSON can hold.

        Raises:
            ValueError: the arguments do not fit together.
            RemoteError: the server did not give a finite number for every picture.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"expected uint8 RGB images [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        about = [None] * len(images) if metadata is None else metadata
        if not len(images) == len(prompts) == len(about):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts and metadata for {len(about)}")
        count = max(1, min(MOST_PICTURES, MOST_PIXELS // max(1, images.shape[1] * images.shape[2])))
        found: list[float] = []
        for first in range(0, len(images), count):
            part = slice(first, first + count)
            body = {
                "images": [_png(image) for image in images[part]],
                "prompts": list(prompts[part]),
                "metadata": list(about[part]),
            }
            try:
                data = json.dumps(body, allow_nan=False).encode()
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self._what}: metadata is not JSON: {error}") from None
            asked = len(body["images"])
            reply = self._ask("POST", "/compute", data, REPLY_LIMIT + REPLY_LIMIT_EACH * asked, PAUSES)
            try:
                found += _rewards(reply, asked, first)
            except ValueError as error:
                raise RemoteError(f"{self._what}: {error}") from None
        return torch.tensor(found, dtype=torch.float32)

    def _ask(self, method: str, path: str, body: bytes | None, limit: int, pauses: Sequence[float]) -> bytes:
        """The body of a 200 reply, at most `limit` bytes. Raises RemoteError."""
        failure = ""
        for pause in (0.0, *pauses):
            time.sleep(pause)
            try:
                return self._exchange(method, self._path + path, body, limit)
            except _Unavailable as error:
                failure = str(error)
        raise RemoteError(f"{self._what}: {failure}" + (f" ({1 + len(pauses)} tries)" if pauses else ""))

    def _exchange(self, method: str, path: str, body: bytes | None, limit: int) -> bytes:
        """One request on a connection of its own. Raises _Unavailable where another try may help, else RemoteError."""
        try:
            try:
                connection = self._connect()
            except TimeoutError:
                raise _Unavailable(f"cannot connect within {CONNECT_TIMEOUT:g} s") from None
            with connection:
                # These methods are all that http.client calls of a socket.
                timed = cast(Any, Timed(connection, self._timeout, HEAD_LIMIT + limit))
                request = http.client.HTTPConnection(self._host, self._port)
                request.sock = timed
                # A server that refuses a request may reply and close before all of it is sent. The reply gives the reason.
                with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
                    request.request(method, path, body, self._headers)
                response = http.client.HTTPResponse(timed, method=method)
                response.begin()
                _check_length(response)
                if response.status != 200:
                    self._refused(response)
                data = response.read(limit + 1)
                if len(data) > limit:
                    raise Oversized
                # http.client raises no error for a truncated head, nor for a truncated body.
                if response.length or (response.length is None and not data):
                    raise _Unavailable("the connection closed before the reply's end")
                return data
        except Oversized:
            raise RemoteError(f"{self._what}: the reply has more than {limit} bytes") from None
        except TimeoutError:
            raise RemoteError(f"{self._what}: no complete reply within {self._timeout:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise RemoteError(f"{self._what}: {one_line(error)}") from None
        except http.client.IncompleteRead:
            raise _Unavailable("the connection closed before the reply's end") from None
        except OSError as error:
            raise _Unavailable(one_line(error.strerror or str(error))) from None
        except (http.client.HTTPException, ValueError) as error:
            # ValueError is http.client's for some wrong sizes of chunks.
            raise RemoteError(f"{self._what}: the reply is not HTTP: {one_line(str(error) or repr(error))}") from None

    def _connect(self) -> socket.socket:
        plain = socket.create_connection((self._host, self._port), CONNECT_TIMEOUT)
        return plain if self._tls is None else self._tls.wrap_socket(plain, server_hostname=self._host)

    def _refused(self, response: http.client.HTTPResponse) -> NoReturn:
        """Raises the error that a status other than 200 stands for, with the text of its `{"error": ...}`."""
        text = "redirects are not followed" if 300 <= response.status < 400 else ""
        with contextlib.suppress(OSError, http.client.HTTPException, Oversized, ValueError, RecursionError):
            reply = json.loads(response.read(REPLY_LIMIT))
            if isinstance(reply, dict) and isinstance(reply.get("error"), str):
                text = one_line(reply["error"])
        failure = f"replied {response.status}" + (f": {text}" if text else "")
        if response.status in UNAVAILABLE:
            raise _Unavailable(failure)
        raise RemoteError(f"{self._what}: {failure}")


def _check_length(response: http.client.HTTPResponse) -> None:
    """Raises HTTPException unless a reply states the length of its body in one way, or not at all (RFC 9112, 6.3)."""
    lengths = response.headers.get_all("Content-Length", [])
    codings = response.headers.get_all("Transfer-Encoding", [])
    if len(lengths) + len(codings) > 1:
        raise http.client.HTTPException("its length is stated twice")
    if any(not (length.isascii() and length.isdigit()) for length in lengths):
        raise http.client.HTTPException("its Content-Length is not a number")
    if any(coding.lower() != "chunked" for coding in codings):
        raise http.client.HTTPException("its Transfer-Encoding is not chunked")


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    # Between server and client, time matters more than size.
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _rewards(reply: bytes, count: int, first: int) -> list[float]:
    """The numbers in a reply for `count` pictures. `first` is the number of the first one. Raises ValueError."""
    try:
        content = json.loads(reply, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ValueError("the reply is not JSON") from None
    rewards = content.get("rewards") if isinstance(content, dict) else None
    if not isinstance(rewards, list):
        raise ValueError('the reply has no list "rewards"')
    if len(rewards) != count:
        raise ValueError(f"{len(rewards)} rewards for {count} images")
    for i, value in enumerate(rewards):
        # The comparison is False for NaN as well. A finite number beyond float32's range would become infinite.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
            # What is nested too deeply cannot be shown.
            shown = (
                "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)
            )
            raise ValueError(f"the reward of image {first + i} is {one_line(shown)}, not a finite number")
    return [float(value) for value in rewards]


def check_path(
    path: str | None, remote_hosts: Sequence[str] = (), remote_timeout: float = 120.0, name: str = "remote"
) -> RemoteScorer:
    """The scorer. Its server is not asked. `path` is the URL; the other arguments are those of `RemoteScorer`.

    Raises:
        ConfigError: there is no URL, or `RemoteScorer` refuses it.
    """
    if path is None:
        raise ConfigError(f"reward {name} needs its address: --reward-models {name}=http://127.0.0.1:18085")
    return RemoteScorer(path, remote_hosts, remote_timeout, name)


def state(
    path: str | None, remote_hosts: Sequence[str] = (), remote_timeout: float = 120.0, name: str = "remote"
) -> str | None:
    """What the server hosts, and its version; None if it does not say. Other servers may report what changes every time."""
    try:
        about = json.loads(check_path(path, remote_hosts, min(remote_timeout, CONNECT_TIMEOUT), name).health())
    except (RemoteError, ValueError, RecursionError):
        # Without the server, the run itself says so.
        return None
    return str([about.get(key) for key in ("rewards", "version")]) if isinstance(about, dict) else None


def load(
    device: torch.device,
    path: str | None,
    remote_hosts: Sequence[str] = (),
    remote_timeout: float = 120.0,
    name: str = "remote",
) -> RemoteScorer:
    """The scorer, once its server has answered. The arguments are those of `check_path`.

    Raises:
        ConfigError: `check_path` fails, the server does not answer, or it hosts several rewards and the URL names none.
    """
    scorer = check_path(path, remote_hosts, remote_timeout, name)
    try:
        reply = scorer.health()
    except RemoteError as error:
        if ": replied " in str(error):
            # It runs, and its words say what is wrong.
            raise ConfigError(str(error)) from None
        port = urlsplit(scorer.url).port or 18085
        start = f"`python -m tmpo_trainer serve --reward NAME --port {port}`"
        raise ConfigError(f"{error}; is it running? To start one: {start}") from None
    try:
        about = json.loads(reply)
    except (ValueError, RecursionError):
        # Another kind of server may answer anything here.
        about = None
    hosted = about.get("rewards") if isinstance(about, dict) else None
    if isinstance(hosted, list) and len(hosted) > 1 and all(isinstance(each, str) for each in hosted):
        names = [one_line(each, 40) for each in hosted]
        what = f"reward {name} at {scorer.url}"
        raise ConfigError(
            f"{what} hosts {one_line(', '.join(names))}: add one of them to the URL, as in {scorer.url}/{names[0]}"
        )
    return scorer
