"""Answers on the page: streamed, stopped, continued, asked again, edited, inspected, branched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.running import NAME, RunningServer

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.server.page.browsing import Tab


def test_an_answer_is_what_the_model_says(tab: Tab, server: RunningServer) -> None:
    tab.configure(system="Be short.", temperature=0, max_tokens=20)
    tab.ask("Hello")
    with server.http() as http:
        request = question(max_tokens=20)
        request["messages"].insert(0, {"role": "system", "content": "Be short."})
        reply = http.post("/v1/chat/completions", json=request).json()
    assert tab.contents() == ["Hello", reply["choices"][0]["message"]["content"]]
    expect(tab.page.locator(".figures")).to_contain_text("20 tokens")
    used = reply["usage"]["total_tokens"]
    expect(tab.page.locator("#gauge-text")).to_have_text(f"{used} of 512 tokens")
    expect(tab.page.locator(".assistant .notice")).to_contain_text("limit of tokens")


def test_the_servers_defaults_are_shown(tab: Tab) -> None:
    expect(tab.page.locator("#model")).to_contain_text(NAME)
    tab.page.click("#open-settings")
    assert tab.page.get_attribute("#sampling-temperature", "placeholder") == "0.6"
    assert tab.page.get_attribute("#sampling-top_p", "placeholder") == "0.9"


def test_stop_and_go_on(tab: Tab, server: RunningServer) -> None:
    tab.send("Hello")
    expect(tab.page.locator(".assistant .body")).not_to_be_empty()
    tab.page.click("#stop")
    tab.wait_until_done()
    expect(tab.page.locator(".assistant .notice")).to_have_text("Stopped.")
    before = tab.contents()[1]
    assert server.worker.llama.engine.metrics().running == 0
    tab.configure(max_tokens=5)
    tab.page.click("text=Go on")
    tab.wait_until_done()
    after = tab.contents()[1]
    assert after.startswith(before.rstrip("\N{REPLACEMENT CHARACTER}")) and len(after) > len(before)


def test_an_edit_waits_for_the_answer(tab: Tab) -> None:
    tab.send("One")
    expect(tab.page.locator(".assistant .body")).not_to_be_empty()
    tab.page.hover(".user")
    tab.page.click("[aria-label='Edit and send again']")
    tab.page.fill(".user textarea", "Two")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#toast")).to_have_text("Stop the answer first.")
    expect(tab.page.locator(".user textarea")).to_have_value("Two")
    tab.page.click("#stop")


def test_another_answer_and_an_edited_question_are_branches(tab: Tab) -> None:
    tab.configure(max_tokens=4, temperature=2)
    tab.ask("One")
    tab.page.click("[aria-label='Another answer']")
    tab.wait_until_done()
    expect(tab.page.locator(".assistant .count")).to_have_text("2 / 2")
    tab.page.hover(".user")
    tab.page.click("[aria-label='Edit and send again']")
    tab.page.fill(".user textarea", "Two")
    tab.page.keyboard.press("Enter")
    tab.wait_until_done()
    expect(tab.page.locator(".user .body")).to_have_text("Two")
    expect(tab.page.locator(".user .count")).to_have_text("2 / 2")
    tab.page.click(".user [aria-label='Previous version']")
    expect(tab.page.locator(".user .body")).to_have_text("One")
    expect(tab.page.locator(".assistant .count")).to_have_text("2 / 2")
    assert [text for text in tab.contents() if text in ("One", "Two")] == ["One", "Two"]


def test_every_token_shows_what_the_model_considered(tab: Tab, server: RunningServer) -> None:
    tab.configure(temperature=0, max_tokens=6)
    tab.ask("Hello")
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=question()).json()
    entries = reply["choices"][0]["logprobs"]["content"]
    tab.page.click(".foot >> text=Inspect tokens")
    expect(tab.page.locator(".token")).to_have_count(6)
    for index in (0, 5):
        tab.page.click(f".token[data-index='{index}']")
        expect(tab.page.locator("#considered .row")).to_have_count(10)
        shares = tab.page.locator("#considered .share").all_inner_texts()
        assert shares == [percent(top["logprob"]) for top in entries[index]["top_logprobs"]]
        expect(tab.page.locator("#considered .chosen")).to_have_count(1)
        tab.page.keyboard.press("Escape")
        expect(tab.page.locator("#considered")).to_be_hidden()


def test_branch_here_continues_from_an_alternative(tab: Tab, server: RunningServer) -> None:
    tab.configure(temperature=0, max_tokens=6)
    tab.ask("Hello")
    tab.page.click(".foot >> text=Inspect tokens")
    tab.page.click(".token[data-index='3']")
    tab.page.click("button.row >> nth=1")
    tab.wait_until_done()
    with server.http() as http:
        first = http.post("/v1/chat/completions", json=question()).json()["choices"][0]
        entries = first["logprobs"]["content"]
        ids = [entry["id"] for entry in entries[:3]]
        others = [top["id"] for top in entries[3]["top_logprobs"] if top["id"] != entries[3]["id"]]
        request = question(continue_ids=[*ids, others[1]])
        second = http.post("/v1/chat/completions", json=request).json()["choices"][0]
    expected = [*ids, others[1], *(entry["id"] for entry in second["logprobs"]["content"])]
    messages = tab.exported()["conversations"][0]["messages"]
    assert [token["id"] for token in messages[2]["tokens"]] == expected
    assert messages[2]["content"].endswith(second["message"]["content"])
    expect(tab.page.locator(".assistant .count")).to_have_text("2 / 2")
    expect(tab.page.locator(".token.forked")).to_have_attribute("data-index", "3")
    tab.page.click("[aria-label='Previous version']")
    expect(tab.page.locator(".assistant .count")).to_have_text("1 / 2")
    tab.page.reload()
    expect(tab.page.locator(".assistant .count")).to_have_text("1 / 2")


def test_characters_of_several_tokens_are_joined(tab: Tab) -> None:
    face = "\N{GRINNING FACE}".encode()
    tab.reply_with([b"a ", face[:3], face[3:], b"!"])
    tab.ask("Hello")
    expect(tab.page.locator(".assistant .body")).to_have_text("a \N{GRINNING FACE}!")
    tab.page.click(".foot >> text=Inspect tokens")
    expect(tab.page.locator(".token >> nth=1")).to_have_text("\u27e8F0 9F 98\u27e9")
    expect(tab.page.locator(".token >> nth=2")).to_have_text("\u27e880\u27e9\N{GRINNING FACE}")


def test_colour_by_surprise_is_a_switch(tab: Tab) -> None:
    tab.reply_with([b"yes"])
    tab.ask("Hello")
    tab.page.click(".foot >> text=Inspect tokens")
    token = tab.page.locator(".token")
    expect(token).to_have_class("token s1")  # 75 %: the second step of the legend
    expect(token).not_to_have_css("background-color", "rgba(0, 0, 0, 0)")
    expect(tab.page.locator(".legend li")).to_have_count(5)
    tab.page.click("text=Colour by surprise")
    expect(token).to_have_css("background-color", "rgba(0, 0, 0, 0)")


def test_an_alternative_that_ends_the_answer(tab: Tab, server: RunningServer) -> None:
    with server.http() as http:
        stop = http.get("/v1/models").json()["data"][0]["stop_tokens"][0]
    bodies = tab.reply_with([b"yes", b" no"], other=stop)
    tab.ask("Hello")
    tab.page.click(".foot >> text=Inspect tokens")
    tab.page.click(".token[data-index='1']")
    tab.page.click("text=end of the answer")
    tab.wait_until_done()
    assert tab.contents() == ["Hello", "yes no", "yes"]
    assert len(bodies) == 1  # nothing is left to ask


def question(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    options = {"temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 10}
    return {"model": NAME, "messages": messages, **options, **more}


def percent(logprob: float) -> str:
    from math import exp

    value = 100 * exp(logprob)
    if value < 0.01:
        return "< 0.01 %"
    return f"{value:.1f} %" if value >= 10 else f"{value:.2f} %"


def test_markdown_is_drawn_and_code_is_highlighted(tab: Tab) -> None:
    text = (
        "# Title\n\n**bold** and `code`\n\n```python\ndef f():\n    return 1\n```\n\n"
        "| a | b |\n|--|--:|\n| 1 | 2 |\n"
    )
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.reply_with([text[i : i + 3].encode() for i in range(0, len(text), 3)])
    tab.ask("Hello")
    body = tab.page.locator(".assistant .body")
    expect(body.locator("h1")).to_have_text("Title")
    expect(body.locator("strong")).to_have_text("bold")
    expect(body.locator(".hljs-keyword")).to_have_text(["def", "return"])
    expect(body.locator("td").nth(1)).to_have_css("text-align", "right")
    tab.page.click("[aria-label='Copy code']")
    assert tab.page.evaluate("navigator.clipboard.readText()") == "def f():\n    return 1\n"
    tab.page.click(".assistant [aria-label='Copy']")
    assert tab.page.evaluate("navigator.clipboard.readText()") == text


def test_a_base_model_continues_the_text(
    open_tab: Callable[..., Tab], start_server: Callable[..., RunningServer], tiny_llama: Any
) -> None:
    formatter, tiny_llama.formatter = tiny_llama.formatter, None
    try:
        running = start_server().wait_until_ready()
        tab = open_tab(running.url)
        expect(tab.page.locator("#model")).to_contain_text("base model")
        tab.configure(temperature=0, max_tokens=5)
        tab.ask("Once upon")
        with running.http() as http:
            request = {"model": NAME, "prompt": "Once upon", "temperature": 0, "max_tokens": 5}
            reply = http.post("/v1/completions", json=request).json()
        assert tab.contents() == ["Once upon", reply["choices"][0]["text"]]
        tab.page.click(".foot >> text=Inspect tokens")
        tab.page.click(".token[data-index='1']")
        tab.page.click("button.row >> nth=0")
        tab.wait_until_done()
        messages = tab.exported()["conversations"][0]["messages"]
        assert len(messages[2]["tokens"]) == 2 + 5
    finally:
        tiny_llama.formatter = formatter
