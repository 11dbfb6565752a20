"""Stores for the tests of URLs: a web server that can be told to fail, and moto's S3.

with serve(folder) as server:
    server.faults["shard-000001.tar"] = Fault.CUT
    ... server.url ...
    assert server.requests == [("GET", "shard-000001.tar")]

with s3(folder) as url: ...
"""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote
from urllib.request import Request, urlopen

BUCKET = "bucket"


class Fault(Enum):
    """What a server does with a file instead of sending it."""

    GONE = auto()  # 404
    DENIED = auto()  # 403
    ERROR = auto()  # 503
    RESET = auto()  # closes the connection without an answer
    CUT = auto()  # sends half of the body
    SHORT = auto()  # a whole answer, but of half the file
    LONG = auto()  # a whole answer with bytes after the file's
    ENDLESS = auto()  # a body without an end
    WRONG = auto()  # a flipped bit in the middle
    STALL = auto()  # sends half of the body, then nothing more
    MUTE = auto()  # accepts the connection, never answers
    SLOW = auto()  # trickles, one byte at a time
    REDIRECT = auto()  # to `Server.elsewhere`


@dataclass
class Server:
    """A web server. Change `faults`, by file name, while it runs: each holds until it is removed.

    times: how often a fault still happens, by file name; without an entry always.
    requests: (method, file name) of all requests; "" is the listing.
    elsewhere: where Fault.REDIRECT leads.
    dead: set when it is to close every connection without an answer.
    """

    url: str
    faults: dict[str, Fault] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    elsewhere: str = ""
    dead: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def gets(self, name: str) -> int:
        """How often a file was asked for."""
        return self.requests.count(("GET", name))

    def fault(self, name: str) -> Fault | None:
        """The fault of a request, which uses up one of its times."""
        if self.dead.is_set():
            return Fault.RESET
        with self.lock:
            if name not in self.faults or self.times.get(name) == 0:
                return None
            if name in self.times:
                self.times[name] -= 1
            return self.faults[name]


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, server_state: Server, **options: object) -> None:
        self.state = server_state
        super().__init__(*arguments, **options)  # type: ignore[arg-type]

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(super().do_HEAD)

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def _answer(self, well: object) -> None:
        name = unquote(self.path.rpartition("/")[2])
        self.state.requests.append((self.command, name))
        fault = self.state.fault(name)
        if fault is None:
            assert callable(well)
            well()
        elif fault in _STATUS:
            self.send_error(_STATUS[fault])
        elif fault is Fault.RESET:
            self.close_connection = True
        elif fault is Fault.MUTE:
            self.state.stopped.wait()
            self.close_connection = True
        elif fault is Fault.REDIRECT:
            self.send_response(302)
            self.send_header("Location", self.state.elsewhere)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(fault, Path(self.translate_path(self.path)).read_bytes())

    def _send(self, fault: Fault, body: bytes) -> None:
        half = len(body) // 2
        if fault is Fault.SHORT:
            body = body[:half]
        elif fault is Fault.LONG:
            body += b"more"
        elif fault is Fault.WRONG:
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        self.close_connection = True
        self.send_response(200)
        if fault is not Fault.ENDLESS:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self._send_body(fault, body)

    def _send_body(self, fault: Fault, body: bytes) -> None:
        half = len(body) // 2
        try:
            if fault is Fault.ENDLESS:
                while not self.state.stopped.is_set():
                    self.wfile.write(body)
            elif fault is Fault.SLOW:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if self.state.stopped.wait(0.02):
                        return
            else:
                self.wfile.write(body[:half] if fault in (Fault.CUT, Fault.STALL) else body)
                if fault is Fault.STALL:
                    self.state.stopped.wait()
        except ConnectionError:  # the reader has had enough
            pass


_STATUS = {Fault.GONE: 404, Fault.DENIED: 403, Fault.ERROR: 503}


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # many readers come at once


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder at http://127.0.0.1, with listings and without ranges, as `python -m http.server` does."""
    state = Server("")
    handler = partial(_Handler, server_state=state, directory=str(folder))
    with _Threads(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            state.stopped.set()
            server.shutdown()
            thread.join()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """Put the files of a folder into moto's S3 and yield their URL; the environment has its endpoint and keys.

    `put` changes what is there.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints every request
    environment = {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()  # of other tests' buckets
            _client().create_bucket(Bucket=BUCKET)
            for path in sorted(folder.iterdir()):
                put(path.name, path.read_bytes())
            yield f"s3://{BUCKET}/shards"
    finally:
        server.stop()


def put(name: str, content: bytes) -> None:
    """Store a file beside the others of `s3`."""
    _client().put_object(Bucket=BUCKET, Key=f"shards/{name}", Body=content)


def _client() -> Any:
    import boto3

    return boto3.client("s3")
