"""Downloads one file of a package from where pip's or npm's configuration says: nothing of it is installed or run."""

import ast
import base64
import functools
import html.parser
import http.client
import netrc
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Literal, NamedTuple

from dist_moe.deadline import call_within

IndexName = Literal["PyPI", "npm"]
PUBLIC_INDEX = "https://pypi.org/simple"
PUBLIC_NPM_REGISTRY = "https://registry.npmjs.org"
LARGEST_PAGE = 1 << 24
# A network that is down should be reported within minutes.
TIME_LIMIT_S = 60.0
# Of one place in all: each read has the limit above, and a server that sends a byte a minute would never reach it. A
# large file has longer, at the rate below.
DEADLINE_S = 600.0
SLOWEST_BYTES_PER_S = 100_000
PIECE_BYTES = 1 << 20
LONGEST_FAULT = 200
PASSWORD = re.compile(r"[^\s/'\"]*@")
FALSE = ("", "0", "false", "no", "off", "n", "f")


class Candidate(NamedTuple):
    """What was found at one place.

    Attributes:
        place: The folder or address, without passwords.
        fault: Why the file could not be fetched; "" where it was written.
    """

    place: str
    fault: str


def fetch_candidates(
    package: str, name: str, size: int, target: Path, index: IndexName = "PyPI"
) -> Iterator[Candidate]:
    """Fetch a file from one place after the other, until the caller has what it wants.

    Args:
        package: The name of the package in an index.
        name: The name of the file.
        size: Its size in bytes; of a larger one, only one byte more is read.
        target: The file to write, created again for each place.
        index: Which index has the package. That of npm is found by the environment and ~/.npmrc, with the certificates
            and the proxy of pip.
    """
    options = pip_options()
    deadline_s = max(DEADLINE_S, size / SLOWEST_BYTES_PER_S)
    for place in _places(package, options, index):
        # A thread that has been given up may still write to the file that it has open.
        target.unlink(missing_ok=True)
        fetch = functools.partial(_fetch, place, name, size, options, target)
        fault = ""
        try:
            # Nothing but a thread ends a connection in every phase.
            call_within(fetch, deadline_s, "it did not send the whole file")
        except Exception as error:  # urllib, http, html and pathlib share no narrower one for what a place can do
            fault = _fault(error)
        yield Candidate(PASSWORD.sub("", place), fault)


def _places(package: str, options: Mapping[str, str], index: IndexName) -> list[str]:
    """Return the folders and addresses that may have a package, in the order in which they are read."""
    places = options.get("find-links", "").split()
    if options.get("no-index", "").lower() in FALSE:
        if index == "npm":
            # The path of a file of a registry is the same everywhere: /PACKAGE/-/FILE.
            places.append(f"{npm_registry(os.environ).rstrip('/')}/{package}/-/")
        else:
            indexes = [options.get("index-url") or PUBLIC_INDEX, *options.get("extra-index-url", "").split()]
            places += [f"{each.rstrip('/')}/{package}/" for each in indexes]
    # Folders first: an index that cannot be reached costs its time limit.
    return sorted(map(_as_url, places), key=lambda url: not url.startswith("file:"))


def npm_registry(environment: Mapping[str, str]) -> str:
    """Return the address of npm's registry: that of the environment, else of ~/.npmrc, else the public one."""
    for name, value in environment.items():
        if name.lower() == "npm_config_registry" and value:
            return value
    try:
        lines = Path("~/.npmrc").expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, RuntimeError):
        lines = []
    settings = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    return settings.get("registry") or PUBLIC_NPM_REGISTRY


def _fault(error: Exception) -> str:
    """Return why a place could not be read, in one line without passwords."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    elif isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    text = str(error)
    if isinstance(error, http.client.HTTPException):
        text = f"its answer is not that of a web server, {type(error).__name__}: {text}"
    return PASSWORD.sub("", " ".join(text.split()) or type(error).__name__)[:LONGEST_FAULT]


def pip_options() -> dict[str, str]:
    """Return pip's configuration by the name of the option: its files, and above them the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""  # an environment without pip
    return parse_options(listed, os.environ)


