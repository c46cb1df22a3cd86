import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from stepwell.client.demo import events
from stepwell.client.demo.command import demo
from stepwell.client.demo.model import GPT, GPTSettings, generate, params_digest
from stepwell.client.demo.picture import draw, smoothed
from stepwell.client.demo.processes import last_line
from stepwell.client.demo.record import Record
from stepwell.client.demo.settings import DemoError, DemoSettings, WorkerSettings
from stepwell.client.demo.text import HELD_OUT_BYTES, TRAIN_BYTES, Corpus, held_out_batches, read_corpus, train_batch

TINY = GPTSettings(width=16, num_layers=2, num_heads=2, context_numel=12)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus()


def slice_of(corpus: Corpus, *, step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return train_batch(corpus, seed=3, step=step, batch_size=16, context_numel=20, rank=rank, world_size=world_size)


def tiny_run() -> list[events.Event]:
    steps = [
        events.Step(step=step, loss=5.0 / step, d=1e-6 * 2**step, lr=1.0, step_s=0.01 * step) for step in range(1, 9)
    ]
    return [
        events.Phase("starting"),
        events.Start(step=0, numel=100, train_bytes=1000),
        events.HeldOut(step=0, loss=5.5),
        *steps,
        events.Saved(step=4, uri="/a/checkpoint-4"),
        events.HeldOut(step=8, loss=0.7),
        events.Done(step=8, params_digest="ab", sample="def f():\n\treturn 1"),
    ]


def test_corpus_is_the_same_text_each_time(corpus: Corpus) -> None:
    again = read_corpus()
    assert torch.equal(again.train, corpus.train)
    assert torch.equal(again.held_out, corpus.held_out)


def test_corpus_is_bounded_python_source(corpus: Corpus) -> None:
    assert HELD_OUT_BYTES <= corpus.train.numel() <= TRAIN_BYTES
    assert corpus.held_out.numel() == HELD_OUT_BYTES
    assert bytes(corpus.train.tolist()).count(b"    def ") > 1000


def test_corpus_splits_by_file_and_skips_tests(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"module_{index}.py").write_bytes(bytes([65 + index]) * (HELD_OUT_BYTES // 2))
    for skipped in ("test", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "module.py").write_bytes(b"z" * HELD_OUT_BYTES)
    corpus = read_corpus(tmp_path)
    held_out, train = set(corpus.held_out.tolist()), set(corpus.train.tolist())
    assert len(held_out) == 2
    assert held_out | train == set(range(65, 73))
    assert not held_out & train


def test_corpus_without_source_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=str(tmp_path)):
        read_corpus(tmp_path)


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_batch_slices_make_up_the_global_batch(corpus: Corpus, world_size: int) -> None:
    whole = slice_of(corpus, step=7, rank=0, world_size=1)
    slices = [slice_of(corpus, step=7, rank=rank, world_size=world_size) for rank in range(world_size)]
    for part, together in enumerate(whole):
        assert together.shape == (16, 20)
        assert torch.equal(torch.cat([pair[part] for pair in slices]), together)


def test_batch_depends_on_seed_and_step_alone(corpus: Corpus) -> None:
    inputs, targets = slice_of(corpus, step=7, rank=0, world_size=1)
    assert torch.equal(inputs, slice_of(corpus, step=7, rank=0, world_size=1)[0])
    assert not torch.equal(inputs, slice_of(corpus, step=8, rank=0, world_size=1)[0])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_held_out_batches_span_the_text() -> None:
    corpus = Corpus(train=torch.zeros(0, dtype=torch.uint8), held_out=torch.arange(100, dtype=torch.uint8))
    batches = list(held_out_batches(corpus, batch_size=3, context_numel=9, num_batches=2))
    assert [inputs.shape for inputs, _ in batches] == [(3, 9), (3, 9)]
    assert batches[0][0][0, 0] == 0
    assert batches[-1][1][-1, -1] == 99


def test_model_does_not_look_ahead() -> None:
    model = GPT(TINY, seed=1)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, 256)
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert (after[:, 8:] - before[:, 8:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_model_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = params_digest(GPT(TINY, seed=1))
    torch.manual_seed(1)
    assert params_digest(GPT(TINY, seed=1)) == first
    assert params_digest(GPT(TINY, seed=2)) != first


def test_params_digest_sees_one_bit() -> None:
    model = GPT(TINY)
    before = params_digest(model)
    with torch.no_grad():
        weight = model.norm.bias.view(torch.int32)
        weight[0] ^= 1
    assert params_digest(model) != before


def test_generate_repeats_for_a_seed_and_outgrows_the_context() -> None:
    model = GPT(TINY)
    written = generate(model, b"def ", num_bytes=30, seed=5)
    assert written == generate(model, b"def ", num_bytes=30, seed=5)
    assert written != generate(model, b"def ", num_bytes=30, seed=6)
    assert written.startswith(b"def ")
    assert len(written) == 34


def test_cosine_schedule_goes_from_one_to_zero() -> None:
    settings = DemoSettings(steps=10)
    factors = [settings.lr_factor(step) for step in range(11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == 0.0
    assert factors == sorted(factors, reverse=True)


def test_worker_settings_cross_a_command_line() -> None:
    settings = WorkerSettings(demo=DemoSettings(resume="s3://b/c", steps=9), rank=1, rendezvous="/r", checkpoint="/c")
    assert WorkerSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("event", [*tiny_run(), events.Failed("no\nway")], ids=lambda event: event.tag)
def test_event_crosses_the_pipe(event: events.Event) -> None:
    line = events.encode(event)
    assert "\n" not in line
    assert json.loads(line)["event"] == event.tag
    assert events.decode(line) == event


@pytest.mark.parametrize("line", ["[]", '{"event": "other"}', "not JSON"])
def test_decode_refuses_what_is_no_event(line: str) -> None:
    with pytest.raises(ValueError, match=r"not an event|Expecting value"):
        events.decode(line)


def test_record_keeps_the_events_and_sums_them_up(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        record = Record(stream)
        for event in tiny_run():
            record.add(event)
    assert [events.decode(line) for line in path.read_text(encoding="utf-8").splitlines()] == tiny_run()
    summary = record.summary(DemoSettings(steps=8), picture=tmp_path / "loss.png")
    assert (summary["held_out_loss_before"], summary["held_out_loss_after"]) == (5.5, 0.7)
    assert summary["checkpoint"] == "/a/checkpoint-4"
    assert summary["step_ms_median"] == pytest.approx(45.0)
    json.dumps(summary)


@pytest.mark.parametrize("rule", ["prodigy", "adamw"])
def test_picture_is_a_png(tmp_path: Path, rule: str) -> None:
    steps = [event for event in tiny_run() if isinstance(event, events.Step)]
    if rule == "adamw":
        steps = [events.Step(step=s.step, loss=s.loss, d=None, lr=s.lr, step_s=s.step_s) for s in steps]
    held_out = [event for event in tiny_run() if isinstance(event, events.HeldOut)]
    draw(tmp_path / "loss.png", title=rule, steps=steps, held_out=held_out)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_smoothed_keeps_a_straight_line() -> None:
    line = [0.5 * index for index in range(200)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([3.0]) == [3.0]


def test_last_line_skips_blank_ones(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    log.write_bytes(b"Traceback:\nValueError: no \xff\n\n")
    assert last_line(log) == "ValueError: no \ufffd"
    log.write_bytes(b"")
    assert last_line(log) == "it said nothing"


@pytest.mark.parametrize(
    ("arguments", "named", "advice"),
    [
        (["--rule", "sgd"], "--rule", "prodigy, adamw, lamb"),
        (["--steps", "1"], "--steps", "--steps 100"),
        (["--shards", "0"], "--shards", "--shards 2"),
        (["--workers", "3"], "--workers", "1, 2, 4, 8, 16"),
        (["--workers", "0"], "--workers", "1, 2, 4, 8, 16"),
        (["--resume", "no/such/checkpoint"], "--resume", "checkpoint-STEP"),
    ],
)
def test_command_refuses_a_bad_option_in_one_line(arguments: list[str], named: str, advice: str) -> None:
    app = typer.Typer()
    app.command()(demo)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {named}")
    assert advice in result.stderr


def test_command_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    app = typer.Typer()
    app.command()(demo)
    result = CliRunner().invoke(app, ["--out", str(blocked / "out"), "--json"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "--out" in result.stderr


def test_command_help_has_an_example() -> None:
    app = typer.Typer()
    app.command()(demo)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "Example: stepwell demo" in result.stdout
