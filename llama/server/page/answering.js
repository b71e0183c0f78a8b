// Fills one answer from the server's stream, and says how it ended. Knows nothing of the page.

import { ConnectionLost, Refused, events, request } from "./api.js";
import { nextFrame, pause, sentence } from "./dom.js";
import { saveConversation, saveTokens } from "./store.js";
import { fromCompletion, fromEntry, joined } from "./token.js";

const EVENTS_A_FRAME = 64; // read before the browser may draw: bounds the work of a frame
const SAVE_EVERY = 1000; // milliseconds
const ALTERNATIVES = 10;
const BASE_TOKENS = 256; // of a base model's answer: it rarely ends by itself

export class Answering {
  /**
   * @param server the Server
   * @param conversation the Conversation
   * @param message the answer to fill; what it has already is continued
   * @param changed called after each event
   */
  constructor({ server, conversation, message, changed }) {
    Object.assign(this, { server, conversation, message, changed });
    this.aborting = new AbortController();
    message.tokens ??= [];
    this.byTokens = message.tokens.length > 0;
    this.decoder = new TextDecoder();
    if (this.byTokens)
      message.content = this.decode(
        joined(this.complete ? message.tokens.slice(0, -1) : message.tokens),
      );
    this.saved = performance.now();
    this.generated = 0;
  }

  stop() {
    this.aborting.abort();
  }

  /** Whether the answer ends with its last token: nothing is left to ask. */
  get complete() {
    return this.server.isStop(this.message.tokens.at(-1)?.id ?? null);
  }

  /** Stream the answer to its end. Never raises: the message says what happened. */
  async run() {
    const { message } = this;
    Object.assign(message, { status: "streaming", note: "" });
    try {
      this.asked = performance.now();
      if (this.complete) this.finish("stop");
      else await this.read(await this.ask());
    } catch (error) {
      this.fail(error);
    }
    if (this.byTokens) message.content += this.decoder.decode();
    await this.save();
    this.changed();
  }

  fail(error) {
    const { message } = this;
    if (message.status !== "streaming") return; // it was complete already
    if (error.name === "AbortError") {
      Object.assign(message, { status: "stopped", note: "Stopped." });
    } else if (error instanceof ConnectionLost) {
      Object.assign(message, { status: "broken", note: sentence(error.message) });
      this.server.connect();
    } else if (error instanceof Refused) {
      Object.assign(message, { status: "failed", note: sentence(error.message) });
    } else {
      Object.assign(message, { status: "failed", note: "The server sent something else." });
      console.warn(error);
    }
  }

  /** Send the request; waits while the model is loading, the queue is full, or a key is missing. */
  async ask() {
    for (;;) {
      if (!this.server.model) await Promise.race([this.server.connect(), this.aborted()]);
      this.aborting.signal.throwIfAborted();
      if (!this.server.model) throw new Refused(401, "The server needs an API key.");
      try {
        const response = await request(this.path, {
          body: this.body(),
          signal: this.aborting.signal,
        });
        if (this.server.notice) this.server.say("");
        return response;
      } catch (error) {
        if (error.status === 401 && (await this.server.askKey(error.message))) continue;
        if (error.code === "model_not_found" && !this.renamed) {
          this.renamed = true; // the server has another model than before
          await this.server.connect();
          continue;
        }
        if (error.status !== 503) throw error;
        await Promise.race([pause(1000 * this.server.wait(error)), this.aborted()]);
      }
    }
  }

  aborted() {
    return new Promise((resolve) => this.aborting.signal.addEventListener("abort", resolve));
  }

  get path() {
    return this.server.chat ? "/v1/chat/completions" : "/v1/completions";
  }

  body() {
    const { conversation, message, server } = this;
    const above = conversation.above(message);
    message.model = server.served(message.model || conversation.model); // it goes on with its own
    const common = {
      model: message.model,
      stream: true,
      stream_options: { include_usage: true },
      ...conversation.sampling,
    };
    if (!server.chat) {
      const prompt = [...above, message].map(({ content }) => content).join("");
      return { max_tokens: BASE_TOKENS, ...common, prompt, logprobs: 5 };
    }
    const messages = above.map(({ role, content }) => ({ role, content }));
    if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
    const ids = message.tokens.map(({ id }) => id);
    return {
      ...common,
      messages,
      logprobs: true,
      top_logprobs: ALTERNATIVES,
      ...(ids.length > 0 ? { continue_ids: ids } : {}),
    };
  }

  async read(response) {
    let count = 0;
    for await (const event of events(response)) {
      this.take(event);
      if (++count % EVENTS_A_FRAME === 0) await nextFrame();
      if (performance.now() - this.saved > SAVE_EVERY) await this.save();
    }
  }

  take(event) {
    const { message } = this;
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    const tokens = choice?.logprobs ? this.tokensOf(choice.logprobs) : [];
    if (tokens.length > 0) {
      this.byTokens = true;
      message.tokens.push(...tokens);
      message.content += this.decode(joined(tokens));
    } else if (!this.byTokens) {
      message.content += text;
    }
    this.count(tokens.length || (text ? 1 : 0), event.usage);
    if (choice?.finish_reason) this.finish(choice.finish_reason);
    this.changed();
  }

  tokensOf(logprobs) {
    return logprobs.content ? logprobs.content.map(fromEntry) : fromCompletion(logprobs);
  }

  decode(bytes) {
    return this.decoder.decode(bytes, { stream: true });
  }

  /** Figures of the answer: tokens, seconds to the first one, seconds from there. */
  count(generated, usage) {
    const now = performance.now();
    if (generated > 0) {
      if (this.generated === 0) this.firstAt = now;
      this.generated += generated;
      this.message.figures = {
        ...this.message.figures,
        generated: this.generated,
        first: (this.firstAt - this.asked) / 1000,
        seconds: (now - this.firstAt) / 1000,
      };
    }
    if (usage) {
      this.message.figures = {
        ...this.message.figures,
        prompt: usage.prompt_tokens,
        generated: usage.completion_tokens,
        cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
      };
    }
  }

  finish(reason) {
    const full = reason === "length";
    this.message.status = full ? "length" : "done";
    this.message.note = full ? "The answer reached its limit of tokens." : "";
  }

  async save() {
    this.saved = performance.now();
    this.conversation.touch();
    try {
      await saveTokens(this.message);
      await saveConversation(this.conversation);
    } catch {
      this.message.note = "The browser's storage is full: this answer is lost on reload.";
    }
  }
}
