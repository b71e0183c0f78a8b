"""guard.py, connections.py: who is answered, and within which limits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import httpx
import pytest

from llama.server import serve
from llama.server.settings import MAX_BODY, ServerSettings
from tests.server.raw import connect, post, read_all
from tests.server.running import RunningServer

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 1}


def refused(response: httpx.Response, status: int) -> None:
    """Check that a response is an error in OpenAI's form."""
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 4096 and response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST.", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7", 200),  # an address cannot be rebound
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:80.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1]evil.example", 403),
        ("", 403),
    ],
)
def test_foreign_host(server: RunningServer, host: str, status: int) -> None:
    with server.http() as http:
        for path in ("/health", "/", "/v1/models"):
            response = http.get(path, headers={"Host": host})
            assert response.status_code == status
            if status == 403:
                refused(response, 403)


def test_allowed_hosts(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(allowed_hosts=["llama.example.org"]).wait_until_ready()
    with server.http() as http:
        assert http.get("/health", headers={"Host": "llama.example.org"}).status_code == 200
        assert http.get("/health", headers={"Host": "example.org"}).status_code == 403


def test_no_cors_by_default(server: RunningServer) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    with server.http() as http:
        for response in (http.options(CHAT, headers=headers), http.get("/health", headers=headers)):
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_cors_for_exact_origins(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(cors_origin=["https://a.example"], api_key="key").wait_until_ready()
    ask = {"Access-Control-Request-Method": "POST"}
    with server.http() as http:
        asked = http.options(CHAT, headers={"Origin": "https://a.example"} | ask)
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in asked.headers["access-control-allow-headers"]
        # Errors must be readable too.
        response = http.get("/v1/models", headers={"Origin": "https://a.example"})
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        for origin in ("http://a.example", "https://a.example:444", "https://b.a.example", "null"):
            response = http.options(CHAT, headers={"Origin": origin} | ask)
            assert "access-control-allow-origin" not in response.headers
            assert response.headers["vary"] == "Origin"


def test_cors_for_the_official_client(start_server: Callable[..., RunningServer]) -> None:
    """In a browser openai's client sends headers of its own, which a preflight asks for."""
    server = start_server(cors_origin=["https://a.example"]).wait_until_ready()
    usual = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with server.http() as http:
        for names, allowed in ((usual, usual), ("a, b", "a, b"), ("a: b", None), (",", None)):
            asked = http.options(CHAT, headers=ask | {"Access-Control-Request-Headers": names})
            found = asked.headers["access-control-allow-headers"]
            assert found == (allowed or "authorization, content-type")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON;charset=UTF-8", 200),
        ("text/plain", 415),  # what a page may send without asking
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        (None, 415),
    ],
)
def test_content_type(server: RunningServer, kind: str | None, status: int) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    content = b'{"prompt": "a", "max_tokens": 1}'
    with server.http() as http:
        response = http.post(COMPLETE, content=content, headers=headers)
    assert response.status_code == status
    if status != 200:
        refused(response, status)


