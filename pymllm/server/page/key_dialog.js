// Asks for the API key.

import { byId } from "./dom.js";

/** Ask for the key. refused: whether one was sent and is wrong. Gives a promise of the key, or null. */
export function askForKey(refused) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-refused").hidden = !refused;
  field.value = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    let given = null;
    const submit = (event) => {
      event.preventDefault();
      given = field.value.trim() || null;
      if (given !== null) dialog.close();
    };
    const form = byId("key-form");
    form.addEventListener("submit", submit);
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", submit);
      field.value = "";
      resolve(given);
    }, { once: true });
  });
}

byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
