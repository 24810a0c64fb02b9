// Shows one message of the conversation.

import { figures } from "./answer.js";
import { h, icon, iconButton } from "./dom.js";
import { digits, duration, whole } from "./format.js";
import { copyText, MarkdownView } from "./markdown_view.js";

const BUSY = ["waiting", "running"];

/** The user's message. actions: edit(text) asks anew with another text. */
export class UserView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = h("div", { class: "bubble", dir: "auto" }, message.content);
    const buttons = h("div", { class: "actions" }, iconButton("edit", "Edit this message", () => this.edit()), copyButton(() => message.content));
    this.element = h("article", { class: "message user", "aria-label": "You" }, this.body, buttons);
  }

  /** Turn the message into a field. */
  edit() {
    if (this.element.querySelector("form")) return;
    const field = h("textarea", { class: "edit", "aria-label": "The message", rows: "1" });
    field.value = this.message.content;
    const close = () => {
      form.replaceWith(this.body);
      this.element.classList.remove("editing");
    };
    const submit = (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (!text || !this.actions.edit(text)) return;
    };
    const form = h("form", { onsubmit: submit }, field, h("div", { class: "row" },
      h("button", { type: "button", class: "quiet-button", onclick: close }, "Cancel"),
      h("button", { type: "submit", class: "primary" }, "Ask again")));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    });
    this.body.replaceWith(form);
    this.element.classList.add("editing");
    field.focus();
  }

  update() {}
}

/** The result of a tool, as the user gave it. */
export class ToolResultView {
  constructor(message) {
    this.element = h("article", { class: "message tool-result", "aria-label": "Result of a tool" },
      h("div", { class: "label" }, icon("tool"), "Result of ", h("code", {}, message.name ?? message.tool_call_id)),
      h("pre", { tabindex: "0" }, message.content));
  }

  update() {}
}

/** An answer. actions: retry() asks for another one, openKey() for the key; result(call, text) gives the result of a call. */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.thinking = new ThinkingView();
    this.text = new MarkdownView();
    this.calls = h("div", { class: "calls" });
    this.problem = h("div", { class: "problem", role: "alert", hidden: true });
    this.facts = h("div", { class: "facts" });
    this.buttons = h("div", { class: "actions" }, copyButton(() => message.content), iconButton("retry", "Another answer", () => actions.retry()));
    const foot = h("div", { class: "foot" }, this.facts, this.buttons);
    this.element = h("article", { class: "message answer", "aria-label": "Answer" }, this.thinking.element, this.text.element, this.calls, this.problem, foot);
    this.update();
  }

  /** Show the message as it is now. */
  update() {
    const { message } = this;
    const busy = BUSY.includes(message.state);
    this.element.dataset.state = message.state;
    this.element.setAttribute("aria-busy", String(busy));
    this.thinking.update(message, busy);
    this.text.update(message.content);
    this.updateCalls(busy);
    this.updateProblem();
    this.facts.replaceChildren(...factsOf(message).map(([name, text, title]) => h("span", { title, "data-fact": name }, text)));
    this.buttons.hidden = busy;
  }

  updateCalls(busy) {
    const { message } = this;
    if (busy || this.calls.childElementCount !== message.tool_calls.length || !this.settled) {
      this.calls.replaceChildren(...message.tool_calls.map(callElement));
    }
    this.settled = !busy;
  }

  /** Ask for the results of these calls. */
  askResults(open) {
    for (const form of this.calls.querySelectorAll("form")) form.remove();
    this.message.tool_calls.forEach((call, index) => {
      if (!open.includes(call)) return;
      const field = h("textarea", { rows: "2", placeholder: "What the tool gave back", "aria-label": `Result of ${call.function.name}` });
      const submit = (event) => {
        event.preventDefault();
        this.actions.result(call, field.value);
      };
      this.calls.children[index].append(h("form", { onsubmit: submit }, field, h("button", { type: "submit", class: "primary" }, "Give the result")));
    });
  }

  updateProblem() {
    const { error } = this.message;
    this.problem.hidden = error === null;
    if (error === null || this.shownError === error) return;
    this.shownError = error;
    const facts = [["param", error.param], ["code", error.code]].filter(([, value]) => value !== null && value !== undefined);
    const button = error.status === 401
      ? h("button", { type: "button", class: "primary", onclick: () => this.actions.retry() }, "Enter the key")
      : h("button", { type: "button", class: "primary", onclick: () => this.actions.retry() }, "Try again");
    this.problem.replaceChildren(
      h("strong", {}, error.status ? `${error.status} · ${TITLES[error.status] ?? (error.status < 500 ? "The request was refused" : "The server failed")}` : "No answer"),
      h("p", {}, error.message),
      facts.length ? h("dl", {}, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, h("code", {}, String(value)))))) : "",
      error.retryAfter === null ? "" : countdown(error.retryAfter),
      button,
    );
  }
}

