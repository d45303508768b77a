"""Fetches the image of a pair that carries only an `image_uri`, from nowhere but where the operator allowed.

Must not know Kafka. A URI comes from strangers, so what it can reach is decided here, for the URI and for every
redirect: scheme, host, port and path must be listed (`--fetch-allow`), and a web host's addresses must be public. They
are checked where the connection is made, so a name that resolves otherwise a moment later (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from models.errors import BadImage, Reason
from stream.errors import TldrError

BYTES_MAX = 16 * 1024 * 1024
TIMEOUT_S = 10.0
REDIRECTS_MAX = 5
ATTEMPTS = 3
RETRY_WAIT_S = 0.3
CHUNK_BYTES = 256 * 1024
WEB_PORTS = {"http": 80, "https": 443}
REDIRECT_STATUSES = {301, 302, 303, 307, 308}
# 429: too many requests. Other statuses below 500 will be the same tomorrow.
TRANSIENT_STATUSES = {408, 425, 429}
HEADERS = {"User-Agent": "tldr-stream", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
# RFC 6052: an IPv4 address as a translating network shows it to hosts that speak only IPv6.
NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Allowed:
    """One `--fetch-allow`: every URI of this scheme and host (and port) below this path."""

    scheme: str
    host: str
    port: int | None
    path: str

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """From scheme://host[:port][/path]; a host may start with "*." for all hosts below it. Raises TldrError."""
        try:
            parts = urlsplit(text)
            parts.port  # noqa: B018 (raises where it is no number)
        except ValueError as error:
            raise TldrError(f"--fetch-allow {text}: {error}") from error
        scheme = parts.scheme.lower()
        if not scheme or (scheme != "file" and not parts.netloc) or parts.username is not None:
            raise TldrError(f"--fetch-allow {text}: give scheme://host[/path], as in https://images.example.org")
        if scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
            raise TldrError(f"--fetch-allow {text}: give an absolute path, as in file:///data/images")
        if "*" in parts.netloc and (scheme not in WEB_PORTS or not re.fullmatch(r"\*\.[^*]+", parts.netloc)):
            raise TldrError(f"--fetch-allow {text}: only a web host may start with *. for all hosts below it")
        _refuse_unknown_scheme(text, scheme)
        if scheme == "file":
            return cls(scheme, "", None, os.path.realpath(parts.path))
        if scheme in WEB_PORTS:
            import yarl  # as the URIs will be taken apart

            url = yarl.URL(text)
            return cls(scheme, (url.host or "").lower(), url.port, url.path_safe or "/")
        return cls(scheme, parts.netloc, None, parts.path or "/")

    def covers(self, scheme: str, host: str, port: int | None, path: str) -> bool:
        """Whether it is below this entry; `path` absolute and without steps upwards."""
        same_host = host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host
        below = path == self.path or path.startswith(self.path.rstrip("/") + "/")
        return scheme == self.scheme and same_host and port == self.port and below


class Fetcher(Protocol):
    """What a worker needs of one."""

    def fetch(self, uri: str) -> bytes: ...


