// The chat: what is sent, what comes back, and what is done about it.

import { emptyAnswer, run } from "./answer.js";
import { bodyOf, keepMessages, openCalls, recallMessages } from "./conversation.js";
import { byId } from "./dom.js";
import { AnswerView, ToolResultView, UserView } from "./message_view.js";
import { readSettings, startSettings, wrongField } from "./settings.js";

const KEEP_EVERY = 2000;

let messages = [];
let views = [];
let aborter = null;
let onAnswer = () => {};
let lastKept = 0;

/** Show the kept conversation, and listen. answered: called with the answer as it grows. */
export function startChat(answered) {
  onAnswer = answered;
  startSettings();
  messages = recallMessages();
  views = messages.map(makeView);
  byId("messages").append(...views.map((view) => view.element));
  byId("composer").addEventListener("submit", onSubmit);
  byId("input").addEventListener("keydown", onKey);
  byId("input").addEventListener("input", updateButtons);
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("latest").addEventListener("click", () => toEnd("smooth"));
  document.addEventListener("scroll", updateLatest, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && aborter && !document.querySelector("dialog[open]")) stop();
  });
  addEventListener("pagehide", save);
  update();
  toEnd();
}

/** Return the model that is chosen. */
function chosenModel() {
  return byId("model").value || undefined;
}

function onKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) onSubmit(event);
}

function onSubmit(event) {
  event.preventDefault();
  const field = byId("input");
  const text = field.value.trim();
  if (!text || aborter || !settingsAreRight()) return;
  field.value = "";
  push({ role: "user", content: text });
  ask();
}

function settingsAreRight() {
  const wrong = wrongField();
  if (wrong === null) return true;
  byId("settings").hidden = false;
  byId("settings-button").setAttribute("aria-expanded", "true");
  wrong.focus();
  return false;
}

function push(message) {
  const view = makeView(message);
  messages.push(message);
  views.push(view);
  byId("messages").append(view.element);
  return view;
}

function makeView(message) {
  if (message.role === "user") return new UserView(message, { edit: (text) => edit(message, text) });
  if (message.role === "tool") return new ToolResultView(message);
  return new AnswerView(message, { retry: () => retry(message), result: (call, text) => giveResult(call, text) });
}

async function ask() {
  const body = bodyOf(messages, readSettings(), chosenModel());
  const answer = emptyAnswer(body.model);
  const view = push(answer);
  aborter = new AbortController();
  update();
  toEnd();
  let due = false;
  const changed = () => {
    if (due) return;
    due = true;
    nextFrame(() => {
      due = false;
      const follow = isAtEnd();
      view.update();
      if (follow) toEnd();
      onAnswer(answer);
      if (performance.now() - lastKept > KEEP_EVERY) save();
    });
  };
  await run(answer, body, aborter.signal, changed);
  aborter = null;
  const follow = isAtEnd();
  view.update();
  update();
  if (follow) toEnd();
  onAnswer(answer);
  save();
}

// A hidden page gets no frames, but its answer comes all the same.
function nextFrame(work) {
  if (document.hidden) setTimeout(work, 200);
  else requestAnimationFrame(work);
}

function stop() {
  aborter?.abort();
  byId("input").focus();
}

// Ends what runs, and waits until it has ended.
function cutTo(length) {
  if (aborter) return false;
  messages.length = length;
  for (const view of views.splice(length)) view.element.remove();
  return true;
}

function retry(message) {
  if (!settingsAreRight() || !cutTo(messages.indexOf(message))) return;
  ask();
}

function edit(message, text) {
  if (!settingsAreRight() || !cutTo(messages.indexOf(message))) return false;
  push({ role: "user", content: text });
  ask();
  return true;
}

function giveResult(call, text) {
  if (aborter) return;
  push({ role: "tool", tool_call_id: call.id, name: call.function.name, content: text });
  save();
  if (openCalls(messages).length) update();
  else ask();
}

function clear() {
  if (aborter) return;
  cutTo(0);
  save();
  update();
  byId("input").focus();
}

function save() {
  lastKept = performance.now();
  byId("not-kept").hidden = keepMessages(messages);
}

function update() {
  byId("chat").classList.toggle("empty", messages.length === 0);
  const open = aborter ? [] : openCalls(messages);
  for (const view of views) {
    if (view instanceof AnswerView) view.askResults(open);
  }
  updateButtons();
  updateLatest();
}

function updateButtons() {
  const busy = aborter !== null;
  byId("stop").hidden = !busy;
  byId("send").hidden = busy;
  byId("send").disabled = byId("input").value.trim() === "";
  byId("clear").disabled = busy || messages.length === 0;
  byId("chat").classList.toggle("busy", busy);
}

// The page itself scrolls, as phones expect.
function isAtEnd() {
  const root = document.documentElement;
  return root.scrollHeight - root.clientHeight - root.scrollTop < 80;
}

function toEnd(behavior = "instant") {
  if (!byId("chat").hidden) window.scrollTo({ top: document.documentElement.scrollHeight, behavior });
}

function updateLatest() {
  byId("latest").hidden = isAtEnd() || byId("chat").hidden;
}
