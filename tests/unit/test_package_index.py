"""Downloads by pip's configuration: folders, pages, passwords, redirections, and what is not there."""

import base64
import contextlib
import http.server
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_moe import package_index
from dist_moe.package_index import IndexName, fetch_candidates, npm_registry, parse_options

NAME, CONTENT = "thing-1.0.tar.gz", b"an archive"
PASSWORD = "Basic " + base64.b64encode(b"user:secret word").decode()


class _Index(http.server.BaseHTTPRequestHandler):
    """An index with a password, whose file is at another name of this host, which must not see the password."""

    def do_GET(self) -> None:
        port = self.connection.getsockname()[1]
        given = self.headers.get("Authorization")
        if self.path == "/simple/thing/" and given == PASSWORD:
            links = f'<a href="../../files/thing%2D1.0.tar.gz#sha256=1">{NAME}</a><a href="file:///etc/passwd">x</a>'
            self._answer(200, links.encode())
        elif self.path == "/files/thing%2D1.0.tar.gz" and given == PASSWORD:
            self._answer(302, b"", f"http://localhost:{port}/far/{NAME}")
        elif self.path in (f"/far/{NAME}", f"/npm/thing/-/{NAME}") and given is None:
            self._answer(200, CONTENT)
        else:
            self._answer(404, b"")

    def _answer(self, code: int, content: bytes, location: str | None = None) -> None:
        self.send_response(code)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}/simple"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave only what a test sets."""
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _found(
    monkeypatch: pytest.MonkeyPatch, index: IndexName = "PyPI", **variables: str
) -> list[tuple[str, bytes, str]]:
    """Return place, content and fault of each candidate; no content where there is a fault."""
    for name, value in variables.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, NAME)
        candidates = fetch_candidates("thing", NAME, len(CONTENT), target, index)
        return [(place, b"" if fault else target.read_bytes(), fault) for place, fault in candidates]


def test_a_file_is_read_by_the_link_of_an_index_and_its_password_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    ((place, content, fault),) = _found(monkeypatch, INDEX_URL=f"http://user:secret%20word@{index}")
    assert (place, content, fault) == (f"http://{index}/thing/", CONTENT, "")


def test_a_folder_of_links_comes_before_an_index(monkeypatch: pytest.MonkeyPatch, index: str, tmp_path: Path) -> None:
    (tmp_path / "simple" / "thing").mkdir(parents=True)
    (tmp_path / "simple" / "thing" / "index.html").write_text(f'<a href="../../{NAME}">{NAME}</a>')
    (tmp_path / NAME).write_bytes(CONTENT + b"more")
    variables = {
        "INDEX_URL": f"http://{index}",
        "EXTRA_INDEX_URL": f"file://{tmp_path}/simple",
        "FIND_LINKS": str(tmp_path),
    }
    first, second, last = _found(monkeypatch, "PyPI", **variables)
    # One byte more than the expected size shows that the file is another.
    assert first == (f"file://{tmp_path}", CONTENT + b"m", "")
    assert second == (f"file://{tmp_path}/simple/thing/", CONTENT + b"m", "")
    assert last == (f"http://{index}/thing/", b"", "HTTP Error 404: Not Found")


