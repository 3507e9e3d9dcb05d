// Vercel's AI SDK with its provider for servers of OpenAI's form.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "mlxqwen",
  baseURL: url,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider.chatModel(name);
const prompt = "How many r's in strawberry?";
const calculator = tool({
  description: "Evaluate an arithmetic expression.",
  inputSchema: z.object({ expression: z.string().describe("The expression.") }),
  execute: async ({ expression }) => {
    assert.equal(expression, "1234 * 567");
    return "699678";
  },
});
const use = { model, prompt: "What is 1234 * 567?", tools: { calculator }, temperature: 0, stopWhen: stepCountIs(3) };

const steps = {
  async chat() {
    const reply = await generateText({ model, prompt, temperature: 0 });
    assert.match(reply.text, /3 r's/);
    assert.ok(reply.reasoningText);
    assert.equal(reply.finishReason, "stop");
  },
  async stream() {
    const reply = streamText({ model, prompt, temperature: 0 });
    let text = "";
    for await (const piece of reply.textStream) text += piece;
    assert.match(text, /3 r's/);
    assert.ok((await reply.usage).outputTokens > 0);
  },
  async tools() {
    const reply = await generateText(use);
    assert.equal(reply.steps.length, 2);
    assert.match(reply.text, /699678/);
  },
  async streamed_tools() {
    const reply = streamText(use);
    await reply.consumeStream({ onError: (error) => { throw error; } });
    assert.match(await reply.text, /699678/);
  },
  async structured() {
    const schema = z.object({ letter: z.string().max(1), count: z.number().int().min(0).max(99) });
    const reply = await generateText({ model, prompt, output: Output.object({ schema }) });
    assert.equal(typeof reply.output.letter, "string");
  },
};

for (const [step, run] of Object.entries(steps)) {
  await run();
  console.log(step);
}
