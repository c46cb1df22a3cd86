"""The command line's service commands: up, status, save, resize, drain, down."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import ray
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..sharding.chronicle import last_row, steps_per_second
from ..sharding.compiling import KERNEL_CHOICES, KernelChoice
from ..sharding.errors import ServiceNotFoundError, StepwellError
from ..sharding.folder import Destination
from ..sharding.stopwatch import PHASES
from . import cluster
from .config import Placement
from .recoveries import Recovery
from .service import Service, connect, end, launch, service_names

Name = Annotated[str, typer.Argument(help="The service's name.", show_default=False)]
Uri = Annotated[str, typer.Argument(help="A path or fsspec URI that every shard can reach.", show_default=False)]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster. Default: $RAY_ADDRESS, else the one that `stepwell up` started on this machine."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

SPEED_ROWS = 32
"""So many rows of the history the speed is taken from."""

console = Console()
notes = Console(stderr=True)


def up(
    name: Name,
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 1,
    gpus_per_shard: Annotated[
        float, typer.Option(min=0, help="GPUs of each shard; 0 keeps the state in CPU memory.")
    ] = 0,
    cpus_per_shard: Annotated[float, typer.Option(min=0, help="CPUs of each shard.")] = 1,
    placement: Annotated[str, typer.Option(help="PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.")] = "SPREAD",
    kernel: Annotated[
        str | None, typer.Option(help="compiled, eager or auto. Default: $STEPWELL_KERNEL, else auto.")
    ] = None,
    redundancy: Annotated[
        int, typer.Option(min=0, max=2, help="Keepers of each shard's state; 0: its checkpoint alone survives it.")
    ] = 1,
    standby: Annotated[int, typer.Option(min=0, help="Spare processes that take a lost shard's place at once.")] = 0,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Workers may join and leave; steps go on without one that is missing.")
    ] = False,
    worker_timeout_s: Annotated[float, typer.Option(help="Seconds that a step waits for its last worker.")] = 1800.0,
    restore: Annotated[str | None, typer.Option(help="A checkpoint to begin with.")] = None,
    placement_timeout_s: Annotated[float, typer.Option(min=1, help="Seconds to wait for room in the cluster.")] = 60.0,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Start a named service that outlives this command.

    Without a Ray cluster (no --address, no $RAY_ADDRESS) one is started on this machine; `stepwell down` ends it with
    its last service.

    Example: stepwell up trainer --shards 2
    """
    strategy = _placement(placement)
    started = _enter_cluster(address, shards, cpus_per_shard)
    try:
        with notes.status(escape(f"starting {shards} shard(s) of service {name!r} ...")):
            service = launch(
                name,
                num_shards=shards,
                num_gpus_per_shard=gpus_per_shard,
                num_cpus_per_shard=cpus_per_shard,
                placement=strategy,
                kernel=_kernel(kernel),
                redundancy=redundancy,
                standby=standby,
                elastic=elastic,
                worker_timeout_s=worker_timeout_s,
                restore=restore,
                placement_timeout_s=placement_timeout_s,
            )
    except (StepwellError, ValueError):
        if started:
            _leave_own_cluster()
        raise
    where = cluster.address()
    if as_json:
        _print_json({**service.status(), "address": where})
        return
    _say(f"service [bold]{escape(name)}[/] is up: {shards} shard(s), Ray at {where}")
    _say(f'use it:  stepwell.Prodigy(model.parameters(), service="{escape(name)}")')


