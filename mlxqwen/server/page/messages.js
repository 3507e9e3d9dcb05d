// Messages as they are shown.

import { copies } from "./copying.js";
import { markdownView } from "./markdown.js";
import { replyFigures, seconds } from "./numbers.js";

const fromTemplate = (id) => document.getElementById(id).content.cloneNode(true).firstElementChild;

/** What a user said. */
export function userView(message) {
  const element = fromTemplate("user-message");
  element.querySelector(".text").textContent = message.content;
  return { element, update() {} };
}

/** A reply; `update` shows what has come of it since. */
export function replyView(message, again) {
  const element = fromTemplate("assistant-message");
  const part = (name) => element.querySelector(`.${name}`);
  const thought = part("thought");
  const summary = thought.querySelector("summary");
  const thoughtText = document.createTextNode("");
  part("thought-text").append(thoughtText);
  const showContent = markdownView(part("text"));
  let isChosen = false; // whether the user has opened or closed the thought
  let hasBegun = false;
  let shownAs = ""; // a reply that is over changes no more
  summary.addEventListener("click", () => (isChosen = true));
  copies(part("copy"), () => message.content);
  part("again").addEventListener("click", again);

  function update({ isRunning, isLast }) {
    const state = `${isRunning} ${isLast}`;
    if (!isRunning && state === shownAs) return;
    shownAs = state;
    const { content, reasoning, note, error, figures } = message;
    const isThinking = isRunning && content === "";
    element.setAttribute("aria-busy", String(isRunning));
    element.classList.toggle("begins", isThinking && reasoning === "");
    if (!isChosen && isThinking && reasoning && !hasBegun) {
      hasBegun = true;
      thought.open = true;
    }
    if (!isChosen && !isThinking) thought.open = false;
    thought.hidden = reasoning === "";
    summary.textContent = isThinking ? "Thinking …" : figures.thought >= 0.05 ? `Thought for ${seconds(figures.thought)}` : "Thought";
    const text = reasoning.trim();
    if (text.startsWith(thoughtText.data)) thoughtText.appendData(text.slice(thoughtText.length));
    else thoughtText.data = text;
    showContent(content);
    show(part("note"), isRunning ? "" : note);
    show(part("error"), isRunning ? "" : error);
    part("figures").textContent = isRunning ? "" : replyFigures(figures);
    part("copy").hidden = content === "";
    part("again").hidden = !isLast;
    element.querySelector("footer").hidden = isRunning;
  }
  return { element, update };
}

function show(element, text) {
  element.textContent = text;
  element.hidden = text === "";
}
