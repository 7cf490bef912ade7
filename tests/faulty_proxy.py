"""An HTTP server between a client and the real S3 server, which fails requests on order."""

import http.client
import random
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

FAULTS = ('500', '503', 'reset', 'cut')  # what comes and goes; a 'stall' is never answered


def flaky(seed: int, share: float = 0.2) -> Callable[[str], str | None]:
    """One request in five fails, in one of four ways; a request that is made again may well succeed."""
    draw, lock = random.Random(seed), threading.Lock()

    def fault(path: str) -> str | None:
        with lock:
            return draw.choice(FAULTS) if draw.random() < share else None

    return fault


def dies_after(count: int, of: str = '.mds', how: str = 'reset') -> Callable[[str], str | None]:
    """Nothing is answered any more, once so many files of that name have been asked for."""
    seen: set[str] = set()

    def fault(path: str) -> str | None:
        if path.endswith(of):
            seen.add(path)
        return how if len(seen) > count else None

    return fault


class FaultyProxy:
    """A proxy that runs until it is closed.

    Args:
        upstream: the real server's address.
        fault: gives for a path None, or how its request fails; may be changed at any time.

    Attributes:
        endpoint: its own address.
        asked: ``(path, fault)`` of each request.
    """

    def __init__(self, upstream: str, fault: Callable[[str], str | None] = lambda path: None):
        self.upstream, self.fault = urlparse(upstream).netloc, fault
        self.asked: list[tuple[str, str | None]] = []
        self._closed = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                proxy._answer(self)

            do_HEAD = do_PUT = do_GET

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From now on connections are refused."""
        self._closed.set()
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlparse(request.path).path
        fault = self.fault(path)
        self.asked.append((path, fault))
        body = request.rfile.read(int(request.headers.get('Content-Length') or 0))
        if fault == 'stall':
            self._closed.wait(600)
        if fault in ('reset', 'stall'):
            self._hang_up(request)
            return
        if fault in ('500', '503'):
            request.send_response(int(fault))
            request.send_header('Content-Length', '0')
            request.end_headers()
            return
        upstream = http.client.HTTPConnection(self.upstream, timeout=60)
        upstream.request(request.command, request.path, body, dict(request.headers))
        answer = upstream.getresponse()
        data = answer.read()
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ('transfer-encoding', 'connection', 'date', 'server'):
                request.send_header(name, value)
        request.end_headers()
        if fault == 'cut':
            request.wfile.write(data[: len(data) // 2])
            self._hang_up(request)
        else:
            request.wfile.write(data)
        upstream.close()

    @staticmethod
    def _hang_up(request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.wfile.flush()
        time.sleep(0.01)
        request.connection.shutdown(socket.SHUT_RDWR)
