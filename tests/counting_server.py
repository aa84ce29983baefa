"""A server with /generate alone, in a process of its own that can be killed, and that writes down what it was asked.

python tests/counting_server.py PORT LOG SECONDS

It answers one response at a time, each after SECONDS: the tokens are the prompt's. LOG gets a line "asked PROMPT" or
"answered PROMPT" for each response; a prompt that is only computed counts for neither. Standard library alone: it is
there within a fraction of a second.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TURN, WRITING = threading.Lock(), threading.Lock()


def completion(ids: list[int]) -> dict[str, Any]:
    return {
        "output_token_logprobs": [[-1.0, token_id, None] for token_id in ids],
        "finish_reason": {"type": "stop"},
        "weight_version": "ab-0",
    }


class Handler(BaseHTTPRequestHandler):
    log: str
    seconds: float

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = body["input_ids"]
        if body["sampling_params"]["max_new_tokens"]:
            self.note("asked", ids)
            with TURN:
                time.sleep(self.seconds)
                self.note("answered", ids)
        payload = json.dumps({"meta_info": completion(ids)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def note(self, what: str, ids: list[int]) -> None:
        with WRITING, open(self.log, "a") as file:
            file.write(f"{what} {ids[0]}\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


if __name__ == "__main__":
    port, Handler.log, Handler.seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    Server(("127.0.0.1", port), Handler).serve_forever()