def status(
    name: Annotated[str | None, typer.Argument(help="The service's name; all services if left out.")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Show where a service stands, or all of them.

    Example: stepwell status trainer --json
    """
    cluster.attach(address)
    names = [name] if name is not None else service_names()
    found = [_status_fields(connect(each)) for each in names]
    if as_json:
        _print_json(found[0] if name is not None else {"services": found})
    elif not found:
        console.print("no services are running in this cluster")
    else:
        for fields in found:
            console.print(_status_table(fields))


def save(
    name: Name,
    uri: Uri,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, help="Write into a folder of its own in URI, and keep so many of the checkpoints there."),
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of a running service, between two steps.

    Example: stepwell save trainer /checkpoints/trainer --keep-last 3
    """
    service = connect(name, address=address)
    with notes.status(escape(f"saving service {name!r} to {uri} ...")):
        step = service.save(uri, keep_last=keep_last)
    target = Destination.of(uri, keep_last, step).uri
    if as_json:
        _print_json({"name": name, "uri": target, "step": step})
    else:
        _say(f"saved step {step} of service [bold]{escape(name)}[/] to {escape(target)}")


def resize(
    name: Name,
    shards: Annotated[int, typer.Argument(min=1, help="How many shards it is to have.", show_default=False)],
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Go on with another number of shards, between two steps of a running job; the results stay the same to the bit.

    The new shards need room beside the present ones for a moment.

    Example: stepwell resize trainer 4
    """
    service = connect(name, address=address)
    with notes.status(escape(f"{shards} new shard(s) take over service {name!r} ...")):
        service.resize(shards)
    if as_json:
        _print_json({"name": name, "num_shards": shards})
    else:
        _say(f"service [bold]{escape(name)}[/] has {shards} shard(s) now")


def drain(
    name: Name,
    node: Annotated[str, typer.Argument(help="The node's id in Ray, its address or host name.", show_default=False)],
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Move a service's shards away from a node, between two steps, so that the node may go.

    Example: stepwell drain trainer 10.0.0.7
    """
    service = connect(name, address=address)
    with notes.status(escape(f"moving shards of service {name!r} away from node {node} ...")):
        moved = service.drain(node)
    if as_json:
        _print_json({"name": name, "node": node, "moved": moved})
    else:
        _say(
            f"service [bold]{escape(name)}[/] "
            + (f"has left node {escape(node)}" if moved else f"had no shards on node {escape(node)}")
        )


def down(name: Name, address: Address = None, as_json: Json = False) -> None:
    """End a service. State that was not saved is gone.

    Example: stepwell down trainer
    """
    with notes.status(escape(f"ending service {name!r} ...")):
        end(name, address=address)
        ends_ray = cluster.is_own() and not [other for other in service_names() if other != name]
        if ends_ray:
            _leave_own_cluster()
    if as_json:
        _print_json({"name": name, "ended_ray": ends_ray})
    else:
        _say(f"service [bold]{escape(name)}[/] is down" + (", and its Ray with it" if ends_ray else ""))


def _enter_cluster(address: str | None, shards: int, cpus_per_shard: float) -> bool:
    """Attach to a cluster, starting one on this machine if there is none; whether it was started."""
    try:
        cluster.attach(address)
    except ServiceNotFoundError:
        with notes.status("starting Ray on this machine ..."):
            cluster.start_own(num_cpus=max(os.cpu_count() or 1, round(shards * cpus_per_shard)))
        return True
    return False


def _leave_own_cluster() -> None:
    ray.shutdown()
    cluster.stop_own()


def _placement(text: str) -> Placement:
    by_name: dict[str, Placement] = {
        "PACK": "PACK",
        "SPREAD": "SPREAD",
        "STRICT_PACK": "STRICT_PACK",
        "STRICT_SPREAD": "STRICT_SPREAD",
    }
    if text.upper() not in by_name:
        raise typer.BadParameter(f"expected one of {', '.join(by_name)}, got {text}", param_hint="--placement")
    return by_name[text.upper()]


def _kernel(text: str | None) -> KernelChoice | None:
    by_name: dict[str | None, KernelChoice | None] = {None: None, **{choice: choice for choice in KERNEL_CHOICES}}
    if text not in by_name:
        raise typer.BadParameter(f"expected one of {', '.join(KERNEL_CHOICES)}, got {text}", param_hint="--kernel")
    return by_name[text]


def _status_fields(service: Service) -> dict[str, Any]:
    """Where a service stands, with what its last step brought."""
    columns = service.history(SPEED_ROWS)
    row = {name: value for name, value in last_row(columns).items() if math.isfinite(value)}
    return {**service.status(), "steps_per_s": steps_per_second(columns), "last_step": row}


def _status_table(fields: dict[str, Any]) -> Table:
    table = Table(title=escape(f"service {fields['name']}"), show_header=False, title_justify="left")
    row, speed = fields["last_step"], fields["steps_per_s"]
    told = {name: f"{row[name]:.6g}" for name in ("loss", "grad_norm", "lr") if name in row}
    phases = {phase: row[f"{phase}_s"] for phase in PHASES if f"{phase}_s" in row}
    shown = {**fields, **fields.get("scalars", {}), **told}
    if speed is not None:
        shown["steps per second"] = f"{speed:.3g}"
    if phases:
        parts = ", ".join(f"{phase} {1e3 * seconds:.1f}" for phase, seconds in phases.items())
        shown["last step"] = f"{1e3 * sum(phases.values()):.1f} ms: {parts}"
    shown["redundancy"], shown["recoveries"] = _copies(**fields["redundancy"]), _recoveries(**fields["recoveries"])
    shown["standby"] = "{ready} of {wanted} ready".format_map(fields["standby"])
    if fields["rule"] is None:
        shown["rule"] = "none yet: no worker has registered"
    for key, value in shown.items():
        if key not in ("name", "scalars", "steps_per_s", "last_step"):
            table.add_row(key, escape(str(value)))
    return table


def _copies(wanted: int, shards: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """What keepers have of the shards, in words."""
    if wanted == 0:
        return "0: a lost shard takes the service back to its last checkpoint"
    lacking = [str(shard) for shard, held in enumerate(shards) if len(held) < wanted]
    if not any(shards):
        return f"{wanted} wanted, none there yet"
    oldest = min(copy["step"] for held in shards for copy in held.values())
    there = f"{wanted} of each shard" if not lacking else f"{wanted} wanted, fewer of shard {', '.join(lacking)}"
    return f"{there}; the oldest is of step {oldest}"


def _recoveries(count: int, last: Mapping[str, Any] | None) -> str:
    """How often shards were brought back, and the last time, in words."""
    return str(count) if last is None else f"{count}; the last time {Recovery(**last)}"


def _say(markup: str) -> None:
    console.print(markup, highlight=False, soft_wrap=True)


def _print_json(fields: dict[str, Any]) -> None:
    typer.echo(json.dumps(fields))
