"""`HttpEngine`: a ``vllm serve`` driven by its development endpoints. Only control messages go this way, no tensors.

Endpoints and forms are those of vLLM 0.17 to 0.33 (``vllm/entrypoints/serve``): ``POST /collective_rpc`` with
``{"method", "args"}`` answers ``{"results": [...]}``; ``/reset_prefix_cache?…``, ``/sleep?level=&mode=`` and
``/wake_up?tags=`` take query parameters; ``/init_weight_transfer_engine`` takes ``{"init_info": {...}}``, and ``GET
/server_info`` tells the configuration. Sleeping at level 0 pauses. ``/pause`` is for 0.15 and 0.16 only: that of 0.33
refuses new requests, and ``/resume`` would also start an engine of which some memory still sleeps.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from .errors import MismatchError, UserError
from .live_engines import TIMEOUT, InFlight, PausedBefore, until_reset
from .live_started import Started, started

SETTLED = 60.0
"""Seconds that a server may take at least to tell how it was started: the first time vLLM looks at the whole machine
too."""


class HttpEngine:
    """A server of vLLM, started with ``VLLM_SERVER_DEV_MODE=1`` and for live weights.

    Whoever reaches these endpoints controls the server: leave them open to the trainer only.

    Args:
        url: of the server, ``http://host:port``.
        timeout: seconds that a request may take.
        headers: to send with each, for a proxy that asks for them.

    Raises:
        UserError: not such a URL.
    """

    by_reference = False

    def __init__(self, url: str, timeout: float = TIMEOUT, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is not the URL of a server: it should look like http://127.0.0.1:8000")
        self.name = url.rstrip("/")
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._path, self._secure = parts.path.rstrip("/"), parts.scheme == "https"
        self._timeout, self._headers = timeout, dict(headers or {})
        self._before = PausedBefore(self.name)

    def suits(self, vllm: str | None, in_flight: InFlight) -> None:
        self._before.check(vllm, in_flight)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        answer = self._post("/collective_rpc", {"method": method, "args": list(arguments)})
        if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
            raise UserError(f"{self.name} answered {method} with {str(answer)[:200]!r}: it is not a vLLM server")
        return list(answer["results"])

    def started(self) -> Started | None:
        try:
            answer = self._ask("GET", "/server_info?config_format=json", at_least=SETTLED)
        except (MismatchError, UserError):  # there is no such endpoint, as behind some proxies
            return None
        return started(answer.get("vllm_config")) if isinstance(answer, dict) else None

    def transfer(self, info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": info})

    def pause(self, in_flight: InFlight) -> None:
        self._post(
            "/pause?clear_cache=false" if self._before else f"/sleep?{urlencode({'level': 0, 'mode': in_flight})}"
        )

    def reset_cache(self, connector: bool) -> None:
        until_reset(lambda: self._reset(connector))
        if not self._before:
            self._post("/reset_encoder_cache")

    def _reset(self, connector: bool) -> bool:
        external = "&reset_external=true" if connector else ""
        answer = self._post(f"/reset_prefix_cache?reset_running_requests=true{external}")
        return not isinstance(answer, dict) or bool(answer.get("success", True))  # 0.24 does not say

    def resume(self) -> None:
        self._post("/resume" if self._before else "/wake_up?tags=scheduling")

    def sleep(self, level: int) -> None:
        self._before.refuse("sleep")
        self._post(f"/sleep?{urlencode({'level': level, 'mode': 'abort'})}")

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._before.refuse("wake up")
        self._post(f"/wake_up?{urlencode([('tags', tag) for tag in tags or ()])}".rstrip("?"))

    def address(self) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((self._host, self._port))
            return str(probe.getsockname()[0])

    def scheduled(self) -> dict[str, int] | None:
        return None

    def _post(self, path: str, body: Any = None) -> Any:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: Any = None, at_least: float = 0.0) -> Any:
        timeout = max(self._timeout, at_least)
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout)
        headers = {"Content-Type": "application/json", **self._headers}
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode(errors="replace")
        except TimeoutError:
            raise TimeoutError(f"{self.name} did not answer {_endpoint(path)} within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ConnectionError(f"{self.name} cannot be reached ({reason}): is `vllm serve` up there?") from None
        finally:
            connection.close()
        if status == 404:
            raise UserError(
                f"{self.name} has no {_endpoint(path)}: start `vllm serve` with VLLM_SERVER_DEV_MODE=1 in its "
                "environment"
            )
        said = f"{self.name} answered {_endpoint(path)}"
        if status != 200:
            raise MismatchError(f"{said} with status {status}: {text[:500]}")
        try:
            return json.loads(text) if text else None
        except json.JSONDecodeError:
            raise UserError(
                f"{self.name} answered {_endpoint(path)} with {text[:200]!r}: is it a vLLM server?"
            ) from None


def _endpoint(path: str) -> str:
    return path.partition("?")[0]