def parse_options(listed: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Combine the lines of `pip config list` with the variables PIP_*, as pip does for `pip download`."""
    ranked: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        key, equals, text = line.partition("=")
        section, _, option = key.rpartition(".")
        if equals and section in ("global", "download"):
            rank = int(section == "download")
            try:
                value = str(ast.literal_eval(text))
            except (ValueError, SyntaxError):
                continue
            if rank >= ranked.get(option, (0, ""))[0]:
                ranked[option] = (rank, value)
    options = {option: value for option, (_, value) in ranked.items()}
    names = {name: name.removeprefix("PIP_").lower().replace("_", "-") for name in environment if name[:4] == "PIP_"}
    return options | {option: environment[name] for name, option in names.items() if environment[name]}


class _Links(html.parser.HTMLParser):
    """Collects the addresses of the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.found = "", list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href")
        if tag == "base" and address:
            self.base = address
        elif tag == "a" and address:
            self.found.append(address)


def _fetch(place: str, name: str, size: int, options: Mapping[str, str], target: Path) -> None:
    """Write the file from a folder, from a registry of npm, or by the link of a page.

    Raises OSError, also where it is not there.
    """
    if place.startswith("file:"):
        path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(place).path))
        if path.is_dir() and (path / name).is_file():
            return _download(_as_url(str(path / name)), size, options, target)
        if path.is_dir() and (path / "index.html").is_file():
            place = _as_url(str(path / "index.html"))
        elif path.is_dir():
            raise FileNotFoundError(f"it has no {name}")
    if place.endswith("/-/"):
        return _download(place + name, size, options, target)
    links = _Links()
    with _open(place, options) as answer:
        links.feed(answer.read(LARGEST_PAGE).decode("utf-8", "replace"))
    for link in links.found:
        address, _ = urllib.parse.urldefrag(urllib.parse.urljoin(urllib.parse.urljoin(place, links.base), link))
        parts = urllib.parse.urlsplit(address)
        if urllib.parse.unquote(parts.path.rpartition("/")[2]) != name:
            continue
        if parts.scheme in ("http", "https") or (parts.scheme == "file" and place.startswith("file:")):
            return _download(address, size, options, target)
    raise FileNotFoundError(f"it has no {name}")


def _download(address: str, size: int, options: Mapping[str, str], target: Path) -> None:
    """Write at most one byte more than `size`. Raises OSError."""
    left = size + 1
    with target.open("xb") as file, _open(address, options) as answer:
        while left and (piece := answer.read(min(left, PIECE_BYTES))):
            file.write(piece)
            left -= len(piece)


def _open(address: str, options: Mapping[str, str]) -> IO[bytes]:
    """Open what is at an address. Raises OSError."""
    parts = urllib.parse.urlsplit(address)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    request = urllib.request.Request(urllib.parse.urlunsplit(bare), headers={"Accept": "text/html, */*"})
    if credentials := _credentials(parts):
        # Not sent on to where this host may redirect.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=_tls(parts, options))]
    if proxy := options.get("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    answer: IO[bytes] = urllib.request.build_opener(*handlers).open(request, timeout=TIME_LIMIT_S)
    return answer


def _credentials(parts: urllib.parse.SplitResult) -> str:
    """Return USER:PASSWORD of an address, or else of the user's netrc; "" where there is neither."""
    if parts.username is not None:
        return f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return ""
    return f"{found[0]}:{found[2]}" if found else ""


def _tls(parts: urllib.parse.SplitResult, options: Mapping[str, str]) -> ssl.SSLContext:
    """Return how a server is verified: by pip's `cert`; a `trusted-host` is not, and the caller checks the content."""
    certificates = options.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE")
    is_folder = certificates is not None and Path(certificates).is_dir()
    context = ssl.create_default_context(
        cafile=None if is_folder else certificates, capath=certificates if is_folder else None
    )
    host = parts.netloc.rpartition("@")[2]
    if {host, parts.hostname} & set(options.get("trusted-host", "").split()):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if own := options.get("client-cert"):
        context.load_cert_chain(own)
    return context


def _as_url(place: str) -> str:
    """Return the address of a folder; a home folder that is not known is left as a folder named `~USER`."""
    if "://" in place or place.startswith("file:"):
        return place
    return Path(os.path.expanduser(place)).absolute().as_uri()
