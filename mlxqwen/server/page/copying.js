// Text to the clipboard.

const SHOWN_MS = 1500;

/** Copy a text → whether it worked. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyAsBefore(text); // pages of other machines have no clipboard without HTTPS
  }
}

function copyAsBefore(text) {
  const focused = document.activeElement;
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "hidden";
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isDone;
}

/** Make a button copy what `text` returns, and say so. */
export function copies(button, text) {
  const name = button.textContent;
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = name), SHOWN_MS);
  });
  return button;
}

/** A button that copies what `text` returns. */
export function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  return copies(button, text);
}
