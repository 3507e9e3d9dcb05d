// The chat page: what is on the screen, and what the keys and buttons do.

import { Conversations, LONGEST_TITLE, browserStorage, keepChoices, keptChoices } from "./conversations.js";
import { ask } from "./dialogs.js";
import { replyView, userView } from "./messages.js";
import { Reply, emptyReply, question } from "./replies.js";
import { chosenModel, isAsking, look, said, withKey } from "./server.js";

const KEEP_MS = 1000;
const LOOK_MS = 5000;
const NEAR_END = 80; // pixels
const TITLE_FROM = 60; // characters of the first message

const byId = (id) => document.getElementById(id);
const storage = browserStorage();
const conversations = new Conversations(storage);
const choices = keptChoices(storage);
const replies = new Map(); // conversation id → its reply on the way
let current = conversations.add();
let views = [];
let followsEnd = true;
let isDrawn = true;

// ---- the conversation on the screen

function open(conversation) {
  current = conversation;
  followsEnd = true;
  views = [];
  byId("messages").replaceChildren();
  for (const message of conversation.messages) addView(message);
  update();
  listConversations();
  closeMenu();
}

function addView(message) {
  const view = message.role === "user" ? userView(message) : replyView(message, askAgain);
  views.push({ ...view, message });
  byId("messages").append(view.element);
}

