"""The `stepwell` command."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from ..server import commands
from ..sharding.errors import StepwellError
from . import checkpoint_commands
from .demo.command import demo
from .planning.command import plan
from .watching import commands as watching

app = typer.Typer(
    name="stepwell",
    help="A distributed optimizer service: sharded state, exact results.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_SERVICE = commands.up, commands.status, commands.save, commands.resize, commands.drain, commands.down
_WATCHING = watching.top, watching.plot, watching.ui
for command in (demo, plan, *_SERVICE, *_WATCHING):
    app.command()(command)
app.add_typer(checkpoint_commands.app, name="checkpoint")


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 1."""
    try:
        app()
    except (StepwellError, ValueError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
