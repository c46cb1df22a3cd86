"""Calling a compiled pass: one compilation serves any number of tiles and tensors, for a whole run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..optim import Coefficients, Rule
from .compiling import compile_pass, told_if_slow
from .errors import KernelError
from .passes import Pass, Rows

STAND_IN_TILES = 2**11
"""What a pass is compiled with: as many tiles as threads are worth while for, whatever the job's first extent has."""

STAND_IN_TENSORS = 64

_Map = Callable[[Tensor], Tensor]


def run_compiled(
    function: Pass, rule: Rule, stride: int, rows: Rows, coefficients: Coefficients, *args: Any, num_threads: int
) -> list[Tensor]:
    """Run a pass, compiled the first time that operands of this kind come.

    Args:
        function: The pass.
        rule: The rule.
        stride: Of its strided slots.
        rows: Whose gradient has no term left out.
        coefficients: Per tensor.
        args: What else the pass takes: coefficients per element, or a flag.
        num_threads: How many threads share a call on the CPU.

    Raises:
        KernelError: If it cannot be compiled.
    """
    compiled = _compiled(function, rule, stride, num_threads)
    operands = _Operands(rows, coefficients, args).with_two_tensors()
    if len(rows.tensor_of_tile) != 1:
        return compiled(operands)
    # A dimension of 1 would be compiled apart: the tile is doubled, and the second one forgotten.
    doubled = operands.mapped(lambda tensor: torch.cat((tensor, tensor)), _same)
    outputs = compiled(doubled)
    for target, values in zip(rows.written(), doubled.rows.written(), strict=True):
        target.copy_(values[:1])
    return [output[:1] for output in outputs]


@functools.cache
def _compiled(function: Pass, rule: Rule, stride: int, num_threads: int) -> _CompiledPass:
    return _CompiledPass(function, rule, stride, num_threads)


class _CompiledPass:
    """One pass of one rule, compiled for each kind of operands apart: torch gives up where one has many variants."""

    def __init__(self, function: Pass, rule: Rule, stride: int, num_threads: int) -> None:
        self._fixed = function, rule, stride
        self._num_threads = num_threads
        self._by_signature: dict[object, Pass] = {}

    def __call__(self, operands: _Operands) -> list[Tensor]:
        signature = operands.signature()
        if signature not in self._by_signature:
            self._by_signature[signature] = self._compile_for(operands)
        return self._run(self._by_signature[signature], operands)

    def _compile_for(self, operands: _Operands) -> Pass:
        from torch._dynamo.exc import TorchDynamoException  # takes longer than all else of a shard's process to start

        function, rule, _ = self._fixed
        compiled = compile_pass(_guarded, self._num_threads)
        with told_if_slow(f"{rule.name}'s kernels"):
            try:
                self._run(compiled, operands.stand_in())
            except TorchDynamoException as error:
                raise KernelError(
                    f"{rule.name}'s {function.__name__} cannot be compiled ({_first_line(error)}); take "
                    "kernel='eager', and report this"
                ) from error
        return compiled

    def _run(self, compiled: Pass, operands: _Operands) -> list[Tensor]:
        with torch.no_grad():  # as it was compiled: torch would compile it again, for these sizes alone
            return compiled(*self._fixed, operands.rows, operands.coefficients, *operands.args)


def _guarded(
    function: Pass, rule: Rule, stride: int, rows: Rows, coefficients: Coefficients, *args: Any
) -> list[Tensor]:
    """A pass, which does not run eagerly, whoever has turned torch.compile off: see :func:`require_compiling`."""
    assert torch.compiler.is_compiling(), "it was on when the step began"
    return function(rule, stride, rows, coefficients, *args)


@dataclasses.dataclass(frozen=True, slots=True)
class _Operands:
    rows: Rows
    coefficients: Coefficients
    args: tuple[Any, ...]

    def signature(self) -> object:
        """What code is compiled for."""
        rows = self.rows
        return (
            rows.tensor_of_tile.device,
            tuple((name, values.dtype) for name, values in rows.slots.items()),
            tuple(part.dtype for part in rows.gradient.parts),
            tuple(sink.dtype for sink in rows.sinks),
            tuple(self.coefficients),
            tuple(tuple(arg) if isinstance(arg, Mapping) else arg for arg in self.args),
        )

    def mapped(self, per_tile: _Map, per_tensor: _Map) -> _Operands:
        """These with every tensor changed that has an entry for each tile (dim 0) or for each tensor (the last dim)."""
        rows, grad = self.rows, self.rows.gradient
        gradient = dataclasses.replace(
            grad,
            parts=tuple(map(per_tile, grad.parts)),
            here=None if grad.here is None else per_tensor(grad.here),
            counts=None if grad.counts is None else per_tensor(grad.counts),
        )
        changed = Rows(
            {name: per_tile(values) for name, values in rows.slots.items()},
            gradient,
            per_tile(rows.tensor_of_tile),
            per_tile(rows.index_in_tensor),
            tuple(map(per_tile, rows.sinks)),
        )
        args = (
            {name: per_tile(values) for name, values in arg.items()} if isinstance(arg, Mapping) else arg
            for arg in self.args
        )
        coefficients = {name: per_tensor(values) for name, values in self.coefficients.items()}
        return _Operands(changed, coefficients, tuple(args))

    def with_two_tensors(self) -> _Operands:
        """For a model of one tensor: as in :func:`run_compiled`, a dimension of 1 would be compiled apart."""
        here = self.rows.gradient.here
        assert here is not None, "no term is left out"
        if here.shape[-1] > 1:
            return self
        return self.mapped(_same, lambda tensor: torch.cat((tensor, tensor), dim=-1))

    def stand_in(self) -> _Operands:
        """Zeros of the same kind, marked to be of any size."""

        def per_tile(tensor: Tensor) -> Tensor:
            zeros = tensor.new_zeros((STAND_IN_TILES, *tensor.shape[1:]))
            torch._dynamo.mark_dynamic(zeros, 0)
            return zeros

        def per_tensor(tensor: Tensor) -> Tensor:
            zeros = tensor.new_zeros((*tensor.shape[:-1], STAND_IN_TENSORS))
            torch._dynamo.mark_dynamic(zeros, zeros.dim() - 1)
            return zeros

        return self.mapped(per_tile, per_tensor)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
