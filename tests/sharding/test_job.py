"""The job's description: what must be the same on every worker, and what may come over the wire."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.sharding.errors import JobMismatchError, MessageError
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec

PARAMS = (
    ParamSpec("embed.weight", (50, 8), "bfloat16", 0),
    ParamSpec("head.weight", (8, 8), "float32", 1),
    ParamSpec("head.bias", (), "float64", 1),
)
JOB = JobSpec(ProdigyRule(), PARAMS, 2, 4)


def with_param(index: int, **fields: Any) -> JobSpec:
    params = list(PARAMS)
    params[index] = dataclasses.replace(params[index], **fields)
    return dataclasses.replace(JOB, params=tuple(params))


@pytest.mark.parametrize("rule", [ProdigyRule(slice_p=3, beta3=0.5), AdamWRule(betas=(0.5, 0.6)), LAMBRule()], ids=str)
@pytest.mark.parametrize("chunk_numel", [None, 2**20])
def test_job_survives_the_wire(rule: Rule, chunk_numel: int | None) -> None:
    job = dataclasses.replace(JOB, rule=rule, chunk_numel=chunk_numel)
    assert JobSpec.from_dict(msgpack.unpackb(msgpack.packb(job.to_dict()))) == job


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (dataclasses.replace(JOB, rule=AdamWRule()), "rule: the service has Prodigy, rank 3 has AdamW"),
        (dataclasses.replace(JOB, world_size=2), "world_size: the service has 4, rank 3 has 2"),
        (dataclasses.replace(JOB, num_groups=3), "number of parameter groups: the service has 2, rank 3 has 3"),
        (dataclasses.replace(JOB, params=PARAMS[:2]), "number of parameters: the service has 3, rank 3 has 2"),
        (
            with_param(0, name="wte.weight"),
            r"parameter 0: the service has 'embed.weight' \[50, 8\] bfloat16 in group 0",
        ),
        (with_param(1, shape=(64,)), r"parameter 1: .*rank 3 has 'head.weight' \[64\] float32 in group 1"),
        (with_param(1, dtype="float16"), "parameter 1: .*float16"),
        (with_param(2, group=0), "parameter 2: .*in group 0"),
        (dataclasses.replace(JOB, rule=ProdigyRule(slice_p=11)), "slice_p: the service has 1, rank 3 has 11"),
        (
            dataclasses.replace(JOB, rule=ProdigyRule(decouple=False)),
            "decouple: the service has True, rank 3 has False",
        ),
        (dataclasses.replace(JOB, rule=ProdigyRule(betas=(0.0, 0.9))), "state: the service has .*exp_avg"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_first_difference_is_named(other: JobSpec, difference: str) -> None:
    with pytest.raises(JobMismatchError, match=f"rank 3 does not match the service's job: {difference}"):
        JOB.require_same(other, whose="rank 3")


def test_hyperparameters_names_that_are_unknown_and_chunks_may_differ() -> None:
    JOB.require_same(dataclasses.replace(JOB, rule=ProdigyRule(lr=0.5, d0=1e-3, beta3=0.5)), whose="rank 3")
    JOB.require_same(dataclasses.replace(JOB, chunk_numel=4096), whose="rank 3")
    JOB.require_same(with_param(0, name=""), whose="rank 3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "Sophia"),
        ("rule", None),
        ("rule_fields", {"lr": -1.0}),
        ("rule_fields", {"nonsense": 1}),
        ("rule_fields", None),
        ("rule_fields", []),
        ("params", None),
        ("params", [["w", [3], "float32"]]),
        ("params", [["w", [3], "float32", 0]]),
        ("params", [["w", [3], "int64", 0, True]]),
        ("params", [["w", [-3], "float32", 0, True]]),
        ("params", [["w", [3], "float32", 2, True]]),
        ("params", [["w", 3, "float32", 0, True]]),
        ("params", [["w", ["3"], "float32", 0, True]]),
        ("num_groups", "many"),
        ("world_size", None),
        ("world_size", 0),
        ("world_size", float("inf")),
        ("chunk_numel", "large"),
    ],
    ids=str,
)
def test_field_that_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(MessageError):
        JobSpec.from_dict({**JOB.to_dict(), field: value})


@pytest.mark.parametrize("field", list(JOB.to_dict()))
def test_field_that_is_missing_is_refused(field: str) -> None:
    with pytest.raises(MessageError, match=field):
        JobSpec.from_dict({key: value for key, value in JOB.to_dict().items() if key != field})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(list(JOB.to_dict())), PLAIN)
def test_anything_in_a_field_is_a_job_or_a_message_error(field: str, value: object) -> None:
    try:
        job = JobSpec.from_dict({**JOB.to_dict(), field: value})
    except MessageError:
        return
    assert JobSpec.from_dict(job.to_dict()) == job
