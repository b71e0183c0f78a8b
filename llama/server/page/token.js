// Tokens of an answer: bytes, probabilities, alternatives. Knows nothing of the page.
//
// A token is {id, logprob, bytes, top}; `top` lists the most probable tokens of its place, as
// {id, logprob, bytes}. One token may be a part of a character, so texts are made of joined bytes.

const encoder = new TextEncoder();

/** A token from an entry of the server's `logprobs.content`. */
export function fromEntry(entry) {
  return { ...candidate(entry), top: (entry.top_logprobs ?? []).map(candidate) };
}

const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/; // how completions write a part of a character

const completionBytes = (token) => {
  const escaped = BYTES.exec(token)?.[1];
  return escaped && escaped.match(/[0-9a-f]{2}/g).map((pair) => Number.parseInt(pair, 16));
};

const candidate = ({ id, logprob, bytes, token }) => ({
  id: Number.isInteger(id) ? id : null,
  logprob,
  bytes: bytes ?? [...encoder.encode(token)],
});

/** Tokens from one choice of /v1/completions, whose logprobs are lists by field. */
export function fromCompletion({
  tokens = [],
  token_logprobs: logprobs = [],
  top_logprobs: top = [],
}) {
  return tokens.map((token, i) => ({
    ...candidate({ token, bytes: completionBytes(token), logprob: logprobs[i] ?? 0 }),
    top: Object.entries(top?.[i] ?? {})
      .map(([text, logprob]) => candidate({ token: text, bytes: completionBytes(text), logprob }))
      .sort((one, other) => other.logprob - one.logprob),
  }));
}

export const joined = (tokens) => new Uint8Array(tokens.flatMap((token) => token.bytes));

/** The text of some tokens; a character that is not complete is left out at the end. */
export const textOf = (tokens) => new TextDecoder().decode(joined(tokens), { stream: true });

/** The text of one token, or null if its bytes are only a part of a character. */
export function ownText(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return null;
  }
}

export const hex = (bytes) =>
  bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");

/** A token in one line: white space and parts of characters are made visible. */
export function visible(bytes) {
  const text = ownText(bytes);
  if (text === null) return `⟨${hex(bytes)}⟩`;
  if (text === "") return "(nothing)";
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

/** A token as a screen reader should say it. */
export function spoken(bytes) {
  const text = ownText(bytes);
  if (text === null) return `bytes ${hex(bytes)}`;
  if (text.trim() !== "") return text;
  const names = { " ": "space", "\n": "line break", "\t": "tab" };
  return [...text].map((character) => names[character] ?? "blank").join(", ") || "nothing";
}

export const probability = (logprob) => Math.exp(Math.min(logprob, 0));

/** A probability in per cent, with as many digits as matter. */
export function percent(logprob) {
  const value = 100 * probability(logprob);
  if (value >= 99.95) return "100 %";
  if (value >= 10) return `${value.toFixed(1)} %`;
  if (value >= 0.01) return `${value.toFixed(2)} %`;
  return "< 0.01 %";
}

// Lower limits of a token's probability for each step of colour, 0 the least surprising.
export const STEPS = [0.9, 0.5, 0.2, 0.05, 0];
export const STEP_NAMES = ["90 % and more", "50 to 90 %", "20 to 50 %", "5 to 20 %", "below 5 %"];

/** How surprising a token was, from 0 to 4. */
export const surprise = (logprob) => STEPS.findIndex((limit) => probability(logprob) >= limit);
