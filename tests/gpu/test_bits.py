"""Shards on a GPU: the same bits for any sharding there, the CPU's results but for rounding, and no needless waits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from stepwell.optim import ProdigyRule
from stepwell.sharding import kernels
from stepwell.sharding.compiling import KERNELS, Kernel
from stepwell.sharding.shard import Shard
from tests.sharding.test_compiled import EVERY_RULE, problem_for
from tests.zoo import Problem, Run, State, ZooTensor, assert_same_state, straddling

DEVICE = torch.device("cuda")
ROOT = Path(__file__).parents[2]

EACH_RULE = pytest.mark.parametrize("name", EVERY_RULE)
SOME_RULES = pytest.mark.parametrize("name", ["Prodigy-slice_p", "LAMB", "AdamAWD"])
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS)


def run(name: str, kernel: Kernel, *, num_steps: int = 5, num_shards: int = 1, world_size: int = 1) -> Run:
    rule = EVERY_RULE[name]
    made = Run(problem_for(rule), rule, kernel=kernel, num_shards=num_shards, world_size=world_size, device=DEVICE)
    return made.steps(num_steps)


@EACH_KERNEL
@EACH_RULE
def test_bits_do_not_depend_on_the_number_of_shards(name: str, kernel: Kernel) -> None:
    expected = run(name, kernel).state()
    compiled = counters["stats"]["unique_graphs"]
    for num_shards in (2, 3, 7):
        assert_same_state(run(name, kernel, num_shards=num_shards).state(), expected)
    assert counters["stats"]["unique_graphs"] == compiled, "nothing is compiled again"


@EACH_KERNEL
@SOME_RULES
def test_bits_do_not_depend_on_the_size_of_calls(name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(name, kernel).state()
    for piece_tiles in (1, 2, 7, 64):
        monkeypatch.setattr(kernels, "GPU_PIECE_TILES", dict.fromkeys(KERNELS, piece_tiles))
        for limit in ("PIECE_TILES", "CACHED_PIECE_TILES"):  # of sums over channels
            monkeypatch.setattr(kernels, limit, piece_tiles)
        assert_same_state(run(name, kernel).state(), expected)


@EACH_KERNEL
@SOME_RULES
def test_several_workers_are_averaged_alike(name: str, kernel: Kernel) -> None:
    expected = run(name, kernel, world_size=2).state()
    assert_same_state(run(name, kernel, world_size=2, num_shards=3).state(), expected)


@EACH_KERNEL
@EACH_RULE
def test_result_is_that_of_the_cpu_but_for_rounding(name: str, kernel: Kernel) -> None:
    """A short way: BAdam divides the change of the gradient by the last update, which amplifies it."""
    rule = EVERY_RULE[name]
    expected = Run(problem_for(rule), rule, kernel="eager").steps(2).params()
    for actual, wanted in zip(run(name, kernel, num_steps=2).params(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@EACH_KERNEL
def test_float64_is_the_cpu_to_the_last_digits(kernel: Kernel) -> None:
    """Over many steps, as there rounding does not grow to what is seen."""
    problem, rule = straddling().as_dtype("float64"), ProdigyRule(d0=1e-3)
    there = Run(problem, rule, kernel=kernel, num_shards=2, device=DEVICE).steps(100)
    here = Run(problem, rule, kernel="eager").steps(100)
    for actual, wanted in zip(there.params(), here.params(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


def digest(state: State) -> str:
    """Of all bits of a state."""
    found = hashlib.sha256()
    for tensors in state.slots.values():
        for tensor in tensors:
            found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


@SOME_RULES
def test_another_process_compiles_code_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """With a compiler's cache of its own: so would a shard on another machine."""
    script = (
        "import os; from tests.gpu.test_bits import digest, run;"
        f"print(digest(run({name!r}, 'compiled', num_shards=2).state()))"
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    ended = subprocess.run(
        ["/usr/bin/env", *(f"{key}={value}" for key, value in environment.items()), sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == digest(run(name, "compiled", num_shards=2).state())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "Prodigy-one pass", "LAMB"])
def test_passes_wait_for_nothing_until_their_sums_are_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a pass the GPU is given work and not asked for anything; afterwards it is asked once for each extent."""
    rule = EVERY_RULE[name]
    made = Run(straddling(), rule, kernel="compiled", device=DEVICE).steps(2)
    run_pass, found = kernels.Kernels._run, []

    def watched(*args: object) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_pass(*args)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found.append(True)

    monkeypatch.setattr(kernels.Kernels, "_run", watched)
    made.steps(4)
    assert found


@EACH_KERNEL
def test_what_is_not_finite_skips_the_step(kernel: Kernel) -> None:
    made = run("Prodigy", kernel, num_shards=2)
    before = made.state()
    gradients = made.gradients(5)
    gradients[1].view(-1)[77] = torch.inf
    made.step(gradients=gradients)
    after = made.state()
    for name, tensors in before.slots.items():
        assert all(torch.equal(one, other) for one, other in zip(tensors, after.slots[name], strict=True)), name
    assert after.counters == (6, 6, 1)


@EACH_KERNEL
def test_clipping_by_norm_is_the_cpus(kernel: Kernel) -> None:
    rule = EVERY_RULE["AdamW"]
    limits = {"max_grad_norm": 0.5, "max_grad_value": 0.3}
    there = Run(straddling(), rule, kernel=kernel, num_shards=3, rank_0=limits, device=DEVICE)
    here = Run(straddling(), rule, kernel="eager", rank_0=limits)
    result, wanted = there.step(), here.step()
    assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)
    for actual, expected in zip(there.params(), here.params(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_many_tiles_in_one_tensor() -> None:
    """More than one call, and segments of many tiles."""
    problem = Problem((ZooTensor((5000, 4099)), ZooTensor((70,)), ZooTensor((300, 301), group=1)))
    states = [
        Run(problem, EVERY_RULE["Prodigy"], kernel="compiled", num_shards=num_shards, device=DEVICE).steps(2).state()
        for num_shards in (1, 3)
    ]
    assert_same_state(*states)


def test_shard_has_nothing_of_the_model_on_the_cpu() -> None:
    made = run("Prodigy", "compiled", num_shards=2)
    for shard in made.group.shards:
        assert isinstance(shard, Shard)
        assert {values.device.type for extent in shard.buffers.extents for values in extent.slots.values()} == {"cuda"}
        assert "cuda" in shard.status().kernel_identity
