"""Calls in the background that cannot keep a program from ending: an engine may never answer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call in another thread, which does not keep the program from ending."""
    answer: Future[Any] = Future()
    threading.Thread(target=_fulfil, args=(answer, function, arguments), daemon=True).start()
    return answer


class Line:
    """Calls in another thread, in order and one at a time; none of them keeps the program from ending."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._waiting = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Let a call be made after those before."""
        answer: Future[Any] = Future()
        self._waiting.put((answer, function, arguments))
        return answer

    def close(self) -> None:
        """Let no more calls begin; one that goes on is not waited for."""
        with contextlib.suppress(queue.Empty):
            while True:
                waiting = self._waiting.get_nowait()
                if waiting is not None and waiting[0].cancel():
                    waiting[0].set_running_or_notify_cancel()  # or whoever waits for it would do so for ever
        self._waiting.put(None)

    def _run(self) -> None:
        while (call := self._waiting.get()) is not None:
            _fulfil(*call)


def _fulfil(answer: Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if answer.set_running_or_notify_cancel():
        try:
            answer.set_result(function(*arguments))
        except BaseException as error:
            answer.set_exception(error)
