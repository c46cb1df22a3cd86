"""The command line's commands for checkpoints as files: no service and no cluster is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..sharding.checkpoint import find_damages
from ..sharding.folder import list_checkpoints, read_manifest
from .torch_files import export_checkpoint, import_checkpoint

Uri = Annotated[str, typer.Argument(help="A checkpoint's folder: a path or fsspec URI.", show_default=False)]
RunUri = Annotated[
    str, typer.Argument(help="A run's folder, or a single checkpoint's: a path or fsspec URI.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

console = Console()

app = typer.Typer(help="Look at checkpoints and convert them, without a service.", no_args_is_help=True)


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
    table = Table("step", "saved", "rule", "bytes", Column("uri", overflow="fold"))  # never cut off: it is to be copied
    for each in found:
        saved = datetime.datetime.fromtimestamp(each.saved_at).astimezone().isoformat(" ", "seconds")
        table.add_row(str(each.step), saved, each.rule, str(each.size_bytes), escape(each.uri))
    console.print(table)


@app.command()
def export(
    uri: Uri,
    file: Annotated[str, typer.Argument(help="The file; with --distributed the folder.", show_default=False)],
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Write a folder of torch.distributed.checkpoint.")
    ] = False,
    params: Annotated[str | None, typer.Option(help="Write the parameters too, to this file.")] = None,
) -> None:
    """Write a checkpoint as a state dict that torch.load reads and the reference optimizer loads.

    The reference optimizer of a checkpoint of Prodigy is prodigyopt's, of AdamW torch's.

    Example: stepwell checkpoint export /checkpoints/step-00001000 optimizer.pt --params model.pt
    """
    with _quiet():
        export_checkpoint(uri, file, distributed=distributed, params=params)
    _say(f"exported {escape(uri)} to {escape(file)}" + (f", its parameters to {escape(params)}" if params else ""))


@app.command("import")
def import_(
    file: Annotated[
        str,
        typer.Argument(
            help="A state dict: a file of torch.save, or torch.distributed.checkpoint's.", show_default=False
        ),
    ],
    uri: Uri,
    rule: Annotated[str, typer.Option(help="The update rule, such as Prodigy or AdamW.", show_default=False)],
    params: Annotated[
        str,
        typer.Option(help="torch.save(dict(model.named_parameters())), in the optimizer's order.", show_default=False),
    ],
) -> None:
    """Write the state dict of a reference optimizer, with its parameters, as a checkpoint.

    Example: stepwell checkpoint import optimizer.pt /checkpoints/imported --rule Prodigy --params model.pt
    """
    with _quiet():
        step = import_checkpoint(file, uri, rule=rule, params=params)
    _say(f"imported step {step} from {escape(file)} to {escape(uri)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of what would follow: no step is taken here."""
    logger = logging.getLogger("stepwell")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _say(markup: str) -> None:
    console.print(markup, highlight=False, soft_wrap=True)
