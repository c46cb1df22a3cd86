"""The command line's commands for watching a service: plot, top and ui."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from ...server.commands import Address, Json, Name
from ...server.service import Service, connect
from ...sharding.chronicle import Columns
from ...sharding.errors import NotRegisteredError, ServiceTimeoutError, ShardLostError
from .page import PageServer
from .panels import write_csv
from .plot import draw
from .top import NUM_ROWS, frame

console = Console()


def plot(
    name: Name,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Picture to write (.png, .svg, .pdf). Default: NAME.png.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Table to write.")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Draw a run's loss, d, learning rates, gradient norm and seconds by phase, from the service's own history.

    With --csv alone the history is written as a table, and nothing is drawn.

    Example: stepwell plot trainer -o trainer.png --csv trainer.csv
    """
    columns = connect(name, address=address).history()
    if not columns:
        raise NotRegisteredError(f"service {name!r} has taken no step yet; there is nothing to draw")
    picture = Path(f"{name}.png") if out is None and csv is None else out
    if picture is not None:
        draw(picture, title=_title(name, columns), columns=columns)
    if csv is not None:
        with csv.open("w", newline="", encoding="utf-8") as file:
            write_csv(columns, file)
    written = [str(path) for path in (picture, csv) if path is not None]
    if as_json:
        typer.echo(json.dumps({"name": name, "rows": len(columns["step"]), "written": written}))
    else:
        console.print(f"{_title(escape(name), columns)}: {escape(', '.join(written))}", highlight=False, soft_wrap=True)


def top(
    name: Name,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    every_s: Annotated[float, typer.Option("--every-s", min=0.1, help="Seconds between two looks.")] = 1.0,
    address: Address = None,
) -> None:
    """Show live how a service does: steps per second, loss, d, where a step's time goes, memory. Ctrl-C ends it.

    Example: stepwell top trainer
    """
    service = connect(name, address=address)
    shown = _look(service)
    if once:
        console.print(shown)
        return
    try:
        with Live(shown, console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                try:
                    shown = _look(service)
                except (ShardLostError, ServiceTimeoutError) as error:
                    live.update(Group(shown, Text(f"no answer: {error}", style="yellow")), refresh=True)
                else:
                    live.update(shown, refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def ui(
    name: Name,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 for any that is free.")] = 8260,
    address: Address = None,
) -> None:
    """Serve a web page of a run's history to browsers on this machine. Ctrl-C ends it.

    From elsewhere: ssh -L 8260:127.0.0.1:8260 HOST

    Example: stepwell ui trainer --port 8260
    """
    service = connect(name, address=address)
    try:
        server = PageServer(service, port)
    except OSError as error:
        raise typer.BadParameter(f"port {port} cannot be had: {error.strerror}", param_hint="--port") from error
    with server:
        console.print(f"{escape(name)}: {server.url}", highlight=False, soft_wrap=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


def _look(service: Service) -> RenderableType:
    return frame(service.status(), service.history(NUM_ROWS))


def _title(name: str, columns: Columns) -> str:
    first, last = columns["step"][0], columns["step"][-1]
    return f"{name}, steps {first:.0f} to {last:.0f}"
