"""`vllm serve` as far as a trainer drives it: the development endpoints of vLLM 0.24, over `standin_vllm`.

Paths, query parameters and bodies are those of ``vllm/entrypoints/serve/dev`` (0.24.0; 0.26.0 where ``told`` says that
resets are reported; 0.15.0 where ``earlier`` says that the server holds requests back in front of the scheduler). As a
program, ``python standin_server.py SEED TP``, it prints its port and serves until its input ends.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from standin_vllm import LLM


class Server:
    """Serves an engine on a free port of this machine.

    Args:
        llm: may be replaced while the server is up, like a replica that was started anew.
        dev: whether ``VLLM_SERVER_DEV_MODE=1``.
        told: whether the answer to a reset says how it went.
        earlier: whether ``/pause`` holds requests back here, and nothing else does.
    """

    def __init__(self, llm, dev=True, told=False, earlier=False):
        self.earlier, self.open = earlier, threading.Event()
        self.open.set()
        self.llm, self.dev, self.told = llm, dev, told
        self.log, self.slow, self.broken = [], {}, {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path, query, body):
        """Status and JSON."""
        core = self.llm.core
        self.log.append((path, query, body))
        if path == "/generate":
            self.open.wait()
            return 200, core.add(body["prompt"]).result()
        if path == "/state":
            return 200, {"paused": core.paused, "waiting": len(core.waiting), "running": len(core.running)}
        if not self.dev:
            return 404, {"detail": "Not Found"}
        key = body["method"] if path == "/collective_rpc" else path
        time.sleep(self.slow.get(key, 0))
        if key in self.broken:
            return self.broken[key]
        try:
            return self._controlled(core, path, query, body)
        except Exception as error:
            return 500, {"error": {"message": str(error), "type": type(error).__name__, "code": 500}}

    def _controlled(self, core, path, query, body):
        if path == "/collective_rpc":
            results = core.do(core.rpc, body["method"], tuple(body.get("args", [])))
            return 200, {"results": [r if r is None or isinstance(r, (dict, list)) else str(r) for r in results]}
        if self.earlier and path in ("/pause", "/resume"):
            self.open.set() if path == "/resume" else self.open.clear()
            return 200, core.do(core.abort)
        if self.earlier and path in ("/sleep", "/wake_up"):
            raise NotImplementedError("it would go on with requests")
        if path == "/init_weight_transfer_engine":
            core.do(core.rpc, path[1:], (), body)
            return 200, {"message": "Weight transfer initialized"}
        if path == "/server_info":
            return 200, {"vllm_config": json.loads(json.dumps(core.vllm_config, default=vars))}
        if path == "/pause":
            core.do(core.pause, query.get("mode", ["abort"])[0], True)
            return 200, {"status": "paused"}
        if path == "/resume":
            core.do(setattr, core, "paused", False)
            return 200, {"status": "resumed"}
        if path == "/reset_prefix_cache":
            asked = [query.get(f"reset_{what}", ["false"])[0] == "true" for what in ("running_requests", "external")]
            done = core.do(core.reset, *asked)
            return 200, {"success": done} if self.told else None
        if path == "/reset_encoder_cache" and not self.earlier:
            return 200, core.do(core.reset_encoder)
        if path == "/sleep":
            core.do(core.sleep, int(query.get("level", ["1"])[0]), query.get("mode", ["abort"])[0])
            return 200, None
        if path == "/wake_up":
            core.do(core.wake_up, query.get("tags"))
            return 200, None
        return 404, {"detail": "Not Found"}


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            parts = urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = server.answer(parts.path, parse_qs(parts.query), json.loads(text) if text else None)
            data = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has gone
                pass

        def log_message(self, *_):
            pass

    return Handler


if __name__ == "__main__":
    from standin_trainer import packed

    seed, tp = map(int, sys.argv[1:])
    served = Server(LLM(packed(seed), tp))
    print(served.url, flush=True)
    sys.stdin.read()
