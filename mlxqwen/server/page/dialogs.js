// Dialogs that ask for one thing.

/** Open a dialog → true if it was confirmed. Escape and Cancel say no, Enter in its field says yes. */
export function ask(dialog) {
  const field = dialog.querySelector("input");
  return new Promise((resolve) => {
    const listening = new AbortController();
    const { signal } = listening;
    const answer = (isConfirmed) => {
      listening.abort();
      dialog.close();
      resolve(isConfirmed);
    };
    for (const button of dialog.querySelectorAll("button")) {
      button.addEventListener("click", () => answer(button.value === "ok"), { signal });
    }
    field?.addEventListener(
      "keydown",
      (event) => {
        if (event.key !== "Enter" || event.isComposing) return;
        event.preventDefault();
        answer(true);
      },
      { signal },
    );
    dialog.addEventListener("cancel", () => answer(false), { signal });
    dialog.showModal();
    field?.select();
  });
}
