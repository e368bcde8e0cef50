"""How the check of vLLM's server starts and ends one, with a program in vLLM's place."""

from __future__ import annotations

import os
import select
import sys

import check_endpoint
import pytest
from checking import WrongResultError

BROKEN = "import sys; sys.exit('no engine, because of a test')"
# Answers /health, and has a child that SIGTERM does not end.
STUBBORN = """
import http.server, os, signal, subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
process = subprocess.Popen(
    [sys.executable, "-c", child + "; time.sleep(600)"], stdout=subprocess.PIPE
)
process.stdout.readline()
open(os.environ["CHILD"], "w").write(str(process.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("localhost", port), Handler).serve_forever()
"""


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`server` of a program that is `vllm`."""

    def of(program: str):
        script = tmp_path / "vllm"
        script.write_text(f"#!{sys.executable}\n{program}")
        script.chmod(0o755)
        monkeypatch.setattr(check_endpoint.sysconfig, "get_path", lambda name: str(tmp_path))
        monkeypatch.setattr(
            check_endpoint, "environment", lambda _: {**os.environ, "CHILD": str(tmp_path / "pid")}
        )
        return check_endpoint.server(tmp_path / "model", tmp_path / "server.log", ())

    return of


def test_a_server_that_ends_is_named_with_its_last_words(serve):
    with (
        pytest.raises(WrongResultError, match=r"the server ended, .*server\.log: no engine"),
        serve(BROKEN),
    ):
        pass


def test_a_check_that_fails_leaves_no_process(serve, tmp_path):
    children = []

    def check():
        with serve(STUBBORN):
            children.append(os.pidfd_open(int((tmp_path / "pid").read_text())))
            raise WrongResultError("another token")

    with pytest.raises(WrongResultError, match="another token"):
        check()

    # Readable once the process has ended.
    select.select(children, [], [])
    os.close(*children)
