// The choice between a base and its adapters. Knows nothing of conversations but their model.

import { byId, make } from "./dom.js";

let offered = null; // the models that the choice has: rebuilding it would close an open list

/** Show the model of the next answers of a conversation; nothing where the server has only one. */
export function showChoice(server, conversation) {
  const choice = byId("choose-model");
  choice.hidden = server.models.length < 2;
  if (offered !== server.models)
    choice.replaceChildren(...server.models.map(({ id }) => make("option", {}, id)));
  offered = server.models;
  choice.value = server.served(conversation.model) ?? "";
}
