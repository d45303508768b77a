"""Images are fetched from where the operator allowed, within limits, and never from inside the network."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from models.errors import BadImage
from stream.errors import TldrError
from stream.image_fetch import ATTEMPTS, ImageFetcher, is_public

IMAGE = bytes(range(256)) * 40


class ImageServer(ThreadingHTTPServer):
    """Serves IMAGE below /images/, and misbehaves elsewhere."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.failing = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: ImageServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif path == "/images/slow":
            self.send_response(200)
            self.end_headers()
            time.sleep(1.0)
        elif path == "/images/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(IMAGE)
        elif path == "/images/stumbling" and self.server.failing:
            self.server.failing -= 1
            self.send_error(503)
        elif path.startswith("/images/missing"):
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(IMAGE)))
            self.end_headers()
            self.wfile.write(IMAGE)


@pytest.fixture
def server() -> Iterator[ImageServer]:
    running = ImageServer()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def fetcher(*allow: str, **options: Any) -> ImageFetcher:
    return ImageFetcher(allow, **{"allow_private": True, "retry_wait_s": 0.01, **options})


def reason_of(fetching: ImageFetcher, uri: str) -> str:
    with pytest.raises(BadImage) as raised:
        fetching.fetch(uri)
    return raised.value.reason


def test_an_image_from_an_allowed_host_arrives_untouched(server: ImageServer) -> None:
    assert fetcher(server.url).fetch(f"{server.url}/images/a%20b.png?width=640#top") == IMAGE
    assert server.asked == ["/images/a%20b.png?width=640"]


def test_without_an_entry_nothing_is_fetched(server: ImageServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)

    for uri in (
        f"{server.url}/images/a",
        f"file://{tmp_path}/a.png",
        "s3://bucket/a",
        "data:image/png;base64,AA",
        "",
        "a",
    ):
        assert reason_of(fetcher(), uri) == "uri-not-allowed"
    assert server.asked == []


@pytest.mark.parametrize(
    "uri",
    [
        "https://127.0.0.1:PORT/images/a",  # another scheme
        "http://127.0.0.1:1/images/a",  # another port
        "http://localhost:PORT/images/a",  # another host
        "http://127.0.0.1:PORT/secret",  # another path
        "http://127.0.0.1:PORT/imagesque/a",
        "http://127.0.0.1:PORT/images/../secret",
        "http://127.0.0.1:PORT/images/%2e%2e/secret",
        "http://127.0.0.1:PORT/images/%252e%252e/secret",
        "http://127.0.0.1:PORT/images%2f..%2fsecret",
        "http://127.0.0.1:PORT/images\\..\\secret",
        "http://user:word@127.0.0.1:PORT/images/a",
        "http://127.0.0.1:PORT@evil.example/images/a",
        "http://evil.example\\@127.0.0.1:PORT/images/a",
        "http://evil.example#@127.0.0.1:PORT/images/a",
        " http://127.0.0.1:PORT/images/a",
        "simplecache::http://127.0.0.1:PORT/images/a",
        "http://[::1/images/a",
    ],
)
def test_what_is_not_below_an_entry_is_not_asked_for(server: ImageServer, uri: str) -> None:
    port = str(server.server_address[1])

    assert reason_of(fetcher(f"{server.url}/images"), uri.replace("PORT", port)) == "uri-not-allowed"
    assert server.asked == []


def test_every_hop_of_a_redirect_must_be_allowed(server: ImageServer) -> None:
    port = server.server_address[1]
    inside = fetcher(server.url)

    assert inside.fetch(f"{server.url}/to/{server.url}/images/a") == IMAGE
    assert inside.fetch(f"{server.url}/to//images/a") == IMAGE
    assert reason_of(inside, f"{server.url}/to/http://localhost:{port}/images/a") == "uri-not-allowed"
    assert reason_of(inside, f"{server.url}/to/file:///etc/passwd") == "uri-not-allowed"
    assert reason_of(fetcher(f"{server.url}/to"), f"{server.url}/to/{server.url}/images/a") == "uri-not-allowed"


def test_redirects_in_a_circle_end(server: ImageServer) -> None:
    around = "/to/" * 20 + "x"

    assert reason_of(fetcher(server.url), f"{server.url}{around}") == "fetch-failed"
    assert len(server.asked) < 10


