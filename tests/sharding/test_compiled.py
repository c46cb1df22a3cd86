"""Compiled kernels: the same for any sharding, thread count and size of a call, close to eager ones, compiled once."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from stepwell.optim import RULES, ProdigyRule, ReducingRule, Rule, Scope
from stepwell.sharding import compiling, kernels
from stepwell.sharding.compiling import KERNELS, resolve_kernel
from stepwell.sharding.errors import KernelError
from stepwell.sharding.layout import dtype_from_name
from tests.zoo import Problem, Run, ZooTensor, assert_same_state, convolutions, small, straddling

EVERY_RULE: dict[str, Rule] = {
    **{name: RULES.build(name, {}) for name in RULES.names()},
    "Prodigy-slice_p": ProdigyRule(d0=1e-4, slice_p=11, weight_decay=0.01),
    "Prodigy-one pass": ProdigyRule(d0=1e-4, eps_d="old"),
    "Prodigy-bfloat16": ProdigyRule(d0=1e-4, stat_dtype="bfloat16"),
    "Prodigy-coupled": ProdigyRule(d0=1e-4, betas=(0.0, 0.99), weight_decay=0.01, decouple=False),
}
EACH = pytest.mark.parametrize("name", EVERY_RULE)
SOME = pytest.mark.parametrize("name", ["Prodigy-slice_p", "LAMB", "AdamAWD"])

MIXED = Problem(
    (
        ZooTensor((900,)),
        ZooTensor((30, 40), dtype="float64"),
        ZooTensor((7,), group=1),
        ZooTensor((50, 50), dtype="bfloat16"),
    )
)


ROOT = Path(__file__).parents[2]


def problem_for(rule: Rule) -> Problem:
    has_channels = isinstance(rule, ReducingRule) and rule.scope is Scope.CHANNEL
    return convolutions() if has_channels else straddling()


def random_gradients(step: int, rank: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {
        i: torch.randn(tensor.shape, generator=generator).to(dtype_from_name(tensor.dtype))
        for i, tensor in enumerate(MIXED.tensors)
    }


def num_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


@EACH
def test_bits_do_not_depend_on_the_number_of_shards(name: str) -> None:
    rule = EVERY_RULE[name]
    one = Run(problem_for(rule), rule, kernel="compiled").steps(6)
    compiled = num_compiled()
    for num_shards in (2, 3, 7):
        several = Run(problem_for(rule), rule, num_shards=num_shards, kernel="compiled").steps(6)
        assert_same_state(several.state(), one.state())
    assert num_compiled() == compiled, "tiles are of any number"


@EACH
def test_result_is_that_of_eager_kernels_but_for_rounding(name: str) -> None:
    """A short way: BAdam divides the change of the gradient by the last update, which amplifies it."""
    rule = EVERY_RULE[name]
    compiled, eager = (Run(problem_for(rule), rule, kernel=kernel).steps(2) for kernel in KERNELS)
    for actual, expected in zip(compiled.params(), eager.params(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@SOME
def test_bits_do_not_depend_on_the_size_of_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = EVERY_RULE[name]
    expected = Run(problem_for(rule), rule, kernel="compiled").steps(4).state()
    for piece_tiles in (1, 2, 7):
        monkeypatch.setattr(kernels, "COMPILED_PIECE_TILES", piece_tiles)
        monkeypatch.setattr(kernels, "CACHED_PIECE_TILES", piece_tiles)
        assert_same_state(Run(problem_for(rule), rule, kernel="compiled").steps(4).state(), expected)


@SOME
def test_bits_do_not_depend_on_threads(name: str) -> None:
    """The first tensor is large enough for threads to share it."""
    rule, states = EVERY_RULE[name], []
    problem = Problem((ZooTensor((64, 16, 40, 40)), ZooTensor((70,)), ZooTensor((300, 301), group=1)))
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            states.append(Run(problem, rule, num_shards=2, kernel="compiled").steps(3).state())
    finally:
        torch.set_num_threads(before)
    assert_same_state(*states)


STRIDED = """
import hashlib, sys
from stepwell.optim import ProdigyRule
from tests.zoo import Run, straddling
for stride in [*map(int, sys.argv[1:]), 11]:
    state = Run(straddling(), ProdigyRule(d0=1e-4, slice_p=stride), kernel="compiled").steps(3).state()
print(hashlib.sha256(b"".join(each.numpy().tobytes() for each in state.params)).hexdigest())
"""


def test_bits_do_not_depend_on_what_the_process_compiled_before() -> None:
    """As one shard was started again, and the others have had other jobs."""
    printed = []
    for before in ([], ["1", "3"]):
        command = [sys.executable, "-c", STRIDED, *before]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout)
    assert printed[0] == printed[1]


def test_nothing_is_compiled_again_over_a_run() -> None:
    """Whatever changes from step to step: hyperparameters, limits, scales, which tensors there are, ranks' order."""
    run = Run(small(), ProdigyRule(d0=1e-4), world_size=2, num_shards=3, kernel="compiled")
    compiled = None
    for step in range(12):
        run.groups[0]["lr"], run.rank_0["max_grad_value"] = 1.0 / (step + 1), 10.0 / (step + 1)
        run.rank_0["max_grad_norm"] = None if step == 5 else 3.0 + step
        for rank in range(2):
            gradients = {i: grad for i, grad in run.gradients(step, rank).items() if (i + step + rank) % 4}
            run.group.push(run.pushes(rank, gradients=gradients, grad_scale=2.0**step))
        if step == 5:
            compiled = num_compiled()
    assert num_compiled() == compiled


