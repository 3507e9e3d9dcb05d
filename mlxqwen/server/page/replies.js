// A reply on its way: what comes of it is written into its message.

import { completion } from "./api.js";

const SHORTEST_MS = 20; // over less no speed can be told
const NOTES = {
  left: "Incomplete: the page was closed before the reply ended.",
  stopped: "Stopped.",
  length: "Cut off: there was no room for more tokens.",
  thought: "The reply ended inside its thought, without an answer.",
  nothing: "The reply is empty.",
};

/** The message of a reply that has not begun. */
export const emptyReply = () => ({
  role: "assistant",
  content: "",
  reasoning: "",
  note: NOTES.left, // until its end is known
  error: "",
  figures: {},
});

/** What the server is asked: the messages before the reply, and how to think. */
export function question(messages, { thinking, budget }) {
  const said = messages.filter((message) => message.role === "user" || message.content !== "");
  const body = { messages: said.map(({ role, content }) => ({ role, content })) };
  if (!thinking) body.thinking_budget = 0;
  else if (budget) body.thinking_budget = budget;
  return body;
}

export class Reply {
  /** `changed` is called whenever something has come. */
  constructor(message, changed) {
    this.message = message;
    this.changed = changed;
    this.controller = new AbortController();
  }

  stop() {
    this.controller.abort();
  }

  /** Read the reply to its end. Raises what went wrong, unless it was stopped. */
  async read(body) {
    const { message } = this;
    const { figures } = message;
    this.began = performance.now();
    let reason = null;
    let isAllThought = false;
    try {
      for await (const chunk of completion(body, this.controller.signal)) {
        if (chunk.usage) this.count(chunk.usage);
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        this.take(choice.delta ?? {});
        reason = choice.finish_reason ?? reason;
        isAllThought ||= choice.ended_in_thought === true;
      }
      message.note = isAllThought ? NOTES.thought : reason === "length" ? NOTES.length : "";
      if (!message.note && message.content === "") message.note = NOTES.nothing;
    } catch (error) {
      message.note = error.name === "AbortError" ? NOTES.stopped : "";
      if (error.name !== "AbortError") throw error;
    } finally {
      if (this.thoughtAt !== undefined && figures.thought === undefined) figures.thought = this.since(this.thoughtAt);
      const tokens = figures.tokens ?? figures.counted;
      const elapsed = this.lastAt - this.firstAt;
      if (tokens > 1 && elapsed > SHORTEST_MS) figures.rate = ((tokens - 1) * 1000) / elapsed;
    }
  }

  take(delta) {
    const { message } = this;
    const { figures } = message;
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    const content = delta.content ?? "";
    if (!thought && !content) return;
    this.lastAt = performance.now();
    if (this.firstAt === undefined) {
      this.firstAt = this.lastAt;
      figures.first = this.since(this.began);
    }
    figures.counted = (figures.counted ?? 0) + 1; // nearly every token comes alone
    if (thought) this.thoughtAt ??= this.lastAt;
    if (content && this.thoughtAt !== undefined && figures.thought === undefined) figures.thought = this.since(this.thoughtAt);
    message.reasoning += thought;
    message.content += content;
    this.changed();
  }

  count(usage) {
    const { figures } = this.message;
    figures.tokens = usage.completion_tokens;
    figures.prompt = usage.prompt_tokens;
    figures.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }

  since(moment) {
    return (performance.now() - moment) / 1000;
  }
}