class ImageFetcher:
    """Fetches images; thread safe.

    allow           what may be fetched (see Allowed.parse); nothing without
    bytes_max       an image may have this many bytes
    timeout_s       for one attempt, redirects included; a transient failure is tried ATTEMPTS times
    allow_private   web hosts may resolve to private addresses too: for a network whose images are its own
    Raises TldrError for an entry of `allow` that cannot be.
    """

    def __init__(
        self,
        allow: Iterable[str],
        bytes_max: int = BYTES_MAX,
        timeout_s: float = TIMEOUT_S,
        *,
        allow_private: bool = False,
        retry_wait_s: float = RETRY_WAIT_S,
    ) -> None:
        self._allowed = [Allowed.parse(text) for text in allow]
        self._bytes_max = bytes_max
        self._timeout_s = timeout_s
        self._allow_private = allow_private
        self._retry_wait_s = retry_wait_s
        self._web: Any = _web_file_system(allow_private) if {a.scheme for a in self._allowed} & set(WEB_PORTS) else None

    def fetch(self, uri: str) -> bytes:
        """The bytes at `uri`, untouched.

        Raises models.errors.BadImage: uri-not-allowed, uri-private-address, image-too-large, fetch-failed.
        """
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self._retry_wait_s * 2 ** (attempt - 1))
            try:
                return self._fetch_once(uri)
            except _Transient as error:
                problem = str(error)
        raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: {problem}, {ATTEMPTS} times")

    def _fetch_once(self, uri: str) -> bytes:
        if _scheme(uri) in WEB_PORTS:
            return self._fetch_web(uri)
        return self._fetch_other(uri)

    def _fetch_web(self, uri: str) -> bytes:
        import aiohttp
        import yarl

        deadline = time.monotonic() + self._timeout_s
        hop = uri
        for _ in range(REDIRECTS_MAX + 1):
            url = self._checked_web(hop)
            left_s = max(0.001, deadline - time.monotonic())
            try:
                # The size is a fiction: without one fsspec asks for it with a request of its own.
                timeout = aiohttp.ClientTimeout(total=left_s)
                with self._web.open(str(url), "rb", block_size=0, size=1, timeout=timeout) as file:
                    if file.r.status not in REDIRECT_STATUSES:
                        return self._read(file, uri, file.r.headers)
                    hop = str(url.join(yarl.URL(file.r.headers.get("Location", ""))))
            except FileNotFoundError as error:
                raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: HTTP 404") from error
            except aiohttp.ClientResponseError as error:
                problem = f"HTTP {error.status}"
                if error.status >= 500 or error.status in TRANSIENT_STATUSES:
                    raise _Transient(problem) from error
                raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: {problem}") from error
            except TimeoutError as error:
                raise _Transient(f"no answer within {self._timeout_s:g} s") from error
            except PrivateAddress as error:
                raise BadImage(Reason.URI_PRIVATE_ADDRESS, f"{_shown(hop)}: {error}") from error
            except BadImage:
                raise
            except ValueError as error:  # a Location that is no URL
                raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: {error}") from error
            except Exception as error:  # connections, TLS, protocol: aiohttp's, the system's; none may end the worker
                raise _Transient(type(error).__name__) from error
        raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: more than {REDIRECTS_MAX} redirects")

    def _checked_web(self, uri: str) -> Any:
        """The URL as it will be asked for: what is checked and what is fetched come from the same parser."""
        import yarl

        try:
            url = yarl.URL(uri)
            host, port = (url.host or "").lower().rstrip("."), url.port
        except ValueError as error:
            raise BadImage(Reason.URI_NOT_ALLOWED, f"{_shown(uri)} is no URL: {error}") from error
        if url.user is not None or url.password is not None:
            raise BadImage(Reason.URI_NOT_ALLOWED, f"{_shown(uri)} holds credentials")
        # path_safe: an encoded slash stays one, as the server will see it.
        self._refuse_not_listed(uri, url.scheme, host, port, url.path_safe or "/")
        if not self._allow_private and (address := _address(host)) is not None and not is_public(address):
            raise BadImage(Reason.URI_PRIVATE_ADDRESS, f"{_shown(uri)}: {host} is not a public address")
        return url.with_fragment(None)

    def _fetch_other(self, uri: str) -> bytes:
        import fsspec

        scheme = _scheme(uri)
        # "::" chains file systems in fsspec: only the first would have been looked at.
        if "::" in uri or scheme not in {allowed.scheme for allowed in self._allowed}:
            raise BadImage(
                Reason.URI_NOT_ALLOWED, f"{_shown(uri)}: scheme {scheme or '(none)'} is not listed in --fetch-allow"
            )
        # As fsspec splits it: no query and no fragment, a key in a bucket may hold any character.
        host, slash, path = uri.partition("://")[2].partition("/")
        path = slash + path
        if scheme == "file":
            # Where it leads to, links followed; and percent signs mean what they mean in a URI.
            path = os.path.realpath(unquote(path))
        self._refuse_not_listed(uri, scheme, host, None, path)
        if scheme == "file" and not os.path.isfile(path):  # a pipe would block for ever
            raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: no such file")
        try:
            with fsspec.filesystem(scheme).open(path if scheme == "file" else f"{host}{path}", "rb") as file:
                return self._read(file, uri, {})
        except (BadImage, _Transient):
            raise
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: {type(error).__name__}") from error
        except Exception as error:  # every file system has errors of its own; none may end the worker
            raise _Transient(type(error).__name__) from error

    def _refuse_not_listed(self, uri: str, scheme: str, host: str, port: int | None, path: str) -> None:
        # A server may take %2e%2e, or %252e%252e, for a step upwards: no image needs one.
        dotted = {".", ".."} & set(re.split(r"[/\\]", unquote(unquote(path))))
        if dotted or not any(a.covers(scheme, host, port, path) for a in self._allowed):
            raise BadImage(Reason.URI_NOT_ALLOWED, f"{_shown(uri)} is not below any --fetch-allow")

    def _read(self, file: Any, uri: str, headers: Any) -> bytes:
        if headers.get("Content-Encoding", "identity") != "identity":
            raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: sent with a content encoding that was not asked for")
        promised = headers.get("Content-Length", "")
        if promised.isdigit() and int(promised) > self._bytes_max:
            raise BadImage(Reason.IMAGE_TOO_LARGE, f"{_shown(uri)}: {promised} bytes, more than {self._bytes_max}")
        deadline = time.monotonic() + self._timeout_s
        parts: list[bytes] = []
        size = 0
        while chunk := file.read(min(CHUNK_BYTES, self._bytes_max + 1 - size)):
            parts.append(chunk)
            size += len(chunk)
            if size > self._bytes_max:
                raise BadImage(Reason.IMAGE_TOO_LARGE, f"{_shown(uri)}: more than {self._bytes_max} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        if not size:
            raise BadImage(Reason.FETCH_FAILED, f"{_shown(uri)}: empty")
        return b"".join(parts)


class PrivateAddress(Exception):
    """A host name that stands for no public address."""


class _Transient(Exception):
    """What may be better in a moment."""


def is_public(address: str) -> bool:
    """Whether `address` belongs to the public internet, with IPv4 addresses inside IPv6 ones looked at too."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if parsed.teredo is not None:
            return False
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return parsed.is_global and not parsed.is_multicast


def _address(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        return None


def _web_file_system(allow_private: bool) -> Any:
    """fsspec's HTTP file system whose connections go to checked addresses only."""
    import aiohttp
    from aiohttp.abc import AbstractResolver
    from fsspec.implementations.http import HTTPFileSystem

    class CheckedResolver(AbstractResolver):
        """Resolves as the system does and lets only public addresses through; they are what is connected to."""

        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            found = await aiohttp.ThreadedResolver().resolve(host, port, family)
            checked = [one for one in found if allow_private or is_public(one["host"])]
            if not checked:
                raise PrivateAddress(f"{host} has no public address")
            return checked

        async def close(self) -> None:
            return None

    async def client(loop: asyncio.AbstractEventLoop, **settings: Any) -> Any:
        connector = aiohttp.TCPConnector(resolver=CheckedResolver(), loop=loop, limit_per_host=16)
        # No proxy of the environment (it would connect for us, unchecked), no cookies from one host to the next.
        return aiohttp.ClientSession(
            connector=connector, trust_env=False, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), **settings
        )

    return HTTPFileSystem(
        get_client=client, encoded=True, skip_instance_cache=True, allow_redirects=False, headers=HEADERS
    )


def _refuse_unknown_scheme(text: str, scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise TldrError(f"--fetch-allow {text}: {error}") from error


def _scheme(uri: str) -> str:
    """The scheme in lower case, empty without one."""
    return uri.partition("://")[0].lower() if "://" in uri else ""


def _shown(uri: str) -> str:
    """A URI for a message: no credentials, no line breaks, no novel."""
    head, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    text = f"{head}{separator}{authority.rpartition('@')[2]}{slash}{path}"
    return "".join(character for character in text if character.isprintable())[:200]
