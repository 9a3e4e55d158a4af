"""JSON over HTTP to one address that the recipe names, and to nothing else.

The host is resolved first, every address it has is checked, and the connection goes to a checked address: a name that
resolves differently a moment later changes nothing. Redirects are not followed, proxies of the environment are not
asked, replies are bounded in size and time.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from accord.config.rewards import RemoteFields
from accord.errors import ConfigError

__all__ = ["Client", "RemoteError", "is_public"]

MAX_REPLY_BYTES = 8 << 20
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a further try; doubles every time
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Sequence[str]]


class RemoteError(Exception):
    """An exchange failed. `passing` tells whether trying again may help."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: not this machine, not a private or link-local network (so
    no cloud metadata), not multicast, and no IPv6 form of such an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def resolved(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, in the system's order of preference."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Client:
    """Posts JSON to the url of `config`; `key` names the section in errors. Safe to use from several threads."""

    def __init__(
        self,
        config: RemoteFields,
        key: str,
        *,
        resolve: Resolve = resolved,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Raises: ConfigError when the environment variable that `token_env` names is not set."""
        parts = urlsplit(config.url)
        assert parts.hostname is not None  # see accord.config.check
        self.url, self._key = config.url, key
        self._config, self._resolve, self._sleep = config, resolve, sleep
        self._host, self._secure = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._token = os.environ.get(config.token_env, "").strip() if config.token_env else ""
        if config.token_env and not self._token:
            raise ConfigError(f"`{key}.token_env` names {config.token_env}, which is not set in the environment")
        self._tls = ssl.create_default_context() if self._secure else None

    def check_address(self) -> None:
        """Raises ConfigError for an address that will never be connected to. A host that cannot be resolved now may be
        later."""
        try:
            refused = self._refused(self._resolve(self._host, self._port))
        except (OSError, UnicodeError):
            return
        if refused:
            raise ConfigError(f"`{self._key}.url` = {self.url}: {refused}")

    def post(self, body: Any) -> Any:
        """The reply to a JSON body, as JSON. Raises RemoteError naming the url, after as many tries as are allowed."""
        payload = json.dumps(body).encode("ascii")
        for attempt in range(self._config.retries + 1):
            try:
                return self._exchange(payload)
            except RemoteError as error:
                if not error.passing or attempt == self._config.retries:
                    tries = f" (tried {attempt + 1} times)" if attempt else ""
                    raise RemoteError(self._redacted(f"{self.url}: {error}{tries}")) from error
            self._sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt))
        raise AssertionError("the last try returns or raises")

    def _exchange(self, payload: bytes) -> Any:
        """One try. Whatever the other side does, it ends within the timeout."""
        late = threading.Event()
        with self._connected() as connection:
            timer = threading.Timer(self._config.timeout_seconds, _end, (connection, late))
            timer.start()
            try:
                status, reply = self._ask(connection, payload)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if late.is_set():
                    raise RemoteError(f"no reply within {self._config.timeout_seconds:g} s", passing=True) from error
                passing = not isinstance(error, ssl.SSLCertVerificationError)
                raise RemoteError(f"the exchange failed ({_words(error)})", passing=passing) from error
            finally:
                timer.cancel()
        if late.is_set():
            raise RemoteError(f"no reply within {self._config.timeout_seconds:g} s", passing=True)
        if status != 200:
            moved = " a redirect, which is not followed:" if 300 <= status < 400 else ""
            text = reply[:200].decode("utf-8", "replace").strip()
            raise RemoteError(f"status {status}{':' if not moved else ','}{moved} {text!r}", passing=status in BUSY)
        return _json(reply)

    def _ask(self, connection: socket.socket, payload: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if isinstance(connection, ssl.SSLSocket):
            connection.do_handshake()
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        exchange = kind(self._host, self._port)
        exchange.sock = connection  # connected already, to an address that was checked
        exchange.request("POST", self._target, payload, headers)
        response = exchange.getresponse()
        reply = response.read(MAX_REPLY_BYTES + 1)
        if len(reply) > MAX_REPLY_BYTES:
            raise RemoteError(f"the reply is larger than {MAX_REPLY_BYTES >> 20} MiB")
        return response.status, reply

    def _connected(self) -> socket.socket:
        """A socket to one of the host's addresses, all of which were checked."""
        try:
            addresses = list(dict.fromkeys(self._resolve(self._host, self._port)))
        except (OSError, UnicodeError) as error:
            raise RemoteError(f"the host {self._host!r} cannot be resolved ({_words(error)})", passing=True) from error
        refused = self._refused(addresses)
        if refused:
            raise RemoteError(refused)
        failure: OSError | None = None
        for address in addresses:
            try:
                plain = socket.create_connection((address, self._port), timeout=self._config.timeout_seconds)
                return (
                    plain
                    if self._tls is None
                    else self._tls.wrap_socket(plain, server_hostname=self._host, do_handshake_on_connect=False)
                )
            except OSError as error:
                failure = failure or error
        raise RemoteError(f"cannot connect ({_words(failure)})", passing=True)

    def _refused(self, addresses: Sequence[str]) -> str | None:
        """Why none of the addresses is connected to; None if they may be."""
        private = [address for address in addresses if not is_public(address)]
        if not private or self._config.allow_private:
            return None
        return (
            f"{self._host!r} is {private[0]}, an address of this machine or of a private network; allow it with "
            "allow_private: true if it is yours"
        )

    def _redacted(self, text: str) -> str:
        """Services repeat keys in their errors."""
        return text.replace(self._token, "***") if self._token else text


def _end(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended by itself


def _json(reply: bytes) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    try:
        return json.loads(reply, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"the reply is not JSON ({error}): {reply[:200].decode('utf-8', 'replace')!r}") from error


def _words(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if error is not None else "it has no address"