const TITLES = {
  400: "The request was refused",
  401: "The key is missing or wrong",
  404: "Not found",
  413: "Too long",
  429: "Too many requests",
  503: "The server is busy",
};

// Says when to try again; whoever does not want to wait need not.
function countdown(seconds) {
  const text = h("p", { class: "retry-after" }, `The server asks to wait ${seconds} s.`);
  let left = seconds;
  const timer = setInterval(() => {
    left -= 1;
    text.textContent = left > 0 ? `The server asks to wait ${left} s more.` : "The server said that there may be room now.";
    if (left <= 0 || !text.isConnected) clearInterval(timer);
  }, 1000);
  return text;
}

/** What the model thought, apart from what it says; open while it thinks, unless the reader decides otherwise. */
class ThinkingView {
  constructor() {
    this.title = h("span");
    this.text = new MarkdownView();
    const summary = h("summary", { onclick: () => (this.chosen = true) }, this.title);
    this.element = h("details", { class: "thinking", hidden: true }, summary, this.text.element);
  }

  update(message, busy) {
    this.element.hidden = !message.reasoning;
    if (!message.reasoning) return;
    this.text.update(message.reasoning);
    const thinks = busy && message.times.answer === undefined;
    const { first, answer, last } = message.times;
    this.title.textContent = thinks ? "Thinking…" : `Thought for ${duration((answer ?? last) - first)}`;
    this.element.classList.toggle("running", thinks);
    if (!this.chosen) this.element.open = thinks;
  }
}

function callElement(call) {
  return h("section", { class: "call", "aria-label": "A call of a tool" },
    h("div", { class: "label" }, icon("tool"), "Calls ", h("code", {}, call.function.name)),
    h("pre", { tabindex: "0" }, pretty(call.function.arguments)));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function factsOf(message) {
  const { first, rate, tokens, prompt, cached, exact } = figures(message);
  const facts = [];
  const about = exact ? "" : "≈ ";
  if (message.state === "waiting") facts.push(["state", "Reading…", "The server reads the conversation, or the request waits for its turn"]);
  if (rate !== null) facts.push(["rate", `${about}${digits(rate)} tokens/s`, exact ? "From the first token to the last" : "One piece of the answer counted as a token"]);
  if (first !== null) facts.push(["first", `${duration(first)} to the first`, "From sending to the first token"]);
  if (tokens) facts.push(["tokens", `${about}${whole(tokens)} tokens`, "The answer's length"]);
  if (prompt !== null) facts.push(["prompt", `${whole(prompt)} read${cached ? `, ${whole(cached)} from the cache` : ""}`, "The conversation's length in tokens, and how many of them were in the KV cache already"]);
  if (message.state === "stopped") facts.push(["state", "Stopped", "You stopped this answer"]);
  if (message.finish_reason === "length") facts.push(["finish", "Cut off: no room for more tokens", "It reached the most tokens, or the end of the context"]);
  return facts;
}

function copyButton(text) {
  const button = iconButton("copy", "Copy", () => copyText(text(), button));
  return button;
}
