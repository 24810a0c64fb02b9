// The settings of the chat: a form beside it, kept in the browser.

import { byId } from "./dom.js";
import { keep, recall } from "./storage.js";

// Empty fields ask for nothing: the checkpoint's recommendation holds.
const NUMBERS = {
  temperature: [0, 5],
  top_p: [0, 1],
  max_tokens: [1, Infinity],
  seed: [-Infinity, Infinity],
};
const WHOLE = ["max_tokens", "seed"];

/** Fill the form with what the browser kept, and keep what is changed. */
export function startSettings() {
  const kept = recall("settings") ?? {};
  for (const field of fields()) {
    if (typeof kept[field.name] === "string") field.value = kept[field.name];
  }
  byId("settings-form").addEventListener("input", () => {
    check();
    keep("settings", Object.fromEntries(fields().map((field) => [field.name, field.value])));
  });
  byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
  check();
}

function fields() {
  return [...byId("settings-form").elements].filter((field) => field.name);
}

function valueOf(name) {
  return fields().find((field) => field.name === name).value.trim();
}

/** Return the settings as requests have them; null for what is left to the model. */
export function readSettings() {
  const numbers = Object.keys(NUMBERS).map((name) => [name, valueOf(name) === "" ? null : Number(valueOf(name))]);
  return { system: valueOf("system"), thinking: valueOf("thinking"), tools: parseTools(valueOf("tools")), ...Object.fromEntries(numbers) };
}

/** Return the first field that cannot be sent, or null. */
export function wrongField() {
  check();
  return fields().find((field) => !field.validity.valid) ?? null;
}

function check() {
  for (const field of fields()) field.setCustomValidity(whyNot(field.name, field.value.trim()));
  for (const field of fields()) {
    const hint = byId(`${field.name}-hint`);
    if (hint) hint.textContent = field.validationMessage;
    field.setAttribute("aria-invalid", String(!field.validity.valid));
  }
}

function whyNot(name, text) {
  if (text === "") return "";
  if (name === "tools") return parseTools(text) === null ? "Expected a JSON list of tools: [{\"type\": \"function\", …}]" : "";
  if (!(name in NUMBERS)) return "";
  const [least, most] = NUMBERS[name];
  const value = Number(text);
  if (Number.isNaN(value) || (WHOLE.includes(name) && !Number.isSafeInteger(value))) {
    return WHOLE.includes(name) ? "Expected a whole number" : "Expected a number";
  }
  if (value < least || value > most) return most === Infinity ? `Expected at least ${least}` : `Expected ${least} to ${most}`;
  return "";
}

function parseTools(text) {
  if (text === "") return [];
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) ? tools : null;
  } catch {
    return null;
  }
}
