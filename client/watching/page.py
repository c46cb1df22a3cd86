"""A web page of a run's history, served on loopback: one file, which draws what ``/history.json`` tells."""

from __future__ import annotations

import importlib.resources
import io
import json
import math
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ...sharding.chronicle import steps_per_second
from ...sharding.errors import StepwellError
from ..demo.picture import smoothed
from ..transport import ServiceHandle
from .panels import drawn, write_csv
from .top import NUM_ROWS

LOOPBACK = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    ),
    "X-Content-Type-Options": "nosniff",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page of one service; see :meth:`serve_forever` and ``shutdown``.

    Args:
        service: The service.
        port: Where, on loopback alone; 0 for any that is free.

    Raises:
        OSError: If the port is taken.
    """

    daemon_threads = True

    def __init__(self, service: ServiceHandle, port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.service = service
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PageServer
    timeout = 60.0

    def do_GET(self) -> None:
        """The page, or its numbers."""
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in (LOOPBACK, "localhost"):
            # Else a page from elsewhere whose name leads here could read the answer.
            self._reply(403, "text/plain", f"open it as {self.server.url}\n")
        elif self.path == "/":
            page = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
            self._reply(200, "text/html", page)
        elif self.path in ("/history.json", "/history.csv"):
            self._reply_history()
        else:
            self._reply(404, "text/plain", "there are /, /history.json and /history.csv\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""

    def _reply_history(self) -> None:
        try:
            if self.path == "/history.json":
                self._reply(200, "application/json", json.dumps(page_data(self.server.service), allow_nan=False))
            else:
                table = io.StringIO()
                write_csv(self.server.service.history(), table)
                self._reply(200, "text/csv", table.getvalue())
        except StepwellError as error:
            self._reply(503, "application/json", json.dumps({"error": str(error)}))

    def _reply(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def page_data(service: ServiceHandle) -> dict[str, Any]:
    """What the page draws: numbers about the service, and per panel its lines, all of them finite."""
    columns, status = service.history(), service.status()
    panels = [
        {
            "title": panel.title,
            "is_log": panel.is_log,
            "is_noisy": panel.is_noisy,
            "series": [
                {"name": name, "steps": steps, "values": values, "line": smoothed(values) if panel.is_noisy else values}
                for name, (steps, values) in series.items()
            ],
        }
        for panel, series in drawn(columns)
    ]
    recent = {name: values[-NUM_ROWS:] for name, values in columns.items()}
    return {"name": status["name"], "status": _told(status, steps_per_second(recent)), "panels": panels}


def _told(status: Mapping[str, Any], speed: float | None) -> dict[str, Any]:
    told = {"rule": status["rule"] or "no job yet", "step": status["step"]}
    if status["rule"] is not None:
        told |= {
            "skipped": status["skipped_steps"],
            "workers": status["world_size"],
            "parameters": f"{status['numel']:,}",
        }
    told |= {"shards": status["num_shards"], "generation": status["generation"]}
    if speed is not None and math.isfinite(speed):
        told["steps/s"] = f"{speed:.3g}"
    return told