def test_an_image_that_is_too_large_is_left_alone(server: ImageServer) -> None:
    assert fetcher(server.url, bytes_max=len(IMAGE)).fetch(f"{server.url}/images/a") == IMAGE
    assert reason_of(fetcher(server.url, bytes_max=len(IMAGE) - 1), f"{server.url}/images/a") == "image-too-large"
    assert reason_of(fetcher(server.url, bytes_max=100_000), f"{server.url}/images/endless") == "image-too-large"


def test_a_slow_server_costs_its_time_a_bounded_number_of_times(server: ImageServer) -> None:
    started = time.monotonic()

    assert reason_of(fetcher(server.url, timeout_s=0.1), f"{server.url}/images/slow") == "fetch-failed"
    assert time.monotonic() - started < ATTEMPTS * 0.1 + 1.0
    assert len(server.asked) == ATTEMPTS


def test_a_server_that_stumbles_is_asked_again_and_a_missing_image_is_not(server: ImageServer) -> None:
    server.failing = 2
    assert fetcher(server.url).fetch(f"{server.url}/images/stumbling") == IMAGE

    server.asked.clear()
    assert reason_of(fetcher(server.url), f"{server.url}/images/missing") == "fetch-failed"
    assert len(server.asked) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]"])
def test_an_allowed_host_inside_the_network_is_refused(server: ImageServer, host: str) -> None:
    base = f"http://{host}:{server.server_address[1]}"

    assert reason_of(ImageFetcher([base], retry_wait_s=0.01), f"{base}/images/a") == "uri-private-address"
    assert server.asked == []


def test_a_public_name_with_a_private_address_is_refused_where_it_connects(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.server_address[1]
    answers = [["127.0.0.1"], ["192.88.99.77", "127.0.0.1"], ["127.0.0.1"]]
    asked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        addresses = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    allowed = f"http://images.example.org:{port}"

    assert reason_of(ImageFetcher([allowed]), f"{allowed}/images/a") == "uri-private-address"
    # The second answer has a public address too, the third (after it failed) none: nothing reaches the server.
    rebound = reason_of(ImageFetcher([allowed], timeout_s=0.3, retry_wait_s=0.01), f"{allowed}/images/a")
    assert rebound in ("uri-private-address", "fetch-failed")
    assert server.asked == []
    assert set(asked) == {"images.example.org"}


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("64:ff9b::808:808", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("ff02::1", False),
    ],
)
def test_addresses_of_private_networks_are_known_in_every_spelling(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_files_are_read_below_the_allowed_folder_and_links_do_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a b.png").write_bytes(IMAGE)
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret")
    fetching = fetcher(f"file://{folder}", retry_wait_s=0.0)

    assert fetching.fetch(f"file://{folder}/a%20b.png") == IMAGE
    assert reason_of(fetching, f"file://{folder}/link.png") == "uri-not-allowed"
    assert reason_of(fetching, f"file://{folder}/../secret") == "uri-not-allowed"
    assert reason_of(fetching, f"file://{folder}/absent.png") == "fetch-failed"
    assert reason_of(fetching, f"file://{folder}") == "fetch-failed"


def test_other_stores_are_read_through_fsspec_where_they_are_listed() -> None:
    fsspec.filesystem("memory").pipe("/bucket/images/a.png", IMAGE)
    fetching = fetcher("memory://bucket/images", bytes_max=len(IMAGE), retry_wait_s=0.0)

    assert fetching.fetch("memory://bucket/images/a.png") == IMAGE
    assert reason_of(fetching, "memory://bucket/other/a.png") == "uri-not-allowed"
    assert reason_of(fetching, "memory://bucket/images/b.png") == "fetch-failed"


@pytest.mark.parametrize(
    "text",
    [
        "images.example.org",
        "https://",
        "https://u:p@e.org",
        "nosuch://e.org",
        "file://host/x",
        "file:x",
        "s3://*",
        "https://*",
        "https://e.org:x",
    ],
)
def test_an_entry_that_cannot_be_is_one_clear_line(text: str) -> None:
    with pytest.raises(TldrError, match="--fetch-allow"):
        ImageFetcher([text])


def test_a_message_shows_neither_credentials_nor_line_breaks() -> None:
    with pytest.raises(BadImage) as raised:
        fetcher("https://e.org").fetch("https://me:s3cret@e.org/a\nb" + "x" * 1000)

    assert "s3cret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
