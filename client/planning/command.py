"""The command `stepwell plan`."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...optim import RULES
from ...sharding.coverage import GRADIENTS, Gradients
from ...sharding.job import JobSpec
from .deployment import Deployment, dtype_named, model_of, wire_dtype_named
from .machines import GIB, GPUS, Machine, with_gpu, without_gpu
from .names import named
from .plan import Plan, in_gib, in_ms

console = Console()
notes = Console(stderr=True)


def plan(
    params: Annotated[float, typer.Option(min=1, help="Parameters of the model, such as 70e9.", show_default=False)],
    rule: Annotated[str, typer.Option(help="The update rule.")] = "Prodigy",
    shards: Annotated[int, typer.Option(min=1, help="Shards.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Training processes.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help=f"GPU of shards and workers: {', '.join(GPUS)}. None: the state on CPUs.")
    ] = None,
    memory_gib: Annotated[float | None, typer.Option(help="Memory that one shard may take. Default: all.")] = None,
    network_gbps: Annotated[float, typer.Option(min=0.001, help="Network of a node, one way, in Gbit/s.")] = 100.0,
    gradients: Annotated[
        str, typer.Option(help="What a worker's are: local, replicated (as DDP's) or sharded (as FSDP's).")
    ] = "sharded",
    dtype: Annotated[str, typer.Option(help="Of the model's parameters.")] = "bfloat16",
    gradient_dtype: Annotated[str | None, typer.Option(help="Gradients are sent in. Default: the model's.")] = None,
    workers_per_node: Annotated[int, typer.Option(min=1, help="Workers of each node, at most.")] = 8,
    shards_per_node: Annotated[int | None, typer.Option(help="Shards of each node. Default: spread.")] = None,
    tensors: Annotated[int | None, typer.Option(help="Tensors of the model. Default: as many as a decoder's.")] = None,
    redundancy: Annotated[int, typer.Option(min=0, help="Copies of each shard's state.")] = 1,
    overlap: Annotated[bool, typer.Option("--overlap", help="Gradients are copied within backward.")] = False,
    here: Annotated[bool, typer.Option("--here", help="Measure this machine, in some seconds, and use that.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Work out memory, traffic and step time of a service before there is one; nothing is started, but with --here.

    Example: stepwell plan --params 70e9 --rule prodigy --shards 64 --workers 256 --network-gbps 400 --gpu h100
    """
    spec = JobSpec(
        rule=RULES.build(named(rule, RULES.names(), what="rule"), {}),
        params=model_of(round(params), dtype_named(dtype), tensors),
        num_groups=1,
        world_size=workers,
        gradients=_gradients(gradients),
        kernel="compiled",
    )
    num_nodes = 1 if here else math.ceil(workers / workers_per_node)
    deployment = Deployment(
        spec=spec,
        num_shards=shards,
        workers_per_node=workers if here else min(workers_per_node, workers),
        shards_per_node=math.ceil(shards / num_nodes) if shards_per_node is None else shards_per_node,
        gradient_dtype=wire_dtype_named(gradient_dtype),
        redundancy=redundancy,
        overlap=overlap,
    )
    found = Plan.of(deployment, _machine(here, gpu, network_gbps, memory_gib))
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _show(found)


def _machine(here: bool, gpu: str | None, network_gbps: float, memory_gib: float | None) -> Machine:
    if here:
        # Imports Ray's clients; planning alone needs none of it.
        from .measure import machine_of, measure

        with notes.status("measuring this machine ..."):
            seconds = measure()
        return machine_of(seconds, memory_bytes=None if memory_gib is None else round(memory_gib * GIB))
    if gpu is not None:
        return with_gpu(gpu, network_gbps, memory_gib)
    if memory_gib is None:
        raise ValueError("memory-gib: expected what a shard may take of its host's memory, or --gpu NAME, or --here")
    return without_gpu(memory_gib, network_gbps)


def _gradients(text: str) -> Gradients:
    by_name: dict[str, Gradients] = {kind: kind for kind in GRADIENTS}
    return by_name[named(text, by_name, what="kind of gradients")]


def _show(found: Plan) -> None:
    plan, machine = found.deployment, found.machine
    title = (
        f"{plan.layout.numel / 1e9:,.4g} B parameters in {len(plan.spec.params)} tensors, {plan.spec.rule.name}, "
        f"{plan.spec.gradients} gradients: {plan.num_shards} shard(s), {plan.spec.world_size} worker(s), "
        f"{plan.num_nodes} node(s), {machine.name}"
    )
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
    sizes = {**found.shard_bytes, "in all": found.needed_bytes, "there is": machine.memory_bytes}
    console.print(_table("memory of the largest shard", {name: in_gib(size) for name, size in sizes.items()}))
    rest = {**found.host_bytes, "(a worker's buffers, each)": found.worker_bytes}
    console.print(_table("host memory of a node beside it", {name: in_gib(size) for name, size in rest.items()}))
    links = Table("bytes per step", "out", "in", title_justify="left")
    for link in found.links:
        links.add_row(link.name, in_gib(link.out_bytes), in_gib(link.in_bytes))
    console.print(links)
    times = {part.name: in_ms(part.seconds) for part in found.parts}
    console.print(_table("a step's time", {**times, "in all": in_ms(found.step_s)}))
    share = found.bottleneck.seconds / found.step_s
    fits = "[green]fits[/]" if found.fits else "[bold red]does not fit[/]"
    console.print(
        f"It {fits}: a shard needs {in_gib(found.needed_bytes)} of {in_gib(machine.memory_bytes)}. "
        f"Bottleneck: {found.bottleneck.name}, {share:.0%} of a step. {found.num_calls:,} calls to shards per step.",
        soft_wrap=True,
    )
    for kind, other in found.otherwise().items():
        told = "fits" if other.fits else "does not fit"
        console.print(f"With {kind} gradients: {in_ms(other.step_s)}, {in_gib(other.needed_bytes)}, {told}.")


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title, "", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
