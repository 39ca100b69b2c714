"""The chat page: what it is sent with, and what people do with it in a browser."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")
pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")

from bitnet_jax.serving.server import Server
from tests.bitnet_jax.serving.browser import browser
from tests.bitnet_jax.serving.tiny_servers import ask, started, until

SYSTEM = "Be brief."
PAUSE = 0.1  # seconds before a token of `slow`


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = started()
    yield running
    running.stop()


@pytest.fixture
def slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.serving.engine is not None
    (pool,) = server.serving.engine._pools
    decode = pool.decode

    def waiting(*arguments: Any) -> Any:
        time.sleep(PAUSE)
        return decode(*arguments)

    monkeypatch.setattr(pool, "decode", waiting)


def test_the_page_is_open_the_api_is_not_and_other_sites_get_neither(server: Server) -> None:
    status, page, headers = ask(server, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert ask(server, "/", Host="evil.example:80")[0] == 403
    locked = started(api_key="a secret")
    try:
        assert ask(locked, "/")[1] == page
        assert ask(locked, "/v1/models")[0] == 401
    finally:
        locked.stop()


def test_the_page_asks_nothing_of_other_servers_and_makes_no_html() -> None:
    source = (Path(__file__).parents[3] / "bitnet_jax" / "serving" / "chat.html").read_text()
    addresses = set(re.findall(r"https?://[^'\" ]+", source))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", source)


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    with browser() as driver:
        driver.get(server.address)
        yield Page(driver)


class Page:
    """What a person sees and does."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def __getitem__(self, name: str) -> Any:
        """The element with an id."""
        return self.driver.find_element("id", name)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.driver.switch_to.active_element.send_keys(text)

    def texts(self, kind: str) -> list[str]:
        """Of the messages of the user or of the assistant, with their white space."""
        script = "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)"
        return self.driver.execute_script(script, f"article.{kind} .text")

    def idle(self) -> bool:
        return until(lambda: self["send"].is_displayed())

    def titles(self) -> list[str]:
        return [each.text for each in self.driver.find_elements("css selector", "#list button")]

    def set(self, **values: str) -> None:
        """Changes the settings."""
        self["open-settings"].click()
        for name, value in values.items():
            field = self.driver.find_element("name", name)
            field.clear()
            field.send_keys(value)
        self.driver.find_element("css selector", "#settings button[value=save]").click()
        assert not self["settings"].is_displayed()


