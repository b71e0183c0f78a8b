"""Conversations in the browser: reload, drafts, names, search, files, settings, themes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.running import RunningServer

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.server.page.browsing import Tab


@pytest.fixture
def two(tab: Tab) -> Tab:
    """A tab with the conversations "Apples" and, shown and later, "Pears"."""
    tab.reply_with([b"Fine", b"."])
    tab.ask("Apples")
    tab.page.click("#new")
    tab.ask("Pears")
    return tab


def titles(tab: Tab) -> list[str]:
    return tab.page.locator(".entry").all_inner_texts()


def menu(tab: Tab, title: str, action: str) -> None:
    tab.page.hover(f".entry >> text={title}")
    tab.page.click(f"[aria-label='Actions for {title}']")
    tab.page.click(f"#menu >> text={action}")


def test_a_reload_keeps_everything(two: Tab) -> None:
    two.configure(system="Be kind.", temperature=1.5)
    two.page.fill("#draft", "half a thought")
    before = two.exported()
    two.page.reload()
    expect(two.page.locator(".message .body")).to_have_text(["Pears", "Fine."])
    expect(two.page.locator("#draft")).to_have_value("half a thought")
    assert two.exported() == before
    assert before["conversations"][0]["system"] == "Be kind."
    assert before["conversations"][0]["sampling"] == {"temperature": 1.5}
    two.page.click(".entry >> text=Apples")
    expect(two.page.locator("#draft")).to_have_value("")


def test_rename(two: Tab) -> None:
    menu(two, "Apples", "Rename")
    expect(two.page.locator("#new-title")).to_have_value("Apples")
    two.page.fill("#new-title", "Fruit <b>")
    two.page.keyboard.press("Enter")
    expect(two.page.locator(".entry")).to_have_text(["Pears", "Fruit <b>"])
    two.page.reload()
    expect(two.page.locator(".entry")).to_have_text(["Pears", "Fruit <b>"])


def test_delete_asks_first(two: Tab) -> None:
    menu(two, "Pears", "Delete")
    two.page.click("text=Keep")
    expect(two.page.locator(".entry")).to_have_count(2)
    menu(two, "Pears", "Delete")
    two.page.click("#confirm-delete >> button:text-is('Delete')")
    expect(two.page.locator(".entry")).to_have_text(["Apples"])
    expect(two.page.locator(".user .body")).to_have_text("Apples")
    two.page.reload()
    expect(two.page.locator(".entry")).to_have_text(["Apples"])
    count = two.page.evaluate(COUNT_TOKENS)
    assert count == 1  # those of the other conversation are gone


COUNT_TOKENS = """() => new Promise((resolve) => {
  indexedDB.open("llama3").onsuccess = ({ target }) => {
    const store = target.result.transaction("tokens").objectStore("tokens");
    store.count().onsuccess = (event) => resolve(event.target.result);
  };
})"""


def test_an_answer_of_a_deleted_conversation_stays_deleted(tab: Tab) -> None:
    tab.send("Hello")
    expect(tab.page.locator(".assistant .body")).not_to_be_empty()
    menu(tab, "Hello", "Delete")
    tab.page.click("#confirm-delete >> button:text-is('Delete')")
    expect(tab.page.locator(".entry")).to_have_count(0)
    tab.page.wait_for_timeout(300)  # the answer's end is saved, where it may be
    tab.page.reload()
    expect(tab.page.locator("#draft")).to_be_enabled()
    expect(tab.page.locator(".entry")).to_have_count(0)
    assert tab.page.evaluate(COUNT_TOKENS) == 0


def test_two_tabs_show_the_same(two: Tab) -> None:
    other = two.context.new_page()
    other.goto(two.page.url)
    expect(other.locator(".user .body")).to_have_text("Pears")
    two.page.bring_to_front()
    two.ask("More pears")
    expect(other.locator(".user .body")).to_have_text(["Pears", "More pears"])
    menu(two, "Pears", "Delete")
    two.page.click("#confirm-delete >> button:text-is('Delete')")
    expect(other.locator(".entry")).to_have_text(["Apples"])
    expect(other.locator("#welcome")).to_be_visible()


def test_search_looks_into_messages(two: Tab) -> None:
    two.page.fill("#search", "pear")
    expect(two.page.locator(".entry")).to_have_text(["Pears"])
    two.page.fill("#search", "FINE")
    expect(two.page.locator(".entry")).to_have_count(2)
    two.page.fill("#search", "plum")
    expect(two.page.locator("#nothing-found")).to_be_visible()


def test_a_file_brings_everything_to_another_browser(
    two: Tab, open_tab: Callable[..., Tab], server: RunningServer
) -> None:
    sent = two.exported()
    other = open_tab(server.url)
    other.bring(sent)
    expect(other.page.locator("#toast")).to_have_text("2 conversations imported.")
    got = other.exported()

    assert told(got) == told(sent)


def told(data: dict[str, Any]) -> list[Any]:
    """Titles and messages of a file."""
    return sorted(
        [c["title"], [(m["role"], m["content"], m["tokens"]) for m in c["messages"]]]
        for c in data["conversations"]
    )


BROKEN = {
    "no JSON": "{",
    "another format": {"format": "other"},
    "no list": {"format": "llama3-conversations", "version": 1, "conversations": {}},
    "another version": {"format": "llama3-conversations", "version": 2, "conversations": []},
    "no messages": {"format": "llama3-conversations", "version": 1, "conversations": [{}]},
}
MESSAGES = {
    "a loop": [{"id": "a", "parent": "a", "role": "user", "content": ""}],
    "another role": [{"id": "a", "parent": "root", "role": "system", "content": ""}],
    "a list as text": [{"id": "a", "parent": "root", "role": "user", "content": [1]}],
    "one id twice": [{"id": "a", "parent": "root", "role": "user", "content": ""}] * 2,
    "a byte of 256": [{"id": "a", "parent": "root", "role": "assistant", "content": "",
                       "tokens": [{"bytes": [256], "logprob": -1}]}],
}  # fmt: skip


def test_broken_files_are_refused(two: Tab) -> None:
    files: dict[str, object] = dict(BROKEN)
    for name, messages in MESSAGES.items():
        files[name] = file_with({"messages": messages})
    before = two.exported()
    for name, file in files.items():
        two.page.evaluate("document.getElementById('toast').textContent = ''")
        two.bring(file)
        expect(two.page.locator("#toast"), name).to_contain_text("Nothing was imported.")
    assert two.exported() == before


def test_prototypes_of_imported_objects_stay(tab: Tab) -> None:
    text = (
        '{"format": "llama3-conversations", "version": 1, "conversations": [{"title": "x", '
        '"__proto__": {"polluted": 1}, "sampling": {"__proto__": {"polluted": 1}, "top_p": 7, '
        '"temperature": 0.5, "evil": 1}, "chosen": [["__proto__", "constructor"], 7], "messages": '
        '[{"id": "__proto__", "parent": "root", "role": "user", "content": "hello"}]}]}'
    )
    tab.bring(text)
    expect(tab.page.locator(".user .body")).to_have_text("hello")
    assert tab.page.evaluate("({}).polluted") is None
    assert tab.exported()["conversations"][0]["sampling"] == {"temperature": 0.5}


def file_with(conversation: dict[str, object]) -> dict[str, object]:
    return {"format": "llama3-conversations", "version": 1, "conversations": [conversation]}


def test_settings_for_new_conversations(tab: Tab) -> None:
    bodies = tab.reply_with([b"ok"])
    tab.page.click("#open-settings")
    tab.page.fill("#system", "Be kind.")
    tab.page.fill("#sampling-seed", "7")
    tab.page.check("#for-new")
    tab.page.click("#settings >> text=Save")
    tab.page.reload()
    tab.ask("Hello")
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert bodies[0]["seed"] == 7
    tab.page.click("#open-settings")
    tab.page.fill("#sampling-temperature", "9")
    tab.page.click("#settings >> text=Save")
    expect(tab.page.locator("#settings")).to_be_visible()  # the browser says what is wrong
    tab.page.click("#settings >> text=Server's defaults")
    tab.ask("Again")
    assert "seed" not in bodies[1]


def test_themes(open_tab: Callable[..., Tab], server: RunningServer) -> None:
    tab = open_tab(server.url, color_scheme="dark")
    body = tab.page.locator("body")
    expect(body).to_have_css("background-color", "rgb(25, 24, 22)")
    tab.page.click("#toggle-theme")
    expect(body).to_have_css("background-color", "rgb(252, 251, 248)")
    tab.page.reload()
    expect(body).to_have_css("background-color", "rgb(252, 251, 248)")
    tab.page.click("#toggle-theme")
    expect(body).to_have_css("background-color", "rgb(25, 24, 22)")
