// The conversation: its messages, how the browser keeps them, and how the server is asked to go on.

import { keep, recall } from "./storage.js";

const NAME = "conversation";

/** Return the messages that the browser kept; none where they cannot be read. */
export function recallMessages() {
  const kept = recall(NAME);
  if (kept?.version !== 1 || !Array.isArray(kept.messages)) return [];
  return kept.messages.filter(isMessage).map((message) =>
    // The page was left in the middle of this answer.
    ["waiting", "running"].includes(message.state) ? { ...message, state: "stopped" } : message,
  );
}

function isMessage(message) {
  if (typeof message?.content !== "string") return false;
  if (message.role === "user") return true;
  if (message.role === "tool") return typeof message.tool_call_id === "string";
  return message.role === "assistant" && typeof message.reasoning === "string" && typeof message.times === "object"
    && message.times !== null && Array.isArray(message.tool_calls) && message.tool_calls.every(isCall);
}

function isCall(call) {
  return typeof call?.id === "string" && typeof call.function?.name === "string" && typeof call.function.arguments === "string";
}

/** Keep the messages, and return whether the browser did. */
export function keepMessages(messages) {
  return keep(NAME, messages.length ? { version: 1, messages } : null);
}

/** Return the body that asks for the next answer. */
export function bodyOf(messages, settings, model) {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = { model, messages: [...system, ...messages.map(sentMessage)], stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== null) body[name] = settings[name];
  }
  if (settings.thinking !== "default") body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.tools.length) body.tools = settings.tools;
  return body;
}

// Past thinking is not sent back: templates leave it out, too.
function sentMessage(message) {
  if (message.role === "user") return { role: "user", content: message.content };
  if (message.role === "tool") return { role: "tool", tool_call_id: message.tool_call_id, content: message.content };
  if (!message.tool_calls.length) return { role: "assistant", content: message.content };
  return { role: "assistant", content: message.content || null, tool_calls: message.tool_calls };
}

/** Return the calls of the last answer whose results are missing. */
export function openCalls(messages) {
  let index = messages.length - 1;
  const done = new Set();
  for (; index >= 0 && messages[index].role === "tool"; index -= 1) done.add(messages[index].tool_call_id);
  const answer = messages[index];
  if (answer?.role !== "assistant" || answer.state !== "done") return [];
  return answer.tool_calls.filter((call) => !done.has(call.id));
}
