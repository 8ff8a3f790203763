"""A small OpenAI-compatible chat server on 127.0.0.1 that fails as it is told to.

`trouble` is a list of faults, one per request in the order in which they come, "ok" or none being
health: 429, 500, 400 … (a status), "hang", "drop" (a closed connection), "garbage" (no JSON),
"empty" (JSON, but no completion), "die" (this and every later request is dropped).
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """with ChatServer(reply) as server: server.url; reply(messages, body) makes the text."""

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
        try:
            time.sleep(0.01)
            self.respond(http, fault, body)
        except OSError:  # a client that has lost patience has hung up
            pass
        finally:
            with self.lock:
                self.at_once -= 1

    def respond(self, http, fault, body):
        if fault == "drop":
            http.close_connection = True
            http.connection.close()
            return
        if fault == "hang":
            time.sleep(1.0)
        status = fault if isinstance(fault, int) else 200
        content = {"error": {"message": f"told to say {status}"}}
        if status == 200:
            message = {"role": "assistant", "content": self.reply(body["messages"], body)}
            content = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            content["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        payload = {"garbage": b"<html>", "empty": b"{}"}.get(fault, json.dumps(content).encode())
        http.send_response(status)
        if status == 429 and self.retry_after is not None:
            http.send_header("Retry-After", self.retry_after)
        http.send_header("Content-Length", str(len(payload)))
        http.end_headers()
        http.wfile.write(payload)