@pytest.mark.parametrize("world_size", [1, 3, kernels.MAX_PARTS + 1])
@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 2.0, "max_grad_value": 0.5}], ids=str)
def test_mean_clipping_and_scale_are_those_of_eager_kernels(world_size: int, limits: dict[str, float]) -> None:
    runs = [
        Run(MIXED, EVERY_RULE["AdamW"], world_size=world_size, num_shards=2, rank_0=limits, kernel=kernel)
        for kernel in ("eager", "compiled")
    ]
    for step in range(3):
        norms = []
        for run in runs:
            for rank in range(world_size):
                gradients = {i: g for i, g in random_gradients(step, rank).items() if i != rank}
                result = run.group.push(run.pushes(rank, gradients=gradients, grad_scale=2.0))
            assert result is not None
            norms.append(result.grad_norm)
        assert (norms[0] is None) == (limits == {})
        assert norms[0] == norms[1] or norms[0] == pytest.approx(norms[1], rel=1e-6)
    for eager, compiled in zip(runs[0].params(), runs[1].params(), strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_with_inf_or_nan_is_skipped(bad: float) -> None:
    run = Run(small(), ProdigyRule(), num_shards=3, kernel="compiled").steps(2)
    before = run.state()
    gradients = run.gradients(2, 0)
    gradients[7].view(-1)[-1] = bad
    assert run.step(gradients=gradients).decision.value == "skip"
    assert_same_state(run.state(), dataclasses.replace(before, counters=(3, 3, 1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_are_handed_over_in_the_models_dtype(dtype: str) -> None:
    problem = Problem((ZooTensor((700,), dtype=dtype), ZooTensor((5, 5), dtype=dtype)))
    one = Run(problem, ProdigyRule(d0=1e-3), kernel="compiled", wire_dtype=dtype_from_name(dtype)).steps(3)
    two = Run(problem, ProdigyRule(d0=1e-3), kernel="compiled", wire_dtype=dtype_from_name(dtype), num_shards=2).steps(
        3
    )
    assert_same_state(two.state(), one.state())


def test_kernels_turned_off_in_mid_run_are_an_error() -> None:
    run = Run(small(), ProdigyRule(), kernel="compiled", rank_0={"max_abs": 100.0}).steps(1)
    before = run.state()
    with torch.compiler.set_stance("force_eager"), pytest.raises(KernelError, match=r"turned off.*Turn it on"):
        run.step()
    assert_same_state(run.state(), before)
    run.step()


ELSEWHERE = """
import sys
from pathlib import Path
from torch._dynamo.utils import counters
from stepwell.optim import AdamWRule
from stepwell.sharding.compiling import compiled_code, take_compiled_code
from tests.zoo import Run, small

code = Path(sys.argv[1])
if code.exists():
    take_compiled_code(code.read_bytes())
Run(small(), AdamWRule(), kernel="compiled").steps(2)
code.write_bytes(compiled_code())
print(counters["inductor"]["fxgraph_cache_miss"])
"""


def test_compiled_code_serves_a_process_with_an_empty_cache(tmp_path: Path) -> None:
    """As on the machine where a lost shard is started again."""
    missed = []
    for name in ("first", "second"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "code")]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert ended.returncode == 0, ended.stderr
        missed.append(int(ended.stdout))
    assert missed[0] > 0
    assert missed[1] == 0


def test_choice_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    assert resolve_kernel("auto", cpu) == resolve_kernel("compiled", cpu) == "compiled"
    assert resolve_kernel("eager", cpu) == "eager"
    monkeypatch.setattr(compiling, "_cpp_compiler", lambda: None)
    compiling._say_once.cache_clear()
    assert [resolve_kernel("auto", cpu) for _ in range(2)] == ["eager", "eager"]
    assert len([record for record in caplog.records if "install g++" in record.message]) == 1, "said once"
    with pytest.raises(KernelError, match=r"kernel='compiled': expected a C\+\+ compiler.*install g\+\+ or set CXX"):
        resolve_kernel("compiled", cpu)


def require_named(match: str) -> None:
    """Kernels are not compiled, and who insists is told why."""
    assert resolve_kernel("auto", torch.device("cpu")) == "eager"
    with pytest.raises(KernelError, match=match):
        resolve_kernel("compiled", torch.device("cpu"))


def test_what_keeps_kernels_from_being_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._dynamo.config.patch(disable=True):
        require_named("TORCH_COMPILE_DISABLE")
    with monkeypatch.context() as patch:
        patch.setattr(torch._dynamo, "is_dynamo_supported", lambda: False)
        require_named("compiles nothing under Python")
    monkeypatch.setattr(compiling, "_python_header", lambda: Path("/nowhere/Python.h"))
    require_named("/nowhere/Python.h; install python3-dev")


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel: expected one of auto, compiled, eager, got 'fast'"):
        resolve_kernel("fast", torch.device("cpu"))  # type: ignore[arg-type]
