// The server as the page sees it: which model, its defaults, and whether it answers.
// Knows nothing of conversations.

import { ConnectionLost, Refused, request } from "./api.js";
import { pause, sentence } from "./dom.js";

const PATIENCE = 2; // seconds between two tries

export class Server {
  /**
   * @param changed called when `notice` or the model changed
   * @param askKey asks the user for a key, given a reason; false: the user refused
   */
  constructor(changed, askKey) {
    Object.assign(this, { changed, askKey });
    this.models = []; // the base and its adapters: {id, chat, max_model_len, defaults, ...}
    this.notice = "Connecting to the server…"; // what is wrong; empty: nothing
    this.connecting = null;
  }

  /** Wait until the server is ready. Calls at the same time share one wait. */
  connect() {
    this.connecting ??= this.tryUntilReady().finally(() => (this.connecting = null));
    return this.connecting;
  }

  async tryUntilReady() {
    for (;;) {
      try {
        await request("/health");
        const list = await (await request("/v1/models")).json();
        this.models = list.data;
        this.say("");
        return;
      } catch (error) {
        if (error.status === 401) {
          if (await this.askKey(error.message)) continue;
          this.say("This server asks for an API key. Send a message to enter it.");
          return;
        }
        await pause(1000 * this.wait(error));
      }
    }
  }

  /** Say why a request has to wait, and for how many seconds. */
  wait(error) {
    if (error instanceof ConnectionLost) {
      this.say("The server does not answer. Trying again; what you wrote stays here.");
    } else if (error instanceof Refused && error.status === 503) {
      this.say(`${sentence(error.message)} Waiting.`);
    } else {
      this.say(`${sentence(error.message)} Trying again.`);
    }
    return error.retryAfter ?? PATIENCE;
  }

  say(notice) {
    this.notice = notice;
    this.changed();
  }

  /** The base, or null before the server has answered; adapters differ from it by their id only. */
  get model() {
    return this.models[0] ?? null;
  }

  /** The id of the model with this name; of the base where it is not served (any more). */
  served(name) {
    return (this.models.find(({ id }) => id === name) ?? this.model)?.id;
  }

  get defaults() {
    return this.model?.defaults ?? {};
  }

  /** Tokens that a conversation may have. */
  get room() {
    return this.model?.max_model_len ?? 0;
  }

  /** Whether a token ends an answer. */
  isStop(id) {
    return id !== null && (this.model?.stop_tokens ?? []).includes(id);
  }

  /** Whether the model answers messages; a base model continues a text. */
  get chat() {
    return this.model?.chat !== false;
  }
}
