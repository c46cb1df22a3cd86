"""The command `stepwell demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import events, picture
from .display import Display
from .processes import Workers
from .record import Record
from .settings import DemoError, DemoSettings, Json, counted

_DEFAULTS = DemoSettings()


def demo(
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = _DEFAULTS.steps,
    shards: Annotated[int, typer.Option(help="Shards of the optimizer service.")] = _DEFAULTS.num_shards,
    workers: Annotated[int, typer.Option(help="Training processes.")] = _DEFAULTS.num_workers,
    rule: Annotated[str, typer.Option(metavar="prodigy|adamw|lamb", help="Update rule.")] = _DEFAULTS.rule,
    resume: Annotated[
        str | None, typer.Option(metavar="URI", help="Go on from this checkpoint of the same demo.")
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="For logs, checkpoint, picture.")] = _DEFAULTS.out,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Train a small GPT on Python's own source text: about two minutes on two cores.

    Two workers push their gradients to two shards, which take exact Prodigy steps without a learning rate to tune.

    Example: stepwell demo --shards 3 --out /tmp/demo
    """
    try:
        settings = DemoSettings(
            rule=rule, steps=steps, num_shards=shards, num_workers=workers, resume=_located(resume), out=out
        )
    except DemoError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        summary = run(settings, Console(stderr=True))
    except (DemoError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: every process of the demo has ended", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps(summary) if as_json else _told(summary))


def run(demo: DemoSettings, console: Console) -> dict[str, Json]:
    """Runs the demo to its end.

    Args:
        demo: the settings of the run.
        console: where progress is drawn.

    Returns:
        The summary, a JSON object.

    Raises:
        DemoError: it could not be done; the message is one line.
    """
    out = Path(demo.out)
    checkpoint = (out / f"checkpoint-{demo.save_step}").absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / "events.jsonl").open("a" if demo.resume else "w", encoding="utf-8")
    except OSError as error:
        raise DemoError(f"cannot write to {out}: {error.strerror}; name another folder with --out") from error
    with stream, Display(demo, console) as display:
        record = Record(stream)
        display.show(events.Phase(f"starting {counted(demo.num_workers, 'worker')}"))
        with Workers(demo, out=out, checkpoint=str(checkpoint)) as workers:
            try:
                for event in workers.events():
                    record.add(event)
                    display.show(event)
            except (DemoError, KeyboardInterrupt):
                display.show(events.Phase("stopping every process"))
                raise
    path = out / "loss.png"
    title = (
        f"A byte-level GPT learns Python's source: {demo.rule}, "
        f"{counted(demo.num_workers, 'worker')}, {counted(demo.num_shards, 'shard')}"
    )
    picture.draw(path, title=title, steps=record.steps, held_out=record.held_out)
    return record.summary(demo, picture=path)


def _located(uri: str | None) -> str | None:
    """A local path made absolute, as shards may run elsewhere; a URI as it is."""
    if uri is None or "://" in uri:
        return uri
    if not Path(uri).exists():
        raise DemoError(f"--resume {uri}: nothing there; a demo saves half way, as checkpoint-STEP in its --out")
    return str(Path(uri).absolute())


def _told(summary: dict[str, Json]) -> str:
    before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
    step_ms, seconds = summary["step_ms_median"], summary["seconds"]
    lines = [
        f"held-out loss  {before:.3f} -> {after:.3f} nats per byte",
        f"steps          {summary['steps']}, {step_ms:.0f} ms each; {seconds:.0f} s in all",
    ]
    if summary["d"] is not None:
        lines.append(f"d              {summary['d']:.3e}, found by Prodigy itself")
    if summary["checkpoint"] is not None:
        lines.append(f"checkpoint     {summary['checkpoint']}")
    lines.append(f"picture        {summary['picture']}")
    return "\n".join([*lines, "", "a sample of what the model writes now:", str(summary["sample"]).rstrip()])
