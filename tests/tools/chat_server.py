"""A small OpenAI-compatible chat server on 127.0.0.1 that fails as it is told to.

`trouble` is a list of faults, one per request in the order in which they come, "ok" or none being
health: 429, 500, 400 … (a status), "hang" (until the client has hung up), "drop" (a closed
connection), "garbage" (no JSON), "empty" (JSON, but no completion), "die" (this and every later
request is dropped). reply(messages, body) makes the text, or (text, finish_reason), or the words of
an error, as a dict, that goes with status 400.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """with ChatServer(reply) as server: server.url."""

    def __init__(self, reply=lambda messages, body: "echo " + messages[-1]["content"], trouble=()):
        self.reply, self.trouble, self.bodies, self.times = reply, list(trouble), [], []
        self.headers, self.retry_after, self.at_once, self.most_at_once = [], None, 0, 0
        self.lock, self.dead = threading.Lock(), False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        serve = {"target": self.server.serve_forever, "kwargs": {"poll_interval": 0.02}}
        threading.Thread(**serve, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, http):
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self.lock:
            fault = self.trouble.pop(0) if self.trouble else "ok"
            self.dead = self.dead or fault == "die"
            fault = "drop" if self.dead else fault
            self.bodies.append(body)
            self.headers.append(dict(http.headers))
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.01)
        text = self.reply(body["messages"], body) if fault == "ok" else ""
        with self.lock:  # before the client can know: its next request is not one more at once
            self.at_once -= 1
        with contextlib.suppress(OSError):  # a client that has lost patience has hung up
            self.respond(http, fault, text)

    def respond(self, http, fault, text):
        if fault == "hang":
            http.rfile.read(1)  # nothing comes: it ends with the connection
        if fault in ("drop", "hang"):
            http.close_connection = True
            http.connection.close()
            return
        status = fault if isinstance(fault, int) else 400 if isinstance(text, dict) else 200
        content = text if isinstance(text, dict) else {"message": f"told to say {status}"}
        content = {"error": content}
        if status == 200:
            text, reason = text if isinstance(text, tuple) else (text, "stop")
            message = {"role": "assistant", "content": text}
            content = {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}
            content["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        payload = {"garbage": b"<html>", "empty": b"{}"}.get(fault, json.dumps(content).encode())
        http.send_response(status)
        if status == 429 and self.retry_after is not None:
            http.send_header("Retry-After", self.retry_after)
        http.send_header("Content-Length", str(len(payload)))
        http.end_headers()
        http.wfile.write(payload)
