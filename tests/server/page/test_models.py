"""The choice between a base and its adapters: kept with a conversation, and with each answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.server.running import NAME, RunningServer

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Page, Route, expect

from tests.server.page.browsing import Tab


def serve_models(page: Page, *names: str) -> None:
    """Have the page see these models from the next load on."""

    def answer(route: Route) -> None:
        [model] = route.fetch().json()["data"]
        models = [model | {"id": name} for name in names]
        route.fulfill(json={"object": "list", "data": models})

    page.unroute("**/v1/models")
    page.route("**/v1/models", answer)
    page.reload()
    expect(page.locator("#draft")).to_be_enabled()
    expect(page.locator("#server-notice")).to_be_hidden()


def test_one_model_is_no_choice(tab: Tab) -> None:
    expect(tab.page.locator("#model")).to_have_text(f"{NAME} · float32")
    expect(tab.page.locator("#choose-model")).to_be_hidden()


def test_models_are_chosen_and_kept(open_tab: Callable[..., Tab], server: RunningServer) -> None:
    tab = open_tab(server.url)
    serve_models(tab.page, NAME, "poet", "law")
    choice = tab.page.get_by_role("combobox", name="Model")
    expect(choice).to_have_value(NAME)
    bodies = tab.reply_with([b"Fine", b"."])
    tab.ask("Apples")
    choice.select_option("poet")
    tab.ask("Pears")
    choice.select_option("law")
    tab.page.click("[aria-label='Another answer'] >> nth=-1")
    tab.wait_until_done()
    assert [body["model"] for body in bodies] == [NAME, "poet", "law"]
    expect(tab.page.locator(".figures").last).to_contain_text("law")
    # An answer goes on with its own model, whatever is chosen now.
    tab.page.click(".foot >> text=Inspect tokens >> nth=0")
    tab.page.click(".token >> nth=0")
    tab.page.click("#considered >> text=other")
    tab.wait_until_done()
    assert (bodies[-1]["model"], bodies[-1]["continue_ids"]) == (NAME, [100_000])
    tab.page.reload()
    expect(choice).to_have_value("law")
    [stored] = tab.exported()["conversations"]
    assert stored["model"] == "law"
    answers = [m["model"] for m in stored["messages"] if m["role"] == "assistant"]
    assert answers == [NAME, "poet", "law", NAME]
    # The server has other adapters now: the base answers.
    serve_models(tab.page, NAME, "chef")
    expect(choice).to_have_value(NAME)
    bodies = tab.reply_with([b"Fine"])
    tab.ask("Plums")
    assert bodies[-1]["model"] == NAME
