// Asks for one answer, and gathers its pieces.

import { ApiError, request } from "./api.js";
import { eventsOf } from "./events.js";

/** Return an answer without anything in it. `state`: waiting, running, done, stopped or failed. */
export function emptyAnswer(model) {
  return {
    role: "assistant", model, state: "waiting", content: "", reasoning: "", tool_calls: [],
    finish_reason: null, usage: null, times: {}, pieces: 0, error: null,
  };
}

/**
 * Send the request and gather its answer in `answer`; call `changed` after each piece.
 * Never throws: what went wrong is in the answer.
 */
export async function run(answer, body, signal, changed) {
  const begin = performance.now();
  try {
    const response = await request("v1/chat/completions", { body, signal });
    answer.state = "running";
    let complete = false;
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      add(answer, JSON.parse(data), performance.now() - begin);
      changed();
    }
    if (!complete) throw new ApiError(0, { message: "The connection ended before the answer did." });
    answer.state = "done";
  } catch (error) {
    if (signal.aborted) answer.state = "stopped";
    else {
      answer.state = "failed";
      const { status = 0, param = null, code = null, retryAfter = null } = error;
      const message = error instanceof SyntaxError ? `A piece of the answer is not JSON: ${error.message}` : error.message;
      answer.error = { status, message, param, code, retryAfter };
    }
  }
  answer.times.end = performance.now() - begin;
  changed();
}

function add(answer, chunk, now) {
  if (chunk.error) throw new ApiError(500, chunk.error);
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  if (choice.finish_reason) answer.finish_reason = choice.finish_reason;
  const { content, reasoning_content, reasoning, tool_calls } = choice.delta ?? {};
  const thought = reasoning_content ?? reasoning;
  if (!content && !thought && !tool_calls?.length) return;
  answer.pieces += 1;
  answer.times.first ??= now;
  answer.times.last = now;
  if (thought) answer.reasoning += thought;
  if (content || tool_calls?.length) answer.times.answer ??= now;
  if (content) answer.content += content;
  for (const call of tool_calls ?? []) addCall(answer.tool_calls, call);
}

function addCall(calls, piece) {
  const call = (calls[piece.index ?? calls.length] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
  if (piece.id) call.id = piece.id;
  call.function.name += piece.function?.name ?? "";
  call.function.arguments += piece.function?.arguments ?? "";
}

/**
 * Return the figures of an answer: `first`, milliseconds to its first token; `rate`, tokens a second since; `tokens`;
 * `prompt` and `cached` tokens; `exact`, whether the server has counted. Until it has, a piece counts as a token.
 */
export function figures(answer) {
  const { first, last } = answer.times;
  const usage = answer.usage;
  const tokens = usage?.completion_tokens ?? answer.pieces;
  const rate = tokens > 1 && last > first ? ((tokens - 1) * 1000) / (last - first) : null;
  const prompt = usage?.prompt_tokens ?? null;
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? null;
  return { first: first ?? null, rate, tokens, prompt, cached, exact: Boolean(usage) };
}
