"""The command line's commands for checkpoints as files: no service and no cluster is needed."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..sharding.checkpoint import find_damages
from ..sharding.folder import list_checkpoints, read_manifest

Uri = Annotated[str, typer.Argument(help="A checkpoint's folder: a path or fsspec URI.", show_default=False)]
RunUri = Annotated[
    str, typer.Argument(help="A run's folder, or a single checkpoint's: a path or fsspec URI.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

console = Console()

app = typer.Typer(help="Look at checkpoints, without a service.", no_args_is_help=True)


@app.command()
def verify(uri: Uri, as_json: Json = False) -> None:
    """Read all of a checkpoint and compare it with its digests; exit code 1 if anything is damaged.

    Example: stepwell checkpoint verify /checkpoints/step-00001000
    """
    damages = find_damages(uri)
    if as_json:
        fields = [dataclasses.asdict(damage) for damage in damages]
        typer.echo(json.dumps({"uri": uri, "intact": not damages, "damages": fields}))
    else:
        for damage in damages:
            _say(f"[bold red]damaged:[/] {escape(str(damage))}")
        if not damages:
            manifest = read_manifest(uri)
            _say(f"intact: step {manifest.step} of {manifest.spec.rule.name}, {manifest.size_bytes} bytes")
    if damages:
        raise typer.Exit(1)


@app.command("list")
def list_(uri: RunUri, as_json: Json = False) -> None:
    """List the complete checkpoints in a run's folder, the one that was written last at the end.

    Example: stepwell checkpoint list /checkpoints
    """
    found = list_checkpoints(uri)
    if as_json:
        typer.echo(json.dumps({"uri": uri, "checkpoints": [dataclasses.asdict(each) for each in found]}))
        return
    if not found:
        _say(f"no complete checkpoint in {escape(uri)}")
        return
    table = Table("step", "saved", "rule", "bytes", "uri")
    for each in found:
        saved = datetime.datetime.fromtimestamp(each.saved_at).astimezone().isoformat(" ", "seconds")
        table.add_row(str(each.step), saved, each.rule, str(each.size_bytes), escape(each.uri))
    console.print(table)


def _say(markup: str) -> None:
    console.print(markup, highlight=False, soft_wrap=True)
