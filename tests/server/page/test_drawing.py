"""How a growing answer is drawn: as the whole text is, and without parsing it again and again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, expect

from tests.server.page.browsing import Tab

TEXTS = [
    "One\ntwo\n\nthree\n===\n\nfour\n---\n",
    "abc\n#hashtag\n# heading\ntext\n",
    "- a\n- b\n\n  more of b\n\n- c\n\ntext\n\n1. x\n   - y\n   - z\n\n2. w\n",
    "```python\nx = '''\n```\ny\n````\nnot closed\n``` \n````\n~~~\n```\n~~~\nend\n",
    "| a | b |\n|:-:|--|\n| 1 | 2 |\n| 3 |\n\nafter\n\n> quote\nlazy\n\n> second\n",
    "See [x] and [y](https://e.org).\r\n\r\n[x]: https://e.org 'title'\r\n\r\nAgain [x].\r\n",
    "    indented\n    code\n\ntext <b>raw</b> & entity &amp; \\*escaped\\*\n\n***\n",
    "<div>\nblock\n\nstill?\n</div>\n\n<br>\n\nend **never closed",
]
GROWN = """async (text) => {
  const { Markdown } = await import("/page/markdown.js");
  const draw = (ends) => {
    const target = document.createElement("div");
    const markdown = new Markdown(target);
    for (const end of ends) markdown.show(text.slice(0, end));
    while (!markdown.show(text, true));
    return target.innerHTML.replaceAll("\\n<", "<");
  };
  const at = [...Array(text.length).keys()];
  return [draw([]), draw(at), draw(at.filter((end) => end % 7 === 0))];
}"""
WHOLE = """async (text) => {
  const { marked } = await import("/page/vendor/marked.js");
  const target = document.createElement("div");
  target.innerHTML = marked.parse(text);
  return [...target.children].map((node) => node.tagName);
}"""


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_a_growing_text_is_drawn_as_the_whole(tab: Tab, index: int) -> None:
    text = TEXTS[index]
    once, *grown = tab.page.evaluate(GROWN, text)
    assert grown == [once, once]
    if "[x]" not in text and "<div>" not in text:  # blocks as marked finds them in the whole text
        blocks = tab.page.evaluate(
            """([html]) => {
              const target = document.createElement("div");
              target.innerHTML = html;
              const names = { code: "PRE", wide: "TABLE" };
              return [...target.children].map((node) => names[node.className] ?? node.tagName);
            }""",
            [once],
        )
        assert blocks == tab.page.evaluate(WHOLE, text)


LONG = """async (text) => {
  const { Markdown } = await import("/page/markdown.js");
  const markdown = new Markdown(document.createElement("div"));
  let longest = 0;
  for (let end = 0; end < text.length; end += 4) {
    const before = markdown.parsed;
    markdown.show(text.slice(0, end));
    longest = Math.max(longest, markdown.parsed - before);
  }
  while (!markdown.show(text, true));
  return [longest, markdown.target.children.length];
}"""


def test_only_the_open_block_is_parsed_again(tab: Tab) -> None:
    block = "A paragraph of **some** words.\n\n```python\nx = 1\n```\n\n- item\n- item\n\n"
    longest, blocks = tab.page.evaluate(LONG, block * 200)
    assert blocks == 600
    assert longest <= 2 * len(block)


def test_an_answer_of_4000_tokens(
    tab: Tab, browser: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints the longest task, in CPU time of the page's main thread: other load does not count."""
    words = "A paragraph of **some** words.\n\n```python\nx = [1, 2]  # note\n```\n\n- item\n\n"
    pieces = [words[i : i + 4].encode() for i in range(0, len(words), 4)]
    tokens = (pieces * (4000 // len(pieces) + 1))[:4000]
    tab.reply_with(tokens)
    longest: dict[str, float] = {}
    with traced(tab, browser, longest, "answer"):
        tab.ask("Hello")
        expect(tab.page.locator(".figures")).to_contain_text("4000 tokens")
    assert tab.contents()[1] == b"".join(tokens).decode()
    blocks = tab.page.locator(".assistant .body > *").count()
    with traced(tab, browser, longest, "reload"):
        tab.page.reload()
        expect(tab.page.locator(".assistant .body > *")).to_have_count(blocks)
    with traced(tab, browser, longest, "tokens"):
        tab.page.click(".foot >> text=Inspect tokens")
        expect(tab.page.locator(".token")).to_have_count(4000)
    with capsys.disabled():
        print(f"\nlongest tasks with 4,000 tokens, ms: {longest}")


@contextmanager
def traced(tab: Tab, browser: Browser, longest: dict[str, float], name: str) -> Iterator[None]:
    """Note the longest task of the page's main thread in a block, in ms of CPU time."""
    browser.start_tracing(page=tab.page, categories=["toplevel"])
    yield
    events = json.loads(browser.stop_tracing())["traceEvents"]
    main = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks = [event.get("tdur", 0) for event in events if (event["pid"], event["tid"]) in main]
    longest[name] = max(tasks) / 1000