/** Show what has changed of the conversation on the screen. */
function update() {
  const reply = replies.get(current.id);
  for (const { message, update: updateView } of views) {
    updateView({ isRunning: reply?.message === message, isLast: message === current.messages.at(-1) });
  }
  const isEmpty = current.messages.length === 0;
  byId("empty").hidden = !isEmpty;
  byId("rename").hidden = byId("delete").hidden = isEmpty;
  byId("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} – mlxqwen` : "mlxqwen";
  byId("stop").hidden = !reply;
  byId("send").hidden = Boolean(reply);
  byId("send").disabled = byId("question").value.trim() === "";
  followEnd();
}

/** Update with the next frame: many tokens may come in one. */
function updateSoon() {
  if (!isDrawn) return;
  isDrawn = false;
  const draw = () => {
    isDrawn = true;
    update();
  };
  if (document.hidden) setTimeout(draw, KEEP_MS);
  else requestAnimationFrame(draw);
}

function followEnd() {
  if (followsEnd) byId("scroller").scrollTop = byId("scroller").scrollHeight;
}

/** Have screen readers say how the reply stands. */
function tell(text) {
  if (byId("status").textContent !== text) byId("status").textContent = text;
}

// ---- the list of conversations

function listConversations() {
  const items = conversations.list().filter((one) => one.messages.length > 0);
  const list = byId("conversations");
  const hadFocus = list.contains(document.activeElement);
  list.replaceChildren(
    ...items.map((conversation) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = conversation.title;
      if (conversation === current) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => open(conversation));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  if (hadFocus) list.querySelector("[aria-current]")?.focus();
}

function keep(conversation) {
  if (!conversations.known.has(conversation.id)) return; // deleted meanwhile
  const isKept = conversations.keep(conversation);
  const problem = storage ? "This conversation is too long to be kept." : "This browser keeps no conversations.";
  byId("kept").textContent = isKept ? "" : problem;
  byId("kept").hidden = isKept;
}

function startNew() {
  open(current.messages.length === 0 ? current : conversations.add());
  focusField();
}

async function rename() {
  const conversation = current;
  byId("name").value = conversation.title;
  const isConfirmed = await ask(byId("rename-dialog"));
  const title = byId("name").value.trim();
  if (!isConfirmed || !title) return;
  conversation.title = title.slice(0, LONGEST_TITLE);
  keep(conversation);
  listConversations();
  update();
}

async function remove() {
  const conversation = current;
  byId("deleted-name").textContent = conversation.title;
  if (!(await ask(byId("delete-dialog")))) return;
  replies.get(conversation.id)?.stop();
  conversations.remove(conversation.id);
  open(conversations.add());
  focusField();
}

// ---- questions and replies

function send() {
  const field = byId("question");
  const content = field.value.trim();
  if (!content || replies.has(current.id)) return;
  field.value = "";
  fitField();
  const message = { role: "user", content };
  if (!current.title) current.title = [...content.split("\n")[0]].slice(0, TITLE_FROM).join("");
  current.messages.push(message);
  addView(message);
  reply(current);
}

function askAgain() {
  if (replies.has(current.id)) return;
  current.messages.pop();
  views.pop().element.remove();
  reply(current);
  focusField();
}

async function reply(conversation) {
  const body = question(conversation.messages, choices);
  const message = emptyReply();
  let keptAt = 0;
  const running = new Reply(message, () => {
    if (Date.now() - keptAt > KEEP_MS) {
      keptAt = Date.now();
      keep(conversation);
    }
    if (conversation === current) {
      tell(message.content ? "Answering" : "Thinking");
      updateSoon();
    }
  });
  conversation.messages.push(message);
  conversation.changed = Date.now();
  conversations.adopt(conversation);
  replies.set(conversation.id, running);
  addView(message);
  followsEnd = true;
  listConversations();
  update();
  try {
    await withKey(async () => running.read({ ...body, model: await chosenModel(chooseModel) }));
    tell(message.note || "The reply is complete.");
  } catch (error) {
    message.error = said(error);
    tell(message.error);
  } finally {
    replies.delete(conversation.id);
    keep(conversation);
    update();
    look(chooseModel);
  }
}

// ---- keys and buttons

// A phone's keyboard covers half of the page, and has no Shift and Enter.
const isTouched = () => matchMedia("(pointer: coarse) and (hover: none)").matches;

function focusField() {
  if (!isTouched()) byId("question").focus();
}

function fitField() {
  const field = byId("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  byId("send").disabled = field.value.trim() === "";
}

function showChoices() {
  byId("thinking").checked = choices.thinking;
  byId("budget").disabled = !choices.thinking;
  if (document.activeElement !== byId("budget")) byId("budget").value = choices.budget ?? "";
}

function choose(changes) {
  Object.assign(choices, changes);
  keepChoices(storage, choices);
  showChoices();
}

/** Take the model that was chosen last, if it is still served. */
function chooseModel(names) {
  if (names.includes(choices.model)) byId("model").value = choices.model;
  else choices.model = null;
}

function openMenu() {
  document.body.classList.add("menu-open");
  byId("menu").setAttribute("aria-expanded", "true");
  byId("shade").hidden = false;
  byId("chat").inert = true;
  byId("new").focus();
}

function closeMenu() {
  const wasOpen = document.body.classList.contains("menu-open");
  document.body.classList.remove("menu-open");
  byId("menu").setAttribute("aria-expanded", "false");
  byId("shade").hidden = true;
  byId("chat").inert = false;
  if (wasOpen) byId("menu").focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  focusField();
});
byId("question").addEventListener("input", fitField);
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouched()) return;
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => {
  replies.get(current.id)?.stop();
  focusField();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("menu-open")) closeMenu();
  else replies.get(current.id)?.stop();
});
byId("new").addEventListener("click", startNew);
byId("rename").addEventListener("click", rename);
byId("delete").addEventListener("click", remove);
byId("menu").addEventListener("click", openMenu);
byId("shade").addEventListener("click", closeMenu);
byId("thinking").addEventListener("change", (event) => choose({ thinking: event.target.checked }));
byId("budget").addEventListener("change", (event) => {
  const budget = event.target.valueAsNumber;
  const isFit = Number.isInteger(budget) && budget >= 1;
  choose({ budget: isFit ? budget : null });
  if (!isFit) event.target.value = "";
});
byId("model").addEventListener("change", (event) => choose({ model: event.target.value }));
byId("scroller").addEventListener("scroll", ({ target }) => {
  followsEnd = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR_END;
});
addEventListener("pagehide", () => {
  for (const id of replies.keys()) if (conversations.known.has(id)) keep(conversations.known.get(id));
});
addEventListener("storage", ({ key }) => {
  // Another tab's word counts, except on a conversation that is being answered here.
  if (key === null || [...replies.keys()].some((id) => key.endsWith(id)) || !conversations.reread(key)) return;
  const changed = conversations.known.get(current.id);
  if (changed === current) listConversations();
  else open(changed ?? conversations.add());
});
setInterval(() => {
  if (!document.hidden && !isAsking()) look(chooseModel);
}, LOOK_MS);

showChoices();
open(current);
focusField();
look(chooseModel);
