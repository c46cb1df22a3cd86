"""Writes client/optimizers: one class for each update rule, whose keywords and defaults are the rule's fields.

Run it (`make optimizers`) after a rule or one of its fields has changed; with `--check` it only tells whether that is
due. A field that is new needs its sentence in :data:`SENTENCES`. Where torch has the optimizer, order and kind of the
keywords are torch's.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Not as stepwell.optim: the package imports the classes, which may be those of other rules until they are written anew.
from optim import RULES, Rule  # noqa: E402, TID251

FOLDER = ROOT / "client" / "optimizers"
WIDTH = 120

SENTENCES = {
    "lr": "Learning rate, a float or a 0-dim tensor.",
    "Prodigy.lr": "Factor on the estimated step size; schedule it, do not tune it.",
    "alpha": "Decay of the squared gradient's running average.",
    "amsgrad": "Use the largest squared average so far.",
    "beta": "Decay of the running average.",
    "beta3": "Decay of the distance estimate's averages; None takes sqrt(beta2).",
    "betas": "Decay of the gradient's and the squared gradient's running averages.",
    "bias_correction": "Divide the average by 1 - beta^t.",
    "centered": "Take the squared average around the gradient's average.",
    "curvature_clip": "Largest magnitude of one step's estimate of the curvature.",
    "d0": "First estimate of the distance.",
    "d_coef": "Factor on the estimate.",
    "d_scope": "What one estimate d is taken over: the whole model, or each parameter group for itself.",
    "dampening": "Share of the gradient that is kept out of the momentum.",
    "decouple": "AdamW's form of weight decay.",
    "decoupled_weight_decay": "Multiply the parameter, as AdamW does, instead of adding to the gradient.",
    "eps": "Added to the denominator.",
    "Prodigy.eps": "Added to the denominator, scaled by d.",
    "eps_d": 'Which d scales eps, the step\'s "new" one or the "old" one.',
    "estimator": "How the distance is estimated.",
    "excluded_c_in": "Weights with so many input channels, and fewer output channels, are left alone.",
    "freeze_d": "Keep the estimate as it is.",
    "fsdp_in_use": "Accepted as prodigyopt's; has no effect, since the estimate is always global here.",
    "growth_rate": "Largest factor by which d may rise in a step.",
    "max_d": "Largest d.",
    "maximize": "Go up the gradient.",
    "min_scale": "Smallest mean magnitude of a tensor that scales its step.",
    "momentum": "Momentum factor.",
    "momentum_decay": "Decay of the momentum's schedule.",
    "nesterov": "Nesterov's form of momentum.",
    "norm": 'The norm that the step is divided by, "rms" or "l2".',
    "ratio": 'Which way the ratio of norms is taken: "current/init" or "init/current".',
    "ratio_clip": "Largest magnitude of the gradient's ratio to its average.",
    "rho_threshold": "From which rho on the step is rectified: 5 in torch, 4 in the paper.",
    "safeguard_warmup": "Keep lr out of the estimate's denominator, for long warm-ups.",
    "slice_p": "Take the estimate's statistics over every slice_p-th element, to save memory.",
    "stat_dtype": "The dtype in which the estimate's statistics are kept.",
    "use_bias_correction": "Adam's bias correction.",
    "weight_decay": "Weight decay; the rule's equations say where it enters.",
    "AdamW.weight_decay": "Decoupled weight decay.",
    "LAMB.weight_decay": "Added to the direction, inside the trust ratio.",
    "Prodigy.weight_decay": "Decoupled with ``decouple``, else L2.",
    "weight_decay_by_lr": "Scale weight decay by the learning rate.",
    "foreach": "Accepted as torch's; has no effect, since the service computes the update.",
    "fused": "Accepted as torch's; has no effect, since the service computes the update.",
    "capturable": "Accepted as torch's, as long as it is False.",
    "differentiable": "Accepted as torch's, as long as it is False.",
}
"""What a keyword means: of every rule, or of the one named before the dot."""

TORCH_KEYWORDS = {"foreach": "bool | None", "fused": "bool | None", "capturable": "bool", "differentiable": "bool"}
"""Keywords of torch.optim's that say how to compute, and their types."""

TYPES = {"lr": "float | Tensor", "betas": "tuple[float | Tensor, float | Tensor]"}
"""Types of keywords that may be tensors where the rule has floats."""


@dataclasses.dataclass(frozen=True)
class Keyword:
    """One keyword of a class."""

    name: str
    annotation: str
    default: str
    is_keyword_only: bool


def keywords_of(rule: type[Rule]) -> list[Keyword]:
    """The rule's fields and torch's keywords, in torch's order where torch has the optimizer."""
    fields = {field.name: field for field in dataclasses.fields(rule)}
    reference = getattr(torch.optim, rule.name, None)
    known = dict(inspect.signature(reference).parameters) if reference else {}
    known.pop("params", None)
    keywords = []
    for name in [*known, *(name for name in fields if name not in known)]:
        only = known[name].kind is inspect.Parameter.KEYWORD_ONLY if name in known else bool(reference)
        if name in fields:
            default = fields[name].default
            literal = "math.inf" if default == math.inf else repr(default).replace("'", '"')
            keywords.append(Keyword(name, TYPES.get(name, str(fields[name].type)), literal, only))
        else:
            keywords.append(Keyword(name, TORCH_KEYWORDS[name], repr(known[name].default), only))
    return keywords