def test_a_file_of_npm_is_read_from_its_registry(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    registry = f"http://{index.removesuffix('simple')}npm"
    monkeypatch.setenv("npm_config_registry", f"{registry}/")
    assert _found(monkeypatch, "npm") == [(f"{registry}/thing/-/", CONTENT, "")]
    assert _found(monkeypatch, "npm", NO_INDEX="1") == []


def test_the_registry_of_npm_is_that_of_the_environment_or_else_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert npm_registry({}) == package_index.PUBLIC_NPM_REGISTRY
    (tmp_path / ".npmrc").write_text("fund=false\nregistry = https://a/\n")
    assert npm_registry({"NPM_CONFIG_REGISTRY": ""}) == "https://a/"
    assert npm_registry({"NPM_CONFIG_REGISTRY": "https://b"}) == "https://b"


def test_without_an_index_only_links_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _found(monkeypatch, NO_INDEX="1") == []
    found = _found(monkeypatch, FIND_LINKS=f"{tmp_path} {tmp_path}/gone")
    assert found[0] == (f"file://{tmp_path}", b"", f"it has no {NAME}")
    assert "No such file or directory" in found[1][2]


def test_an_index_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ((place, content, fault),) = _found(monkeypatch, INDEX_URL="http://127.0.0.1:9/simple")
    assert (place, content) == ("http://127.0.0.1:9/simple/thing/", b"") and "refused" in fault


def test_the_environment_is_above_the_section_of_downloads_and_that_above_the_global_one() -> None:
    listed = "download.index-url='https://a'\nglobal.index-url='https://b'\nglobal.find-links='\\n/x\\n/y'\nnoise\n"
    assert parse_options(listed, {}) == {"index-url": "https://a", "find-links": "\n/x\n/y"}
    assert parse_options(listed, {"PIP_INDEX_URL": "https://c", "PIP_PROXY": ""})["index-url"] == "https://c"


def test_an_address_that_cannot_be_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder below a home that is not known."""
    others = ["http://user:secret@[bad/simple", "http://user:secret@a\u2100b/simple", "nosuchscheme://host/simple"]
    found = _found(
        monkeypatch,
        INDEX_URL="http://exa mple/simple",
        EXTRA_INDEX_URL=" ".join(others),
        FIND_LINKS="~nosuchuser/x",
    )
    told = ["http://exa mple/simple", "http://[bad/simple", "http://a\u2100b/simple", "nosuchscheme://host/simple"]
    assert [place for place, _, _ in found][1:] == [f"{place}/thing/" for place in told]
    assert found[0][0].endswith("/~nosuchuser/x")
    faults = [
        "No such file",
        "URL can't contain control characters",
        "Invalid IPv6 URL",
        "invalid characters under NFKC",
        "unknown url type",
    ]
    for (_, content, why), fault in zip(found, faults, strict=True):
        assert content == b"" and fault in why and "secret" not in why


@pytest.fixture
def answering() -> Iterator[Callable[[list[bytes]], str]]:
    """Return an index that sends pieces to each connection, each a tenth of a second after the one before."""
    with contextlib.ExitStack() as stack:

        def serve(pieces: list[bytes]) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def send() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        with listener.accept()[0] as connection:
                            connection.recv(1 << 16)
                            for piece in pieces:
                                connection.sendall(piece)
                                time.sleep(0.1)

            threading.Thread(target=send, daemon=True).start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}/simple"

        yield serve


def test_an_answer_that_cannot_be_used_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, answering: Callable[[list[bytes]], str]
) -> None:
    faults = {
        b"garbage\r\n\r\n": "its answer is not that of a web server, BadStatusLine: garbage",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n": "IncompleteRead",
        b"": "Remote end closed connection without response",
        b"HTTP/1.1 200 OK\r\n\r\n<![foo[bar]]>": "unknown status keyword",
    }
    found = _found(monkeypatch, NO_INDEX="1", FIND_LINKS=" ".join(answering([answer]) for answer in faults))
    for (_, content, why), fault in zip(found, faults.values(), strict=True):
        assert content == b"" and fault in why


def test_a_slow_server_has_a_deadline_for_the_whole(
    monkeypatch: pytest.MonkeyPatch, answering: Callable[[list[bytes]], str]
) -> None:
    monkeypatch.setattr(package_index, "DEADLINE_S", 0.5)
    starts = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "
    places = " ".join(answering([start, *[b"x"] * 100]) for start in starts)
    began_s = time.monotonic()
    found = _found(monkeypatch, NO_INDEX="1", FIND_LINKS=places)
    assert [each[1:] for each in found] == [(b"", "it did not send the whole file within 0.5 s")] * 2
    assert time.monotonic() - began_s < 9, "each server sends for 10 s"
