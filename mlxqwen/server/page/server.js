// The server as the page shows it: whether it is there, how busy it is, its models, and the key that it asks for.

import { ConnectionLost, ServerError, hasKey, metrics, models, useKey } from "./api.js";
import { ask } from "./dialogs.js";
import { serverFigures } from "./numbers.js";

const byId = (id) => document.getElementById(id);
let before = null;
let beforeAt = 0;
let hasModels = false;
let hasLooked = false;

/** Look at how the server is, and show it; `listed` is called with the names of its models when they are read. */
export async function look(listed) {
  try {
    await listModels(listed);
    const now = await metrics();
    const figures = serverFigures(now, before, (performance.now() - beforeAt) / 1000);
    before = now;
    beforeAt = performance.now();
    for (const [name, text] of Object.entries(figures)) byId(name).textContent = text;
    connection("Connected", false);
  } catch (error) {
    before = null;
    if (error instanceof ConnectionLost) hasModels = false; // what comes back may be another server
    connection(error instanceof ConnectionLost ? "No connection to the server" : said(error), true);
  }
}

function connection(text, isLost) {
  byId("connection").classList.toggle("lost", isLost);
  document.body.classList.toggle("lost", isLost);
  if (byId("connection").textContent !== text) byId("connection").textContent = text;
}

/** The name of the model that is chosen. */
export async function chosenModel(listed) {
  await listModels(listed);
  return byId("model").value;
}

async function listModels(listed) {
  if (hasModels) return;
  // Who does not want to give the key is asked again when something is sent.
  const isFirst = !hasLooked;
  hasLooked = true;
  const names = await (isFirst ? withKey(models) : models());
  const select = byId("model");
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.disabled = names.length < 2;
  hasModels = true;
  listed(names);
}

/** What to say of an error. */
export function said(error) {
  if (error instanceof ServerError || error instanceof ConnectionLost) return error.message;
  console.error(error);
  return `The page failed: ${error.message}`;
}

/** Do `work`; where the server asks for a key, ask the user for it and do it again. */
export async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (error.status !== 401 || !(await askForKey())) throw error;
    }
  }
}

let asking = null;

export const isAsking = () => asking !== null;

/** Ask for the key, once however many wait for it → whether one was given. */
function askForKey() {
  asking ??= (async () => {
    byId("key-problem").hidden = !hasKey();
    byId("key-problem").textContent = "The server does not know this key.";
    byId("key").value = "";
    const isGiven = (await ask(byId("key-dialog"))) && byId("key").value.trim() !== "";
    if (isGiven) useKey(byId("key").value.trim());
    byId("key").value = "";
    return isGiven;
  })().finally(() => (asking = null));
  return asking;
}
