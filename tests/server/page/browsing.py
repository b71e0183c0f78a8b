"""Chromium on the chat page: what every test watches, and the steps that tests share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Dialog, Route, expect

REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error("policy", event.violatedDirective, event.blockedURI, event.sample));
"""


class Tab:
    """The page in a browser profile of its own.

    Attributes:
        problems: errors, reports of the content security policy, dialogs of scripts, and requests
            to another origin.
    """

    def __init__(self, browser: Browser, url: str, **options: Any):
        self.url, self.problems = url, list[str]()
        self.context = browser.new_context(accept_downloads=True, **options)
        self.context.add_init_script(REPORT_VIOLATIONS)
        self.page = self.context.new_page()
        self.page.set_default_timeout(8_000)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("console", lambda message: self._console(message.type, message.text))
        self.page.on("request", lambda request: self._request(request.url))
        self.page.goto(url)
        expect(self.page.locator("#draft")).to_be_enabled()  # its handlers are there

    def _dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(f"{kind}: {text}")

    def _request(self, url: str) -> None:
        if not url.startswith((self.url, "blob:", "data:")):
            self.problems.append(f"request: {url}")

    def forgive(self, text: str) -> None:
        """Take back the problems that have a text, such as a refused request's."""
        assert any(text in problem for problem in self.problems), self.problems
        self.problems = [problem for problem in self.problems if text not in problem]

    def send(self, text: str) -> None:
        self.page.fill("#draft", text)
        self.page.click("#send")

    def ask(self, text: str) -> None:
        """Send a message and wait for the end of its answer."""
        self.send(text)
        self.wait_until_done()

    def wait_until_done(self) -> None:
        expect(self.page.locator("#stop")).to_be_hidden(timeout=120_000)
        expect(self.page.locator(".message.streaming")).to_have_count(0)

    def configure(self, **values: object) -> None:
        """Set fields of the settings dialog: `system`, or names of sampling fields."""
        self.page.click("#open-settings")
        for name, value in values.items():
            field = "#system" if name == "system" else f"#sampling-{name}"
            self.page.fill(field, str(value))
        self.page.click("#settings >> text=Save")

    def exported(self) -> dict[str, Any]:
        """The file that "Export all" saves."""
        with self.page.expect_download() as download:
            self.page.click("#export-all")
        data: dict[str, Any] = json.loads(Path(download.value.path()).read_text("utf-8"))
        return data

    def contents(self) -> list[str]:
        """Texts of the messages of the first conversation, in the order of their making."""
        return [message["content"] for message in self.exported()["conversations"][0]["messages"]]

    def bring(self, data: object) -> None:
        """Import a file."""
        text = data if isinstance(data, str) else json.dumps(data)
        file = {"name": "a.json", "mimeType": "application/json", "buffer": text.encode()}
        self.page.set_input_files("#import-file", file)  # type: ignore[arg-type]

    def reply_with(self, tokens: Sequence[bytes], **changes: Any) -> list[dict[str, Any]]:
        """From now on the model says `tokens`. Returns the bodies of the requests to come."""
        bodies: list[dict[str, Any]] = []

        def answer(route: Route) -> None:
            bodies.append(json.loads(route.request.post_data or "null"))
            body = stream(tokens, **changes)
            route.fulfill(status=200, content_type="text/event-stream; charset=utf-8", body=body)

        self.page.unroute("**/v1/chat/completions")
        self.page.route("**/v1/chat/completions", answer)
        return bodies


def stream(tokens: Sequence[bytes], ended: bool = True, other: int = 100_000) -> str:
    """Server-sent events of an answer, with two alternatives for each token."""
    events: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}]
    for i, token in enumerate(tokens):
        top = [entry(token, i, 0.75), entry(b" other", other, 0.25)]
        logprobs = {"content": [{**top[0], "top_logprobs": top}]}
        delta = {"content": token.decode("utf-8", "ignore")}
        events.append({"choices": [{"index": 0, "delta": delta, "logprobs": logprobs}]})
    if ended:
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 7, "completion_tokens": len(tokens)}
        events.append({"choices": [], "usage": usage})
    lines = [json.dumps(event) for event in events] + ["[DONE]"] * ended
    return "".join(f"data: {line}\n\n" for line in lines)


def entry(token: bytes, id: int, probability: float) -> dict[str, Any]:
    """A token as in `logprobs.content`."""
    text = token.decode("utf-8", "replace")
    return {"token": text, "bytes": list(token), "id": id, "logprob": math.log(probability)}
