"""Calls of workers through vLLM's weight transfer, which passes calls on but brings no answers back.

So each call says where the trainer listens, and every worker leaves its answer there before it lets vLLM go on.
`Transfer` makes the calls, `reply` is the worker's end.

All calls go by ``init_weight_transfer_engine``. vLLM's three others, ``start_weight_update``, ``update_weights`` and
``finish_weight_update``, raise where their order is not kept, as by a trainer that hung while another one took over;
and what a worker raises does harm (`live_started`). Our calls name the update they belong to, which needs no order.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socketserver
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from .live_engines import Engine

BACKEND = "nvfp4"
"""The name of the weight-transfer engine in vLLM, as in ``weight_transfer_config={"backend": "nvfp4"}``."""

PATIENCE = 30.0
"""Seconds that a worker waits for a trainer that takes no answer, such as one that was stopped."""

logger = logging.getLogger(__name__)


@dataclass
class Call:
    """What vLLM passes on to each worker.

    Args:
        method: of `vllm.LiveWeights`.
        arguments: of it.
        key: of the call, where answers are left.
        address, port: of the trainer.
    """

    method: str
    arguments: list[Any]
    key: str
    address: str
    port: int


class Transfer:
    """Calls the workers of an engine that was started with ``weight_transfer_config={"backend": "nvfp4"}``.

    Args:
        engine: which passes the calls on.
        address: of this machine, as the workers reach it; None: found out.
    """

    def __init__(self, engine: Engine, address: str | None = None) -> None:
        self._engine, self._address = engine, address
        self._replies: _Replies | None = None

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `vllm.LiveWeights` on every worker; its answers.

        Raises:
            ConnectionError: a worker could not bring its answer.
            Exception: vLLM's, in its words.
        """
        if self._replies is None:
            self._replies = _Replies()
        address, port = self._address or self._engine.address(), self._replies.port
        with self._replies.expected() as (key, replies):
            self._engine.transfer(vars(Call(method, list(arguments), key, address, port)))
        workers = max((reply["workers"] for reply in replies), default=0)
        if not replies or len(replies) < workers:
            raise ConnectionError(
                f"{len(replies)} of {workers or 'the'} workers of {self._engine.name} brought an answer to {method}: "
                f"those that did not could not reach this process at {address}:{port}, as the engine's log says. Name "
                'an address that they reach with Rollout.connect(…, address="…")'
            )
        return [reply["answer"] for reply in replies]

    def close(self) -> None:
        """Stop listening, until the next call."""
        if self._replies is not None:
            self._replies.close()
        self._replies = None


def reply(call: Call, answer: dict[str, Any], workers: int) -> None:
    """Leave a worker's answer to a call; if nobody takes it that is logged, and never raised.

    Args:
        call: that was answered.
        answer: as of `vllm.LiveWeights`.
        workers: how many are called.
    """
    connection = http.client.HTTPConnection(call.address, call.port, timeout=PATIENCE)
    try:
        connection.request("POST", f"/{call.key}", json.dumps({"answer": answer, "workers": workers}))
        status = connection.getresponse().status
        if status != 200:
            logger.warning("the trainer at %s:%d no longer waits for %s", call.address, call.port, call.method)
    except (OSError, http.client.HTTPException) as error:
        logger.warning(
            "the answer to %s did not reach the trainer at %s:%d (%s)", call.method, call.address, call.port, error
        )
    finally:
        connection.close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128  # all workers answer at once


class _Replies:
    """Takes answers on a free port of this machine."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Any]] = {}
        self._server = _Server(("", 0), _handler(self._waiting))
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @contextlib.contextmanager
    def expected(self) -> Iterator[tuple[str, list[Any]]]:
        """A key, and what is left there meanwhile."""
        key, replies = uuid.uuid4().hex, list[Any]()
        self._waiting[key] = replies
        try:
            yield key, replies
        finally:
            del self._waiting[key]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(waiting: dict[str, list[Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE

        def do_POST(self) -> None:
            replies = waiting.get(self.path[1:])
            if replies is not None:
                replies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(404 if replies is None else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
