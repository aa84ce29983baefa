"""A stand-in for SandboxFusion: the form of its /run_code, and programs as plain processes behind it."""

import base64
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


def run_code(request: dict[str, Any]) -> tuple[int, bytes]:
    """Returns status and body as the service would."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {
            **request["files"],
            "main.py": base64.b64encode(request["code"].encode()),
        }.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        began = time.monotonic()
        code, status = None, "Finished"
        try:
            done = subprocess.run(
                [sys.executable, "main.py"],
                cwd=folder,
                input=request["stdin"].encode(),
                capture_output=True,
                timeout=request["run_timeout"],
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            status, out, err = "TimeLimitExceeded", error.stdout or b"", error.stderr or b""
        result = {
            "status": status,
            "execution_time": time.monotonic() - began,
            "return_code": code,
            "stdout": out.decode(errors="replace"),
            "stderr": err.decode(errors="replace"),
        }
    answer = {"status": "Success" if code == 0 else "Failed", "message": "", "compile_result": None}
    return 200, json.dumps({**answer, "run_result": result, "executor_pod_name": None, "files": {}}).encode()


@contextmanager
def service(answer: Answer = run_code) -> Iterator[str]:
    """Yields the address of a service that answers so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/run_code"
            status, body = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
