# SPDX-License-Identifier: AGPL-3.0-or-later
"""A W&B server on loopback that knows enough to start a run and take its history, and every way of being broken."""

import gzip
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILES = {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}}


class Stub:
    """Use as a context manager. `mood`: fine, black_hole (accepts, never answers), error (HTTP 500), gone (closed).

    after: requests answered well before the mood sets in. history: rows of metrics that arrived.
    """

    def __init__(self, mood: str = "fine", after: int = 0) -> None:
        self.mood, self.after, self.requests, self.history = mood, after, 0, []
        self._over = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                stub.answer(self)

            do_GET = do_PUT = do_POST

            def log_message(self, *args: object) -> None:
                """Nothing: the tests read what training says, not what this server does."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests += 1
        mood = self.mood if self.requests > self.after else "fine"
        if mood == "black_hole":
            self._over.wait(60)
        if mood in ("black_hole", "gone"):
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        content = b'{"data": {}}' if mood == "fine" else b"out of order"
        if mood == "fine" and "file_stream" in request.path:
            chunk = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.history += [json.loads(line) for line in chunk.get("content", [])]
        elif b"createRunFiles" in body:
            content = json.dumps(FILES).encode()
        request.send_response(200 if mood == "fine" else 500)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def __enter__(self) -> "Stub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def die(self) -> None:
        """Close the port, as a server that is shut down."""
        self.mood, self.after = "gone", 0
        self.server.shutdown()
        self.server.server_close()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self.server.socket.fileno() >= 0:
            self.die()

    def wait_for(self, rows: int, seconds: float = 20) -> None:
        """Until so many rows of history have arrived."""
        end = time.monotonic() + seconds
        while len(self.history) < rows and time.monotonic() < end:
            time.sleep(0.05)
