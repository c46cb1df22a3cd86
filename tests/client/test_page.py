"""The web page of a run's history: what is served, and what a browser makes of it."""

from __future__ import annotations

import csv
import http.client
import io
import json
import math
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stepwell
from stepwell.client.watching.page import PageServer
from stepwell.sharding.errors import ShardLostError
from tests.client.training import loss_of, make_net

LIMIT_S = 30.0
NUM_STEPS = 40


class Watched:
    """A small run in this process, whose service can be made to fail."""

    name = "watched"

    def __init__(self) -> None:
        self.net = make_net()
        self.optimizer = stepwell.Prodigy(self.net.parameters(), max_grad_norm=math.inf)
        self.error: ShardLostError | None = None

    def train(self, num_steps: int) -> None:
        for step in range(num_steps):
            self.optimizer.zero_grad()
            loss = loss_of(self.net, step)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.report(loss=loss)
            self.optimizer.step()

    def status(self) -> dict[str, Any]:
        return self.optimizer.service.status()

    def history(self, last: int | None = None) -> dict[str, list[float]]:
        if self.error is not None:
            raise self.error
        return self.optimizer.service.history(last)


@pytest.fixture
def watched() -> Watched:
    watched = Watched()
    watched.train(NUM_STEPS)
    return watched


@pytest.fixture
def server(watched: Watched) -> Iterator[PageServer]:
    with PageServer(watched) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(LIMIT_S)


def get(server: PageServer, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=LIMIT_S)
    try:
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read().decode()
    finally:
        connection.close()


def test_history_is_served_as_json_and_as_a_table(server: PageServer, watched: Watched) -> None:
    code, kind, body = get(server, "/history.json")
    assert (code, kind) == (200, "application/json; charset=utf-8")
    told, columns = json.loads(body), watched.history()
    assert (told["name"], told["status"]["step"], told["status"]["rule"]) == ("inprocess", NUM_STEPS, "Prodigy")
    panels = {panel["title"]: panel for panel in told["panels"]}
    (loss,) = panels["loss"]["series"]
    assert (loss["steps"], loss["values"]) == (columns["step"], columns["loss"])
    assert len(loss["line"]) == len(loss["values"])
    assert panels["d, the estimated distance"]["is_log"]
    code, kind, body = get(server, "/history.csv")
    rows = list(csv.DictReader(io.StringIO(body)))
    assert [float(row["d"]) for row in rows] == columns["d"]


def test_infinite_and_unknown_numbers_do_not_reach_the_page(server: PageServer, watched: Watched) -> None:
    gradient = watched.net[0].weight.grad
    assert isinstance(gradient, torch.Tensor)
    gradient.fill_(math.nan)
    watched.optimizer.step()
    told = json.loads(get(server, "/history.json")[2])
    (norm,) = next(panel for panel in told["panels"] if panel["title"] == "gradient norm")["series"]
    assert norm["steps"][-1] == NUM_STEPS


def test_run_without_a_step_has_no_panels() -> None:
    watched = Watched()
    with PageServer(watched) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert json.loads(get(server, "/history.json")[2])["panels"] == []
        server.shutdown()


def test_service_that_does_not_answer_is_told(server: PageServer, watched: Watched) -> None:
    watched.error = ShardLostError("shard 0 was lost, and is being brought back")
    code, _, body = get(server, "/history.json")
    assert (code, json.loads(body)) == (503, {"error": "shard 0 was lost, and is being brought back"})
    watched.error = None
    assert get(server, "/history.json")[0] == 200


def test_page_is_one_file_and_for_this_machine_alone(server: PageServer) -> None:
    code, kind, body = get(server, "/")
    assert (code, kind) == (200, "text/html; charset=utf-8")
    assert "http://" not in body.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in body
    assert get(server, "/../page.py")[0] == get(server, "/page.html")[0] == 404
    assert get(server, "/history.json", Host="elsewhere.example:80")[0] == 403
    assert get(server, "/history.json", Host=f"localhost:{server.server_address[1]}")[0] == 200


# In a browser


@pytest.fixture
def page(server: PageServer) -> Iterator[Any]:
    """The page in a headless Chromium; a message on its console fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(1e3 * LIMIT_S)
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("section")
        yield page
        browser.close()
    assert [message for message in messages if "503" not in message] == []


def test_browser_draws_hides_and_tells_values(page: Any, watched: Watched) -> None:
    titles = page.locator("h2").all_inner_texts()
    assert titles[:2] == ["loss", "d, the estimated distance"]
    assert titles[-1] == "seconds of a step, by phase"
    assert page.title() == f"inprocess, step {NUM_STEPS}"
    loss = page.locator("section", has_text="loss").first
    assert loss.locator("path.line").get_attribute("d").count("L") == NUM_STEPS - 1

    seconds = page.locator("section").last
    before = seconds.locator("path.line").count()
    seconds.get_by_role("button", name="vote_s").click()
    assert seconds.locator("path.line").count() == before - 1
    for name in ("gather_s", "log_s", "reduce_s", "apply_s"):
        seconds.get_by_role("button", name=name).click()
    assert seconds.locator("path").count() == 0
    seconds.get_by_role("button", name="apply_s").click()
    assert seconds.locator("path.line").get_attribute("data-name") == "apply_s"
    assert seconds.get_by_role("button", name="vote_s").get_attribute("aria-pressed") == "false"

    box = loss.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 10, box["y"] + box["height"] / 2)
    assert loss.locator(".step").inner_text() == f"step {NUM_STEPS}"
    page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2)
    first = watched.history()["loss"][0]
    assert float(loss.locator(".legend button").inner_text().split()[1]) == pytest.approx(first, rel=1e-3)
    assert page.locator(".cursor").count() == len(titles), "one in each panel"


def test_browser_follows_the_run_and_shows_that_the_service_is_gone(page: Any, watched: Watched) -> None:
    watched.train(1)
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(page).to_have_title(f"inprocess, step {NUM_STEPS + 1}", timeout=1e3 * LIMIT_S)
    watched.error = ShardLostError("shard 0 was lost")
    expect(page.locator("#error")).to_have_text("shard 0 was lost", timeout=1e3 * LIMIT_S)
    assert page.locator("section").count() > 0, "what was drawn stays"
    watched.error = None
    expect(page.locator("#error")).to_have_text("", timeout=1e3 * LIMIT_S)
