// Conversations and choices that the browser keeps: within bounds, the oldest conversations given up for the newest.

const PREFIX = "mlxqwen.conversation.";
const CHOICES = "mlxqwen.choices";
export const LONGEST_TITLE = 80;

/** Conversations by id, newest first, in a storage such as `localStorage`; null keeps them in memory alone. */
export class Conversations {
  constructor(storage, { most = 100, characters = 2_000_000 } = {}) {
    this.storage = storage;
    this.most = most;
    this.characters = characters;
    this.known = new Map();
    for (const key of this.keys()) this.reread(key);
  }

  keys() {
    const names = Array.from({ length: this.storage?.length ?? 0 }, (_, place) => this.storage.key(place));
    return names.filter((name) => name.startsWith(PREFIX));
  }

  list() {
    return [...this.known.values()].sort((a, b) => b.changed - a.changed);
  }

  add() {
    const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const made = { id, title: "", changed: Date.now(), messages: [] };
    this.known.set(id, made);
    return made;
  }

  /** Take over what another tab has written or removed. */
  reread(key) {
    if (!key.startsWith(PREFIX)) return false;
    const id = key.slice(PREFIX.length);
    const read = checked(id, this.storage.getItem(key));
    if (read) this.known.set(id, read);
    else this.known.delete(id);
    return true;
  }

  /** Have a conversation that was given up for room, or removed by another tab, again. */
  adopt(conversation) {
    this.known.set(conversation.id, conversation);
  }

  remove(id) {
    this.known.delete(id);
    this.storage?.removeItem(PREFIX + id);
  }

  /** Keep a conversation as it is now; false where it cannot be kept. */
  keep(conversation) {
    if (!this.storage) return false;
    const text = JSON.stringify(conversation);
    const key = PREFIX + conversation.id;
    if (text.length > this.characters) return false;
    let room = this.characters - text.length;
    let places = this.most - 1;
    let isFull = false;
    const older = [];
    for (const other of this.list().filter((one) => one.id !== conversation.id)) {
      const length = this.storage.getItem(PREFIX + other.id)?.length ?? 0;
      isFull ||= length > room || places < 1;
      if (isFull) this.remove(other.id);
      else older.push(other.id);
      room -= length;
      places -= 1;
    }
    for (;;) {
      try {
        this.storage.setItem(key, text);
        return true;
      } catch {
        // The browser's own bound, which other pages of this address share.
        if (older.length === 0) return false;
        this.remove(older.pop());
      }
    }
  }
}

/** A conversation as it was kept, or null: other pages of this address may write there, too. */
function checked(id, text) {
  try {
    const { title, changed, messages } = JSON.parse(text);
    if (typeof title !== "string" || !Number.isFinite(changed) || !Array.isArray(messages)) return null;
    return { id, title: title.slice(0, LONGEST_TITLE), changed, messages: messages.map(checkedMessage) };
  } catch {
    return null;
  }
}

function checkedMessage(given) {
  if (given.role !== "user" && given.role !== "assistant") throw new TypeError("role");
  const message = { role: given.role };
  for (const name of ["content", "reasoning", "note", "error"]) {
    message[name] = typeof given[name] === "string" ? given[name] : "";
  }
  message.figures = {};
  for (const [name, value] of Object.entries(given.figures ?? {})) {
    if (Number.isFinite(value)) message.figures[name] = value;
  }
  return message;
}

/** `localStorage`, or null where the browser has none for this page. */
export function browserStorage() {
  try {
    localStorage.getItem(PREFIX);
    return localStorage;
  } catch {
    return null;
  }
}

/** Thinking, its budget (null without a limit) and the model's name (null for the first), as chosen last. */
export function keptChoices(storage) {
  let kept = {};
  try {
    kept = JSON.parse(storage?.getItem(CHOICES) ?? "{}") ?? {};
  } catch {
    // As if nothing had been chosen.
  }
  return {
    thinking: kept.thinking !== false,
    budget: Number.isInteger(kept.budget) && kept.budget > 0 ? kept.budget : null,
    model: typeof kept.model === "string" ? kept.model : null,
  };
}

export function keepChoices(storage, choices) {
  try {
    storage?.setItem(CHOICES, JSON.stringify(choices));
  } catch {
    // They hold until the page is reloaded.
  }
}
