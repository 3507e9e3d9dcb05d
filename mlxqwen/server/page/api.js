// Calls of the server: the key, streams, and what goes wrong.

const KEY = "mlxqwen.key";
const SILENT_MS = 45_000; // the server sends something every few seconds

/** What the server refused or ended a request with. */
export class ServerError extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

/** The server cannot be reached, or is gone. */
export class ConnectionLost extends Error {}

let key = keptKey();

function keptKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** Use a key from now on, and keep it until the tab is closed. */
export function useKey(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch {
    // Without storage the key is asked for again when the page is reloaded.
  }
}

export const hasKey = () => key !== "";

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    const told = (await response.json()).error.message;
    if (typeof told === "string" && told) message = told;
  } catch {
    // Something between here and the server may have answered, in a form of its own.
  }
  return new ServerError(message, response.status);
}

/** The names of the models that are served. */
export async function models() {
  const { data } = await (await call("v1/models")).json();
  return data.map((model) => String(model.id));
}

/** The numbers of `/metrics` without labels, by name. */
export async function metrics() {
  const lines = (await (await call("metrics")).text()).split("\n");
  const numbers = lines.map((line) => /^([a-z_]+) ([-+.\de]+)$/.exec(line)).filter(Boolean);
  return Object.fromEntries(numbers.map(([, name, value]) => [name, Number(value)]));
}

/** The chunks of a streamed chat completion. Ends with an error unless the reply is whole. */
export async function* completion(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let rest = "";
    for (;;) {
      const { done, value } = await inTime(reader.read());
      if (done) throw new ConnectionLost("The connection was lost before the reply was complete.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new ServerError(String(chunk.error.message));
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error instanceof ConnectionLost || error.name === "AbortError") throw error;
    throw new ConnectionLost("The connection was lost before the reply was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function inTime(reading) {
  let timer;
  const silence = new Promise((_, refuse) => {
    const lost = new ConnectionLost(`The server has sent nothing for ${SILENT_MS / 1000} seconds.`);
    timer = setTimeout(() => refuse(lost), SILENT_MS);
  });
  return Promise.race([reading, silence]).finally(() => clearTimeout(timer));
}