def test_api_key(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(api_key="s3cret").wait_until_ready()
    with server.http() as http:
        for path in ("/health", "/", "/openapi.json"):
            assert http.get(path).status_code == 200
        for value in (
            None,
            b"Bearer wrong",
            b"Bearer s3cret2",
            b"Bearer",
            b"Basic s3cret",
            b"s3cret",
            "Bearer s3crét".encode(),
            b"Bearer \xff\xfe",
        ):
            headers = {} if value is None else {b"Authorization": value}
            for path in ("/v1/models", "/metrics", "/nothing"):
                refused(http.get(path, headers=headers), 401)
            refused(http.post(CHAT, json={}, headers=headers), 401)
        for value in (b"Bearer s3cret", b"bearer  s3cret"):
            assert http.get("/v1/models", headers={b"Authorization": value}).status_code == 200
    assert server.openai("s3cret").models.list().data


def test_body_limit(server: RunningServer) -> None:
    big = b" " * (MAX_BODY + 1)
    headers = {"Content-Type": "application/json"}
    with server.http() as http:
        refused(http.post(CHAT, content=big, headers=headers), 413)
        # In chunks no header tells the length.
        parts = (b" " * 65_536 for _ in range(MAX_BODY // 65_536 + 1))
        refused(http.post(CHAT, content=parts, headers=headers), 413)
        assert http.get("/health").status_code == 200


def test_head_limit(server: RunningServer) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000)
        response = read_all(sock)
    assert response.startswith(b"HTTP/1.1 400 ") and b'"error"' in response


@pytest.mark.parametrize(
    "junk",
    [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"],
)
def test_what_is_not_http(server: RunningServer, junk: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(junk + b"\r\n\r\n")
        response = read_all(sock)
    assert response.startswith(b"HTTP/1.1 400 ") and b'"error"' in response


def test_two_lengths_of_one_body(server: RunningServer) -> None:
    """A proxy might see two requests where the server sees one."""
    with connect(server) as sock:
        sock.sendall(post("/tokenize", b"0\r\n\r\n", "Transfer-Encoding: chunked") * 2)
        response = read_all(sock)
    assert response.startswith(b"HTTP/1.1 400 ") and response.count(b"HTTP/1.1") == 1


def test_too_many_connections(
    start_server: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is refused at once; those that are open go on."""
    monkeypatch.setattr(serve, "MORE_CONNECTIONS", 2)
    server = start_server(max_queue=1).wait_until_ready()
    with server.http() as http:
        assert http.get("/health").status_code == 200
        with connect(server), connect(server), connect(server) as fourth:
            response = read_all(fourth)
            assert response.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 5" in response
            assert http.get("/health").status_code == 200


@pytest.mark.parametrize("where", ["head", "body", "second request"])
def test_slow_client_is_ended(start_server: Callable[..., RunningServer], where: str) -> None:
    """A byte at a time; another client is answered meanwhile."""
    server = start_server(receive_timeout=0.5).wait_until_ready()
    request = post(COMPLETE, BODY | {"prompt": "a" * 100})
    head = request.index(b"\r\n\r\n") + 4
    with connect(server) as sock, server.http() as http:
        if where == "second request":
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):  # head and body may come apart
                answer += sock.recv(65_536)
        sent = head if where == "body" else 1
        sock.sendall(request[:sent])
        done = threading.Event()

        def trickle() -> None:
            for i in range(sent, len(request)):
                if done.wait(0.05):
                    break
                try:
                    sock.sendall(request[i : i + 1])
                except OSError:
                    break

        thread = threading.Thread(target=trickle)
        thread.start()
        assert http.post(COMPLETE, json=BODY).status_code == 200
        response = read_all(sock)
        done.set()
        thread.join()
    assert response.startswith(b"HTTP/1.1 408 ") and b'"error"' in response


def test_a_long_answer_is_not_a_slow_request(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server(receive_timeout=0.2).wait_until_ready()
    with server.http() as http:
        whole = http.post(COMPLETE, json={"prompt": "a", "max_tokens": 40, "ignore_eos": True})
        assert whole.json()["usage"]["completion_tokens"] == 40
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"prompt":' + b"[" * 200 + b"]" * 200 + b"}", 400),
        (b'{"prompt": "\xff"}', 400),
        ('{"prompt": "a"}'.encode("utf-16"), 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "a", "prompt": "b", "max_tokens": 1}', 200),
        (b'{"prompt": "\\ud800 \\udfff", "max_tokens": 1}', 200),
        (b'{"prompt": "a\\u0000b", "max_tokens": 1}', 200),
        (b'"text"', 400),
    ],
)
def test_malformed_bodies(server: RunningServer, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    with server.http() as http:
        response = http.post(COMPLETE, content=body, headers=headers)
        assert response.status_code == status, response.text
        if status == 400:
            refused(response, 400)


def test_other_methods(server: RunningServer) -> None:
    with server.http() as http:
        head = http.head("/health")
        assert head.status_code == 200 and head.content == b""
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
            refused(http.request(method, "/v1/models"), 405)
        assert "GET" in http.post("/v1/models", json={}).json()["error"]["message"]
        refused(http.get("/v1/embeddings"), 404)
        refused(http.post(CHAT + "/", json=BODY), 404)  # behind TLS a redirect would leave it


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"max_queue": 0},
        {"request_timeout": 0.0},
        {"receive_timeout": float("nan")},
        {"grace": -1.0},
        {"model_name": ""},
        {"api_key": "schlüssel"},
        {"api_key": ""},
        {"cors_origin": ["*"]},
        {"cors_origin": ["https://a.example/"]},
        {"allowed_hosts": ["https://a.example"]},
        {"allowed_hosts": ["a.example:80"]},
    ],
)
def test_settings_name_what_is_wrong(wrong: dict[str, object]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"^{name} must"):
        ServerSettings(**wrong)  # type: ignore[arg-type]
