// The official JavaScript client: the same calls as strict_openai.py. It does not validate, so each
// check looks at the fields itself. Prints one JSON object a check.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 300_000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 20 } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

const checks = {
  async models() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.deepEqual(ids, [model]);
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async chat() {
    const reply = await client.chat.completions.create({ model, messages, max_tokens: 12 });
    assert.equal(reply.object, "chat.completion");
    assert.equal(reply.choices[0].message.role, "assistant");
    const usage = reply.usage;
    assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
  },

  async chat_stream_equals_the_whole() {
    const request = { model, messages, max_tokens: 12, temperature: 0 };
    const whole = await client.chat.completions.create(request);
    const stream = await client.chat.completions.create({
      ...request,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async stream_helper_accumulates() {
    const runner = client.chat.completions.stream({ model, messages, max_tokens: 12 });
    const final = await runner.finalChatCompletion();
    assert.ok(final.choices[0].message.content.length > 0);
  },

  async abort_leaves_the_server_well() {
    const stream = await client.chat.completions.create({ model, messages, stream: true });
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) break; // the client aborts the request
    }
    const reply = await client.chat.completions.create({ model, messages, max_tokens: 2 });
    assert.equal(reply.choices.length, 1);
  },

  async logprobs() {
    const request = { model, messages, max_tokens: 5, logprobs: true, top_logprobs: 2 };
    const [choice] = (await client.chat.completions.create(request)).choices;
    const bytes = choice.logprobs.content.flatMap((token) => token.bytes);
    assert.equal(Buffer.from(bytes).toString(), choice.message.content);
  },

  async forced_tool() {
    const runner = client.chat.completions.stream({
      model,
      messages,
      tools: [weather],
      tool_choice: "required",
    });
    const final = await runner.finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    assert.equal(final.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "get_weather");
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  },

  async json_schema() {
    const reply = await client.chat.completions.create({
      model,
      messages,
      response_format: {
        type: "json_schema",
        json_schema: { name: "city", strict: true, schema: weather.function.parameters },
      },
    });
    assert.deepEqual(Object.keys(JSON.parse(reply.choices[0].message.content)), ["city"]);
  },

  async completions() {
    const request = { model, prompt: "The sky is", max_tokens: 4, temperature: 0 };
    const whole = await client.completions.create(request);
    let text = "";
    for await (const chunk of await client.completions.create({ ...request, stream: true })) {
      text += chunk.choices[0].text;
    }
    assert.equal(text, whole.choices[0].text);
  },

  async errors_are_exceptions() {
    const wrong = { model, messages, temperature: 9 };
    await assert.rejects(
      () => client.chat.completions.create(wrong),
      (e) => e instanceof OpenAI.BadRequestError && e.param === "temperature",
    );
    await assert.rejects(
      () => client.chat.completions.create({ messages, model: "unknown" }),
      OpenAI.NotFoundError,
    );
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(JSON.stringify({ name, state: "passed" }));
  } catch (e) {
    console.log(JSON.stringify({ name, state: "failed", reason: String(e.message).slice(0, 300) }));
  }
}
