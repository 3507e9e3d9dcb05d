// OpenAI's SDK for Node.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "EMPTY", maxRetries: 0 });
const question = [{ role: "user", content: "How many r's in strawberry?" }];
const product = [{ role: "user", content: "What is 1234 * 567?" }];
const calculator = {
  name: "calculator",
  description: "Evaluate an arithmetic expression.",
  parameters: {
    type: "object",
    properties: { expression: { type: "string", description: "The expression." } },
    required: ["expression"],
    additionalProperties: false,
  },
};
const tools = [{ type: "function", function: calculator }];

const steps = {
  async chat() {
    const reply = await client.chat.completions.create({ model, messages: question, temperature: 0 });
    assert.match(reply.choices[0].message.content, /3 r's/);
    assert.ok(reply.choices[0].message.reasoning_content);
  },
  async stream() {
    const whole = await client.chat.completions.create({ model, messages: question, seed: 7 });
    const chunks = await client.chat.completions.create({ model, messages: question, seed: 7, stream: true });
    let text = "";
    for await (const chunk of chunks) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, whole.choices[0].message.content);
  },
  async tools() {
    const runner = client.chat.completions.runTools({
      model,
      messages: product,
      temperature: 0,
      stream: true,
      tools: [{ type: "function", function: { ...calculator, parse: JSON.parse, function: () => "699678" } }],
    });
    assert.match(await runner.finalContent(), /699678/);
    const { choices } = await client.chat.completions.create({ model, messages: product, tools, temperature: 0 });
    const [call] = choices[0].message.tool_calls;
    assert.deepEqual(JSON.parse(call.function.arguments), { expression: "1234 * 567" });
  },
  async structured() {
    const format = zodResponseFormat(z.object({ letter: z.string().max(1), count: z.number().int().min(0).max(99) }), "count");
    const reply = await client.chat.completions.parse({ model, messages: question, response_format: format });
    assert.equal(typeof reply.choices[0].message.parsed.letter, "string");
  },
  async responses() {
    const events = client.responses.stream({ model, input: "How many r's in strawberry?", temperature: 0 });
    const reply = await events.finalResponse();
    assert.match(reply.output_text, /3 r's/);
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ model: "gpt-4", messages: question }), OpenAI.NotFoundError);
  },
};

for (const [name, step] of Object.entries(steps)) {
  await step();
  console.log(name);
}
