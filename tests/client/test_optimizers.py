"""The named optimizers against the references: same model, same data, same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prodigyopt
import pytest
import torch
from torch import Tensor, nn

import stepwell
from tests.client.training import assert_close, assert_equal, copies_of, drive, make_net, set_grads, train, values_of

PRODIGY_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "d0": 1e-3},
    {"weight_decay": 0.1, "decouple": False},
    {"betas": (0.0, 0.99), "beta3": 0.9},
    {"use_bias_correction": True, "safeguard_warmup": True},
    {"growth_rate": 1.5, "d0": 1e-4, "d_coef": 0.7},
    {"slice_p": 11},
]
ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-5},
    {"lr": 0.01, "amsgrad": True},
    {"lr": 0.001, "maximize": True},
]


def _id(options: dict[str, Any]) -> str:
    return ",".join(options) or "defaults"


@pytest.mark.parametrize("options", PRODIGY_OPTIONS, ids=_id)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["float32", "float64"])
def test_prodigy_agrees_with_prodigyopt(options: dict[str, Any], dtype: torch.dtype, rel: float) -> None:
    net, oracle_net = make_net(dtype), make_net(dtype)
    optimizer = stepwell.Prodigy(net.parameters(), **options)
    oracle = prodigyopt.Prodigy(oracle_net.parameters(), **options)
    assert train(net, optimizer, range(25)) == pytest.approx(train(oracle_net, oracle, range(25)), rel=rel)
    for key in ("d", "d_max", "d_numerator", "k"):
        assert optimizer.param_groups[0][key] == pytest.approx(oracle.param_groups[0][key], rel=rel)
    assert_close(net.parameters(), oracle_net.parameters(), rtol=rel, atol=rel / 10)


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=_id)
def test_adamw_agrees_with_torch(options: dict[str, Any]) -> None:
    net, oracle_net = make_net(), make_net()
    optimizer, oracle = (
        stepwell.AdamW(net.parameters(), **options),
        torch.optim.AdamW(oracle_net.parameters(), **options),
    )
    train(net, optimizer, range(25))
    train(oracle_net, oracle, range(25))
    assert_close(net.parameters(), oracle_net.parameters())


def test_optimizer_with_a_rule_is_the_named_one() -> None:
    net, other = make_net(), make_net()
    train(net, stepwell.LAMB(net.parameters(), lr=0.01), range(3))
    train(other, stepwell.ServiceOptimizer(other.parameters(), stepwell.optim.LAMBRule(lr=0.01)), range(3))
    assert_equal(net.parameters(), other.parameters())


@pytest.mark.parametrize("make", [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB])
def test_optimizer_stands_still_at_lr_0(make: Callable[..., stepwell.ServiceOptimizer]) -> None:
    net = make_net()
    optimizer = make(net.parameters(), weight_decay=0.1)
    train(net, optimizer, range(2))
    before = values_of(net.parameters())
    lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
    train(net, optimizer, [2])
    assert_equal(net.parameters(), before)
    optimizer.param_groups[0]["lr"] = lr
    train(net, optimizer, [3])
    assert not torch.equal(next(net.parameters()), before[0])


def test_groups_have_their_own_hyperparameters() -> None:
    net, oracle_net = make_net(), make_net()

    def groups(of: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": of[0].parameters(), "lr": 0.03, "betas": (0.7, 0.9)},
            {"params": [of[2].weight], "weight_decay": 0.5},
            {"params": [of[2].bias], "eps": 1e-3},
        ]

    train(net, stepwell.AdamW(groups(net), lr=0.01), range(10))
    train(oracle_net, torch.optim.AdamW(groups(oracle_net), lr=0.01), range(10))
    assert_close(net.parameters(), oracle_net.parameters())


def test_prodigy_group_at_lr_0_stands_still() -> None:
    net = make_net()
    before = values_of(net[0].parameters())
    groups: list[dict[str, Any]] = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}]
    optimizer = stepwell.Prodigy(groups)
    train(net, optimizer, range(10))
    assert_equal(net[0].parameters(), before)
    alone = make_net()
    train(alone, stepwell.Prodigy(alone[2].parameters()), range(10))
    assert_close(net[2].parameters(), alone[2].parameters())


def test_parameters_without_gradient_stand_still() -> None:
    params = copies_of(make_net().parameters())
    frozen = params[1].requires_grad_(False)
    oracle_params = copies_of(params)
    optimizer, oracle = stepwell.AdamW(params, lr=0.01), torch.optim.AdamW(oracle_params, lr=0.01)
    before = frozen.detach().clone()
    for step in range(6):
        for each, its_params in ((optimizer, params), (oracle, oracle_params)):
            set_grads(its_params, step)
            its_params[1].grad = None
            if step % 2:
                its_params[3].grad = None
            each.step()
    assert torch.equal(frozen, before)
    assert_close(params, oracle_params)
    assert [index in optimizer.state_dict()["state"] for index in range(4)] == [True, False, True, True]
    assert optimizer.state_dict()["state"][3]["step"] == 3


@pytest.mark.parametrize("make", [stepwell.Prodigy, stepwell.AdamW])
def test_step_without_any_gradient_changes_no_parameter(make: Callable[..., stepwell.ServiceOptimizer]) -> None:
    net = make_net()
    optimizer, before = make(net.parameters()), values_of(net.parameters())
    optimizer.step()
    assert_equal(net.parameters(), before)
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_keeps_a_float32_master_of_low_precision(dtype: torch.dtype) -> None:
    params = copies_of(make_net().parameters(), dtype)
    masters = copies_of(params, torch.float32)
    optimizer, oracle = stepwell.AdamW(params, lr=0.003), torch.optim.AdamW(masters, lr=0.003)
    for step in range(20):
        set_grads(params, step)
        for master, param in zip(masters, params, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
        optimizer.step()
        oracle.step()
    assert {param.dtype for param in params} == {dtype}
    state = optimizer.state_dict()["state"]
    assert_close([state[index]["master_param"] for index in range(4)], masters)
    assert_equal(params, [state[index]["master_param"].to(dtype) for index in range(4)])


def test_adamw_keeps_updates_that_bfloat16_would_lose() -> None:
    param, alone = (nn.Parameter(torch.ones(300, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = stepwell.AdamW([param], lr=1e-4, weight_decay=0.0)
    reference = torch.optim.AdamW([alone], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        for each in (param, alone):
            each.grad = torch.ones_like(each)
        optimizer.step()
        reference.step()
    assert torch.equal(alone, torch.ones_like(alone)), "bfloat16 has no number between 1 and 0.996"
    torch.testing.assert_close(param.detach().float(), torch.full((300,), 0.99), rtol=0, atol=2e-3)


def test_float64_model_is_computed_in_float64() -> None:
    net, oracle_net = make_net(torch.float64), make_net(torch.float64)
    train(net, stepwell.AdamW(net.parameters(), lr=0.01), range(15))
    train(oracle_net, torch.optim.AdamW(oracle_net.parameters(), lr=0.01), range(15))
    assert_close(net.parameters(), oracle_net.parameters(), rtol=1e-12, atol=1e-13)
    assert {param.dtype for param in net.parameters()} == {torch.float64}


@pytest.mark.parametrize("make", [stepwell.Prodigy, stepwell.AdamW])
def test_mixed_dtypes_each_come_back_in_their_own(make: Callable[..., stepwell.ServiceOptimizer]) -> None:
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float16]
    values = [param.detach() for param in make_net().parameters()]
    params = [nn.Parameter(value.to(dtype)) for value, dtype in zip(values, dtypes, strict=True)]
    exact = [param.detach().clone().double().requires_grad_() for param in params]
    optimizer, oracle = make(params, lr=0.01), make(exact, lr=0.01)
    for step in range(10):
        set_grads(params, step)
        for param, other in zip(params, exact, strict=True):
            assert param.grad is not None
            other.grad = param.grad.double()
        optimizer.step()
        oracle.step()
    assert [param.dtype for param in params] == dtypes
    state = optimizer.state_dict()["state"]
    assert [state[index]["exp_avg"].dtype for index in range(4)] == [torch.float32, torch.float64] + 2 * [torch.float32]
    for param, other, dtype in zip(params, exact, dtypes, strict=True):
        rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # d is of float32 parameters too
        torch.testing.assert_close(param.detach().double(), other.detach(), rtol=2 * rounding, atol=2e-6)


def _odd_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        nn.Parameter(torch.tensor(2.5)),
        nn.Parameter(torch.zeros(0, 3)),
        nn.Parameter(randn(4, 6, 5, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(randn(30, 20).t()),
        nn.Parameter(randn(40, 9)[:, ::2]),
        nn.Parameter(torch.zeros(0)),
    ]


@pytest.mark.parametrize(
    ("make", "reference"),
    [(stepwell.AdamW, torch.optim.AdamW), (stepwell.Prodigy, prodigyopt.Prodigy)],
    ids=["AdamW", "Prodigy"],
)
def test_odd_shapes_and_strides_agree(make: Any, reference: Any) -> None:
    params, oracle_params = _odd_params(), _odd_params()
    optimizer, oracle = make(params, lr=1.0), reference(oracle_params, lr=1.0)
    strides = [param.stride() for param in params]
    drive(params, optimizer, range(10))
    drive(oracle_params, oracle, range(10))
    assert [param.stride() for param in params] == strides
    assert_close(params, oracle_params, rtol=1e-4, atol=1e-5)
    assert [state["exp_avg"].shape for state in optimizer.state_dict()["state"].values()] == [p.shape for p in params]


def test_nothing_but_zero_elements_can_be_stepped() -> None:
    param = nn.Parameter(torch.zeros(0, 3))
    optimizer = stepwell.Prodigy([param])
    drive([param], optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.service.status()["numel"] == 0
