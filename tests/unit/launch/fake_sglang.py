"""Stands in for the server environment's Python: answers /health on --port, or does what FAKE_SERVER says."""

import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    port = int(sys.argv[sys.argv.index("--port") + 1])
    behaviour, _, argument = os.environ.get("FAKE_SERVER", "").partition(":")
    if behaviour == "dies" or (behaviour == "once" and Path(argument).exists()):
        print("loading\nnot enough memory", flush=True)
        sys.exit(1)
    if behaviour == "once":
        Path(argument).touch()
    if behaviour == "never":
        print("still loading", flush=True)
        time.sleep(60)
    if behaviour == "parent":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(argument).write_text(str(child.pid))
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