def docstring_of(rule: type[Rule], keywords: list[Keyword]) -> str:
    """The class's docstring: what it is, every keyword, what it raises."""
    others = {field.name for field in dataclasses.fields(rule)} | rule.carried_group_keys.keys()
    scalars = [f"``{name}``" for name in rule().defaults() if name not in others]
    shown = f" After each step every group shows {', '.join(scalars)}." if scalars else ""
    lines = [(inspect.getdoc(rule) or "").splitlines()[0], ""]
    lines += textwrap.wrap(f"The equations are those of :class:`stepwell.optim.{rule.__name__}`.{shown}", WIDTH - 4)
    lines += ["", "Args:", "    params: Parameters, named parameters, or groups of either."]
    for keyword in keywords:
        sentence = SENTENCES.get(f"{rule.name}.{keyword.name}") or SENTENCES[keyword.name]
        text = f"    {keyword.name}: {sentence}"
        lines += textwrap.wrap(text, WIDTH - 4, subsequent_indent=" " * 8)
    refused = [f"``{keyword.name}``" for keyword in keywords if keyword.name in ("capturable", "differentiable")]
    lines += ["    options: See :class:`stepwell.ServiceOptimizer`.", "", "Raises:"]
    lines += ["    ValueError: If a value is out of range" + (f", or {' or '.join(refused)} True." if refused else ".")]
    return textwrap.indent("\n".join(lines), " " * 4).strip()


def class_of(rule: type[Rule]) -> str:
    """The class's source."""
    keywords = keywords_of(rule)
    signature = []
    for index, keyword in enumerate(keywords):
        if keyword.is_keyword_only and (index == 0 or not keywords[index - 1].is_keyword_only):
            signature.append("*")
        signature.append(f"{keyword.name}: {keyword.annotation} = {keyword.default}")
    fields = ", ".join(f"{keyword.name}={keyword.name}" for keyword in keywords if keyword.name not in TORCH_KEYWORDS)
    torchs = ", ".join(f"{keyword.name}={keyword.name}" for keyword in keywords if keyword.name in TORCH_KEYWORDS)
    carried = f"carried=torch_keywords({torchs}), " if torchs else ""
    return f'''
class {rule.name}(ServiceOptimizer):
    """{docstring_of(rule, keywords)}
    """

    def __init__(self, params: ParamsT, {", ".join(signature)}, **options: Unpack[ServiceOptions],) -> None:
        rule = make_rule({rule.__name__}, {fields})
        super().__init__(params, rule, {carried}**options)
'''


def module_of(rules: list[type[Rule]]) -> str:
    """The source of the module that holds the optimizers of ``rules``."""
    body = "".join(class_of(rule) for rule in rules)
    math_import = "import math\n" if "math." in body else ""
    typing_names = "Literal, Unpack" if "Literal[" in body else "Unpack"
    keywords = "ServiceOptions, make_rule" + (", torch_keywords" if "torch_keywords(" in body else "")
    return f'''"""{", ".join(rule.name for rule in rules)}. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

{math_import}from typing import {typing_names}

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import {", ".join(rule.__name__ for rule in rules)}
from ..keywords import {keywords}
from ..optimizer import ServiceOptimizer

{body}'''


def write_sources() -> dict[str, str]:
    """Every file of the folder: its name and source."""
    modules: dict[str, list[type[Rule]]] = {}
    for name in RULES.names():
        rule = type(RULES.build(name, {}))
        modules.setdefault(rule.__module__.rpartition(".")[2], []).append(rule)
    sources = {f"{module}.py": module_of(rules) for module, rules in modules.items()}
    imports = [f"from .{module} import {', '.join(rule.name for rule in modules[module])}" for module in modules]
    summary = "The named optimizers: one per rule, with the reference's keywords. Written by `make optimizers`."
    sources["__init__.py"] = f'"""{summary}"""\n\n' + "\n".join([*imports, f"__all__ = {RULES.names()!r}"])
    return {name: _tidy(source) for name, source in sources.items()}


def _tidy(source: str) -> str:
    for command in (["check", "--fix-only", "--quiet", "--select=I,RUF022"], ["format", "--quiet"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(FOLDER / "written.py"), "-"]
        source = subprocess.run(arguments, input=source, capture_output=True, text=True, check=True).stdout
    return source


def main(*, check: bool) -> int:
    """Write the folder, or tell whether it is as it should be; the exit status."""
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    written = write_sources()
    if check:
        stale = sorted(name for name in there.keys() | written.keys() if there.get(name) != written.get(name))
        if stale:
            sys.stderr.write(f"client/optimizers: run `make optimizers`, which changes {', '.join(stale)}\n")
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for name in there.keys() - written.keys():
        (FOLDER / name).unlink()
    for name, source in written.items():
        (FOLDER / name).write_text(source, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
