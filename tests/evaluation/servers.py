"""An OpenAI-compatible server that stumbles, and a client for it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_prolong.evaluation.client import Client


class Server(ThreadingHTTPServer):
    """Answers like an OpenAI-compatible server; the first `stumbles` requests fail with 503.

    `refused_after`, if not None: so many requests are answered, then none. `whole_answer`, if not None, is the
    JSON answer to everything; `page`, if any, an HTML page that is, with its status.
    """

    def __init__(self, answer: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.stumbles = 0
        self.refused_after: int | None = None
        self.answer = answer
        self.whole_answer: object = None
        self.page: tuple[int, str] | None = None
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "tiny", "max_model_len": 512}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body))
            stumble = self.server.stumbles > 0
            most = self.server.refused_after
            refuse = most is not None and len(self.server.requests) > most
            self.server.stumbles -= stumble
        if stumble:
            self._reply(503, {"error": "busy"})
        elif "no key" in json.dumps(body):
            self._reply(401, {"error": "unauthorized"})
        elif refuse or "too long" in json.dumps(body):
            self._reply(400, {"error": "maximum context length is 512 tokens"})
        elif self.path == "/v1/completions":
            self._reply(200, {"choices": [{"text": f"echo {body['prompt']}\nmore"}]})
        else:
            text = self.server.answer or f"chat {body['messages'][0]['content']}"
            self._reply(200, {"choices": [{"message": {"content": text}}]})

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        whole = self.server.whole_answer
        payload = json.dumps(content if whole is None else whole).encode()
        kind = "application/json"
        if self.server.page is not None:
            status, kind, payload = self.server.page[0], "text/html", self.server.page[1].encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Retry-After-Ms", "10")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: Any) -> None:
        pass


def client(server: Server, **options: Any) -> Client:
    return Client(f"http://127.0.0.1:{server.server_port}/v1", timeout_seconds=20.0, **options)