def answer_to(server: Server, *texts: str, **fields: Any) -> str:
    """That of the API to messages of system, user, assistant, user, ..."""
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    body = {"model": "tiny", "messages": messages, "temperature": 0, **fields}
    status, answer, _ = ask(server, "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


@pytest.mark.extended
def test_an_answer_is_shown_while_it_is_generated(server: Server, page: Page, slow: None) -> None:
    """By the keyboard alone: the message field has the focus, Enter sends, Shift+Enter does not."""
    from selenium.webdriver import ActionChains, Keys

    page.set(system=SYSTEM, temperature="0", max_tokens="20")
    page["message"].click()
    page.type("<b>Hi</b>")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.type("there" + Keys.ENTER)
    seen = []
    while not page["send"].is_displayed():
        seen += page.texts("assistant")
    (whole,) = page.texts("assistant")
    message = "<b>Hi</b>\nthere"
    assert page.texts("user") == [message]
    assert not page.driver.find_elements("css selector", "article b")
    assert whole == answer_to(server, SYSTEM, message, max_tokens=20)
    assert all(whole.startswith(part) for part in seen)
    assert len(set(seen)) > 3
    assert "ended at the limit of tokens" in page.driver.find_element("css selector", ".facts").text
    assert page["status"].get_property("textContent") == f"Answer: {whole}"  # for screen readers
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.extended
def test_escape_stops_an_answer_and_the_conversation_goes_on(server: Server, page: Page, slow: None) -> None:
    from selenium.webdriver import Keys

    engine = server.serving.engine
    assert engine is not None
    page.set(system=SYSTEM, temperature="0")
    page["message"].click()
    page.type("Go" + Keys.ENTER)
    assert until(lambda: len("".join(page.texts("assistant"))) > 2)
    cancelled = engine.counters.cancelled
    page.type(Keys.ESCAPE)
    assert page.idle()
    assert until(lambda: engine.counters.cancelled == cancelled + 1)
    (part,) = page.texts("assistant")
    assert part
    assert answer_to(server, SYSTEM, "Go").startswith(part)
    page.set(max_tokens="3")
    page["message"].click()
    page.type("On" + Keys.ENTER)
    assert page.idle()
    assert page.texts("assistant")[1] == answer_to(server, SYSTEM, "Go", part, "On", max_tokens=3)


@pytest.mark.extended
def test_settings_are_sent_and_kept(server: Server, page: Page) -> None:
    page.set(system="You rhyme.", temperature="1.5", max_tokens="12", seed="7")
    page["message"].send_keys("Hi")
    page["send"].click()
    assert page.idle()
    expected = answer_to(server, "You rhyme.", "Hi", temperature=1.5, max_tokens=12, seed=7)
    assert until(lambda: page.texts("assistant") == [expected])
    page.driver.refresh()
    page["open-settings"].click()
    kept = {
        name: page.driver.find_element("name", name).get_property("value")
        for name in ("system", "temperature", "max_tokens", "seed", "key")
    }
    assert kept == {"system": "You rhyme.", "temperature": "1.5", "max_tokens": "12", "seed": "7", "key": ""}


@pytest.mark.extended
def test_conversations_are_kept_renamed_and_deleted(page: Page) -> None:
    from selenium.webdriver import Keys

    page.set(max_tokens="4", temperature="0")
    for message in ("First", "Second"):
        page["message"].send_keys(message + Keys.ENTER)
        assert page.idle()
        assert len(page.texts("assistant")) == 1
        if message == "First":
            page["new"].click()
    assert page.titles() == ["Second", "First"]
    page["title"].clear()
    page["title"].send_keys("Renamed" + Keys.ENTER)
    before = page.texts("user"), page.texts("assistant")
    page.driver.refresh()
    assert until(lambda: page.titles() == ["Renamed", "First"])
    assert (page.texts("user"), page.texts("assistant")) == before
    page.driver.find_elements("css selector", "#list button")[1].click()
    assert page.texts("user") == ["First"]
    page["delete"].click()
    page.driver.switch_to.alert.accept()
    assert until(lambda: page.titles() == ["Renamed"])
    page.driver.refresh()
    assert until(lambda: page.titles() == ["Renamed"])


@pytest.mark.extended
def test_errors_are_shown_in_words_and_lose_nothing() -> None:
    pytest.importorskip("selenium", reason="package selenium is not installed; pip install selenium")
    from selenium.webdriver import Keys

    server = started(api_key="a secret")
    try:
        with browser() as driver:
            driver.get(server.address)
            page = Page(driver)
            assert until(lambda: "needs an API key" in page["error"].text)
            page["key"].click()
            page.type("a secret" + Keys.ENTER)
            assert until(lambda: not page["error"].is_displayed())
            page.set(max_tokens="4")

            long = "long " * 50
            page["message"].send_keys(long + Keys.ENTER)
            assert until(lambda: "positions, expected at most 160" in page["error"].text)
            page["edit"].click()
            assert page["message"].get_property("value") == long
            page["message"].clear()
            page["message"].send_keys("short" + Keys.ENTER)
            assert page.idle()
            assert len(page.texts("assistant")) == 1
            assert not page["error"].is_displayed()

            assert server.serving.engine is not None
            limit, server.serving.engine._queue_limit = server.serving.engine._queue_limit, 0
            kept = page.texts("assistant")
            driver.find_element("xpath", "//button[text()='Answer again']").click()
            assert until(lambda: "The server is busy." in page["error"].text)
            assert page.texts("assistant") == kept
            page["message"].send_keys("again" + Keys.ENTER)
            assert until(lambda: "The server is busy." in page["error"].text)
            assert "Try again in 2 s." in page["error"].text
            server.serving.engine._queue_limit = limit
            page["again"].click()
            assert page.idle()
            assert len(page.texts("assistant")) == 2

            server.stop()
            assert until(lambda: not server._engine_thread.is_alive())
            page["message"].send_keys("anyone?" + Keys.ENTER)
            assert until(lambda: "cannot be reached" in page["error"].text)
            assert page.texts("user") == ["short", "again", "anyone?"]
            stored = driver.execute_script("return Object.values(localStorage).join()")
            assert "anyone?" in stored
            assert "a secret" not in stored
    finally:
        server.stop()


@pytest.mark.extended
def test_the_policy_is_enforced(server: Server, page: Page) -> None:
    """In the page itself, as a mistake in it or a hostile answer would."""
    other = started()
    try:
        run = page.driver.execute_async_script
        reached = "fetch(arguments[0]).then(() => 'reached', error => error.name).then(arguments[1])"
        assert run(reached, f"{other.address}/health") == "TypeError"
        assert run(reached, f"{server.address}/health") == "reached"
        html = "try { document.body.innerHTML = '<b>x'; arguments[0]('html') } catch (e) { arguments[0](e.name) }"
        assert run(html) == "TypeError"
    finally:
        other.stop()


@pytest.mark.extended
@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_every_width_has_room(server: Server, width: str) -> None:
    """Nothing is wider than the window; on a phone the conversations are behind a button."""
    with browser(width) as driver:
        driver.get(server.address)
        page = Page(driver)
        assert until(lambda: "tiny" in page["log"].text)
        script = "return [document.documentElement.scrollWidth, window.innerWidth]"
        wide, window = driver.execute_script(script)
        assert wide <= window
        assert page["new"].is_displayed() == (width == "desktop")
        if width == "phone":
            page["menu"].click()
            assert page["menu"].get_attribute("aria-expanded") == "true"
            assert page["new"].is_displayed()
            page["new"].click()
            assert not page["new"].is_displayed()


@pytest.mark.extended
def test_every_control_has_a_name_for_screen_readers(page: Page) -> None:
    page["open-settings"].click()
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "spinbutton", "link", "dialog", "navigation", "log"}
    named = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert len(named) > 6
    assert [node for node in named if not node.get("name", {}).get("value")] == []
