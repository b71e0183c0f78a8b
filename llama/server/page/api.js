// The server's HTTP interface: models, streamed answers, errors. Knows nothing of the page.

const KEY = "llama3.key"; // in sessionStorage: forgotten when the tab closes

/** The server refused a request. */
export class Refused extends Error {
  constructor(status, message, { code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** The server does not answer, or stopped in the middle of an answer. */
export class ConnectionLost extends Error {}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

/** Send a request; raises Refused or ConnectionLost. */
export async function request(path, { body = null, signal = null } = {}) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${encodeHeader(apiKey.get())}`;
  if (body !== null) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === null ? "GET" : "POST",
      headers,
      body: body === null ? null : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost("The server does not answer.");
  }
  if (response.ok) return response;
  throw await refusal(response);
}

// Headers hold Latin-1 only: the UTF-8 bytes of a key, one character each.
const encodeHeader = (text) => String.fromCharCode(...new TextEncoder().encode(text));

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not JSON: a proxy's page, for example. The status says enough.
  }
  const message =
    typeof error.message === "string" ? error.message : `The server answered ${response.status}.`;
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  const retryAfter = Number.isFinite(seconds) ? Math.min(Math.max(seconds, 0.5), 30) : null;
  return new Refused(response.status, message, { code: error.code, retryAfter });
}

/** Events of a stream, parsed. Ends at [DONE]; raises ConnectionLost if the stream ends before. */
export async function* events(response) {
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data:")) continue; // comments keep the connection open
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(500, String(event.error.message ?? "The server failed."));
    yield event;
  }
  throw new ConnectionLost("The connection broke before the answer was complete.");
}

async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {}); // the server sees that nobody reads any more
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost("The connection broke before the answer was complete.");
  }
}
