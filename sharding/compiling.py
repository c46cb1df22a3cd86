"""Whether passes are compiled, by what, and what of that the bits depend on."""

from __future__ import annotations

import functools
import itertools
import logging
import platform
import shutil
import subprocess
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch

from .errors import KernelError

Kernel = Literal["compiled", "eager"]
"""How passes run. Their bits differ: sums are added up in another order."""

KERNELS: tuple[Kernel, ...] = ("compiled", "eager")

KernelChoice = Literal["auto", "compiled", "eager"]

KERNEL_CHOICES: tuple[KernelChoice, ...] = ("auto", "compiled", "eager")

SLOW_S = 3.0
"""Compiling for longer is told of: the first time, for some seconds."""

logger = logging.getLogger("stepwell")

_numbers = itertools.count()

_Pass = TypeVar("_Pass", bound=Callable[..., Any])


def resolve_kernel(choice: KernelChoice, device: torch.device) -> Kernel:
    """How passes are to run on a device.

    Args:
        choice: What is asked for; ``"auto"`` compiles where there is a compiler, and else says once that it does not.
        device: Where they run.

    Raises:
        ValueError: If it is no choice.
        KernelError: If ``"compiled"`` is asked for and there is no compiler.
    """
    if choice not in KERNEL_CHOICES:
        raise ValueError(f"kernel: expected one of {', '.join(KERNEL_CHOICES)}, got {choice!r}")
    if choice == "eager":
        return "eager"
    missing = _missing(device)
    if missing is None:
        return "compiled"
    if choice == "compiled":
        raise KernelError(f"kernel='compiled': {missing}")
    _say_once(f"{missing}. Steps run eagerly meanwhile, several times slower; kernel='eager' leaves this warning out")
    return "eager"


def kernel_identity(device: torch.device, kernel: Kernel) -> str:
    """What the bits of a kernel depend on beside its inputs, in one line."""
    how = "eager" if kernel == "eager" else f"compiled by {_compiler(device)}"
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {how}, {device.type} {model}"


def require_same_kernels(expected: str, got: str, *, whose: str) -> None:
    """See that two kernel identities are the same, where one run is to have the bits of one kind of kernels.

    Args:
        expected: What the run was computed by so far, see :func:`kernel_identity`.
        got: What it would go on with.
        whose: Names the latter in the message.

    Raises:
        KernelError: Naming what differs.
    """
    if expected != got:
        pairs = zip(expected.split(", "), got.split(", "), strict=False)
        different = "; ".join(f"expected {there}, got {here}" for there, here in pairs if there != here)
        raise KernelError(
            f"{whose} computes other bits than the rest of the run ({different or f'expected {expected}, got {got}'}). "
            "Place all shards on machines of one kind, with one version of torch"
        )


def compile_pass(function: _Pass, num_threads: int) -> _Pass:
    """Compile a pass; called with tensors of any number of tiles and coefficients of any number of tensors.

    Its first call should have dimensions that vary marked as dynamic. Rows of 256 are reduced in an order of their own;
    threads take rows, so that their number never touches the bits. Code is kept on disk by torch, for later runs too.

    Args:
        function: The pass.
        num_threads: How many threads share a call on the CPU.
    """
    # torch keeps what it has compiled with the code object, and looks for the variant that fits there. By its name it
    # notes what has varied so far. Had another pass the same name, a stride would become a variable where that one had
    # another stride; and the code, and with it the bits, would depend on what else this process has compiled.
    name = f"{function.__name__}_{next(_numbers)}"
    own = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    wanted = {"cpp.threads": num_threads, "compile_threads": 1, "deterministic": True}
    there = torch._inductor.list_options()
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in there}
    return cast(_Pass, torch.compile(own, fullgraph=True, options=options))


def compiled_code() -> bytes:
    """What this process has compiled or taken from torch's cache, for :func:`take_compiled_code` elsewhere."""
    saved = torch.compiler.save_cache_artifacts()
    return b"" if saved is None else saved[0]


@functools.lru_cache(maxsize=1)
def take_compiled_code(code: bytes) -> None:
    """Put what another process has compiled into torch's cache here, once. Of use on a machine of the same kind."""
    if code:
        torch.compiler.load_cache_artifacts(code)


def require_compiling() -> None:
    """See that torch.compile is on, before a step moves anything: eager passes would have other bits.

    Raises:
        KernelError: If it was turned off in this process.
    """
    if torch._dynamo.config.disable or torch._dynamo.eval_frame._stance.stance == "force_eager":
        raise KernelError(
            "expected kernels to be compiled, as this job's others were; torch.compile was turned off in this process "
            "(torch.compiler.set_stance or TORCH_COMPILE_DISABLE). Turn it on, or begin with kernel='eager'"
        )


@contextmanager
def told_if_slow(what: str) -> Iterator[None]:
    """Say what is being compiled if it takes long, as nobody expects to wait there."""
    message = "compiling %s, once for this machine: later runs find it in torch's cache"
    timer = threading.Timer(SLOW_S, logger.warning, (message, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _missing(device: torch.device) -> str | None:
    """What keeps passes from being compiled for a device, and what to do about it; None for nothing."""
    if torch._dynamo.config.disable:
        return "torch.compile is turned off (TORCH_COMPILE_DISABLE); turn it on"
    if not torch._dynamo.is_dynamo_supported():  # type: ignore[attr-defined]
        return (
            f"torch {torch.__version__} compiles nothing under Python {platform.python_version()}; take another of them"
        )
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "expected Triton, for kernels on a GPU; install triton"
    if _cpp_compiler() is None:
        return "expected a C++ compiler, for kernels on the CPU; install g++ or set CXX"
    if not _python_header().exists():
        return f"expected Python's headers, for kernels on the CPU, at {_python_header()}; install python3-dev"
    return None


@functools.cache
def _compiler(device: torch.device) -> str:
    if device.type == "cuda":
        import triton

        return f"triton {triton.__version__}"
    path = _cpp_compiler()
    assert path is not None, "kernels were resolved before"
    asked = subprocess.run([path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, timeout=60)
    return f"{path.rsplit('/', 1)[-1]} {asked.stdout.strip()}"


@functools.cache
def _cpp_compiler() -> str | None:
    """The compiler that torch would take."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None


def _python_header() -> Path:
    """What compiled code includes, to be called from Python."""
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
