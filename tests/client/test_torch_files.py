"""Checkpoints to torch's files and back: the reference optimizers load what is written, and what they write is read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

import stepwell
from stepwell.client.torch_files import export_checkpoint, import_checkpoint
from stepwell.sharding.errors import CheckpointError, JobMismatchError
from stepwell.sharding.folder import read_complete
from tests.client.training import assert_close, assert_equal, assert_same_state, make_net, train
from tests.command_line import Cli

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed.checkpoint"),
]

dcp: Any = torch.distributed.checkpoint  # which exports its names for no type checker
NUM_STEPS = 4
Make = Callable[[Any], torch.optim.Optimizer]
PAIRS: dict[str, tuple[Make, Make]] = {
    "Prodigy": (
        lambda params: stepwell.Prodigy(params, slice_p=3, num_shards=2),
        lambda params: prodigyopt.Prodigy(params, slice_p=3),
    ),
    "AdamW": (
        lambda params: stepwell.AdamW(params, lr=0.01, amsgrad=True, num_shards=2),
        lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    ),
    "NAdam": (
        lambda params: stepwell.NAdam(params, lr=0.01, num_shards=2),
        lambda params: torch.optim.NAdam(params, lr=0.01),
    ),
}


def groups_of(net: nn.Module, *, named: bool) -> list[dict[str, Any]]:
    """Two groups: weights and biases."""
    return [
        {"params": [(name, param) if named else param for name, param in net.named_parameters() if name.endswith(end)]}
        for end in ("weight", "bias")
    ]


def trained(make: Make, *, named: bool = True) -> tuple[nn.Sequential, Any]:
    net = make_net()
    optimizer = make(groups_of(net, named=named))
    train(net, optimizer, range(NUM_STEPS))
    return net, optimizer


def loaded(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def params_in_order(net: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(net.named_parameters())
    return {name: named[name].detach() for name in sorted(named, key=lambda name: name.endswith("bias"))}


def save_params(net: nn.Module, path: Path) -> str:
    torch.save(params_in_order(net), path)
    return str(path)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_reference_goes_on_from_an_exported_checkpoint(tmp_path: Path, name: str, named: bool) -> None:
    net, optimizer = trained(PAIRS[name][0], named=named)
    optimizer.service.save(str(tmp_path / "checkpoint"))
    export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "o.pt"), params=str(tmp_path / "p.pt"))
    assert_same_state({**loaded(tmp_path / "o.pt"), "param_groups": 0}, {**optimizer.state_dict(), "param_groups": 0})
    other = make_net()
    exported = loaded(tmp_path / "p.pt")
    if named:
        other.load_state_dict(exported)
    else:
        assert list(exported) == ["0", "1", "2", "3"]
        other.load_state_dict(dict(zip(params_in_order(net), exported.values(), strict=True)))
    assert_equal(other.parameters(), net.parameters())
    reference = PAIRS[name][1](groups_of(other, named=named))
    reference.load_state_dict(loaded(tmp_path / "o.pt"))
    train(net, optimizer, range(NUM_STEPS, NUM_STEPS + 3))
    train(other, reference, range(NUM_STEPS, NUM_STEPS + 3))
    assert_close(other.parameters(), net.parameters(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_service_goes_on_from_an_imported_state_dict(tmp_path: Path, name: str, named: bool, distributed: bool) -> None:
    net, reference = trained(PAIRS[name][1], named=named)
    if distributed:
        dcp.save(reference.state_dict(), checkpoint_id=tmp_path / "o", no_dist=True)
    else:
        torch.save(reference.state_dict(), tmp_path / "o")
    uri = str(tmp_path / "checkpoint")
    assert import_checkpoint(str(tmp_path / "o"), uri, rule=name, params=save_params(net, tmp_path / "p")) == NUM_STEPS
    other = make_net()
    optimizer = PAIRS[name][0](groups_of(other, named=named))
    assert isinstance(optimizer, stepwell.ServiceOptimizer)
    assert optimizer.service.restore(uri) == NUM_STEPS
    optimizer.refresh()
    assert_equal(other.parameters(), net.parameters())
    train(net, reference, range(NUM_STEPS, NUM_STEPS + 3))
    train(other, optimizer, range(NUM_STEPS, NUM_STEPS + 3))
    assert_close(other.parameters(), net.parameters(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_exported_to_a_folder_is_imported_to_the_bit(tmp_path: Path, name: str) -> None:
    _, optimizer = trained(PAIRS[name][0])
    uris = [str(tmp_path / "checkpoint"), str(tmp_path / "again")]
    optimizer.service.save(uris[0])
    export_checkpoint(uris[0], str(tmp_path / "dcp"), distributed=True, params=str(tmp_path / "p.pt"))
    import_checkpoint(str(tmp_path / "dcp"), uris[1], rule=name, params=str(tmp_path / "p.pt"))
    successor = PAIRS[name][0](groups_of(make_net(), named=True))
    assert isinstance(successor, stepwell.ServiceOptimizer)
    successor.service.restore(uris[1])
    successor.refresh()
    assert_same_state(successor.state_dict(), optimizer.state_dict())


def test_half_precision_parameters_are_exported_as_the_model_has_them(tmp_path: Path) -> None:
    net = make_net(torch.bfloat16)
    optimizer = stepwell.AdamW(net.named_parameters(), lr=0.01)
    train(net, optimizer, range(2))
    optimizer.service.save(str(tmp_path / "checkpoint"))
    export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "o.pt"), params=str(tmp_path / "p.pt"))
    assert_equal(loaded(tmp_path / "p.pt").values(), net.parameters())
    assert loaded(tmp_path / "o.pt")["state"][0]["master_param"].dtype == torch.float32


# What is refused


def make_uri(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoint")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_pickle_is_never_run(tmp_path: Path) -> None:
    net, reference = trained(PAIRS["AdamW"][1])
    params, ran = save_params(net, tmp_path / "p"), tmp_path / "ran"
    (tmp_path / "plain").write_bytes(pickle.dumps(Evil(ran), protocol=2))
    torch.save({"state": {}, "param_groups": [Evil(ran)]}, tmp_path / "zipped")
    dcp.save({**reference.state_dict(), "more": Evil(ran)}, checkpoint_id=tmp_path / "value", no_dist=True)
    dcp.save(reference.state_dict(), checkpoint_id=tmp_path / "metadata", no_dist=True)
    (tmp_path / "metadata" / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
    for name in ("plain", "zipped", "value", "metadata"):
        with pytest.raises(CheckpointError, match=f"{name}: expected a f.* with tensors and numbers alone"):
            import_checkpoint(str(tmp_path / name), make_uri(tmp_path), rule="AdamW", params=params)
    torch.save(reference.state_dict(), tmp_path / "fine")
    with pytest.raises(CheckpointError, match="with tensors and numbers alone"):
        import_checkpoint(str(tmp_path / "fine"), make_uri(tmp_path), rule="AdamW", params=str(tmp_path / "plain"))
    assert not ran.exists()
    assert not Path(make_uri(tmp_path)).exists()


def test_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    net, reference = trained(PAIRS["AdamW"][1])
    dcp.save(reference.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    metadata = tmp_path / "dcp" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"../../../etc"))
    with pytest.raises(CheckpointError, match=r"name the file '\.\./\.\./\.\./etc'"):
        import_checkpoint(
            str(tmp_path / "dcp"), make_uri(tmp_path), rule="AdamW", params=save_params(net, tmp_path / "p")
        )


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_damaged_files_are_refused(tmp_path: Path, kept: float) -> None:
    net, reference = trained(PAIRS["AdamW"][1])
    params = save_params(net, tmp_path / "p")
    dcp.save(reference.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save(reference.state_dict(), tmp_path / "o")
    for victim, source in (("o", "o"), ("dcp/__0_0.distcp", "dcp"), ("dcp/.metadata", "dcp")):
        data = (tmp_path / victim).read_bytes()
        (tmp_path / victim).write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(CheckpointError, match=str(tmp_path / source)):
            import_checkpoint(str(tmp_path / source), make_uri(tmp_path), rule="AdamW", params=params)
        (tmp_path / victim).write_bytes(data)


def test_state_dict_that_does_not_fit_is_refused_and_says_why(tmp_path: Path) -> None:
    net, reference = trained(PAIRS["AdamW"][1], named=False)
    params, source = save_params(net, tmp_path / "p"), str(tmp_path / "o")
    few = tmp_path / "few"
    torch.save(dict(list(params_in_order(net).items())[1:]), few)

    def imported(content: object, rule: str = "AdamW", params: str = params) -> None:
        torch.save(content, source)
        import_checkpoint(source, make_uri(tmp_path), rule=rule, params=params)

    state_dict = reference.state_dict()
    with pytest.raises(CheckpointError, match=r"expected an optimizer's state dict.*got \['weight'\]"):
        imported({"weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="expected a dict, got list"):
        imported([1])
    with pytest.raises(CheckpointError, match="expected groups with lists 'params'"):
        imported({"state": {}, "param_groups": [{"lr": 1.0}]})
    with pytest.raises(
        CheckpointError, match="expected the 4 parameters of the optimizer, in its order, got 3 tensors"
    ):
        imported(state_dict, params=str(few))
    with pytest.raises(JobMismatchError, match=r"lacks 's'|which Prodigy here does not keep"):
        imported(state_dict, rule="Prodigy")
    with pytest.raises(ValueError, match="unknown rule 'Adagrad'"):
        imported(state_dict, rule="Adagrad")
    with pytest.raises(CheckpointError, match="nowhere: cannot be read"):
        import_checkpoint(str(tmp_path / "nowhere"), make_uri(tmp_path), rule="AdamW", params=params)
    assert not Path(make_uri(tmp_path)).exists()


def test_export_to_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    _, optimizer = trained(PAIRS["AdamW"][0])
    optimizer.service.save(make_uri(tmp_path))
    (tmp_path / "taken").write_bytes(b"")
    for distributed in (False, True):
        with pytest.raises(CheckpointError, match=r"taken.*cannot be written"):
            export_checkpoint(make_uri(tmp_path), str(tmp_path / "taken" / "o.pt"), distributed=distributed)


def test_command_line_exports_and_imports(cli: Cli, tmp_path: Path) -> None:
    _, optimizer = trained(PAIRS["Prodigy"][0])
    optimizer.service.save(make_uri(tmp_path))
    exported, params, again = (str(tmp_path / name) for name in ("o.pt", "p.pt", "again"))
    run = cli("checkpoint", "export", make_uri(tmp_path), exported, "--params", params)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"exported {make_uri(tmp_path)} to {exported}, its parameters to {params}\n"
    run = cli("checkpoint", "import", exported, again, "--rule", "Prodigy", "--params", params)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"imported step {NUM_STEPS} from {exported} to {again}\n"
    first, second = read_complete(make_uri(tmp_path)), read_complete(again)
    assert first.spec.params == second.spec.params
    assert (first.scalars, first.step_counts) == (second.scalars, second.step_counts)
    cli("checkpoint", "import", params, again, "--rule", "Prodigy", "--params", params).require_error("state dict")
