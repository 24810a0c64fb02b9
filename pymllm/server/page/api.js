// Asks the server that this page came from, with the API key where it wants one.

import { keep, recall, tabStorage } from "./storage.js";

let key = recall("key", tabStorage());
let asking = null;
let askForKey = async () => null;

/** An answer that is an error: its HTTP status (0: the server was not reached) and what its body says. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null } = {}, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** Say how the page asks for a key: `ask(refused)` gives a promise of the key, or of null where there is none. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Return whether requests bring a key. */
export function hasKey() {
  return key !== null;
}

/** Forget the key. */
export function forgetKey() {
  key = null;
  keep("key", null, tabStorage());
}

/**
 * Fetch a path of the server, relative to the page, and return the response. Where the key is missing or wrong, ask for it and try again.
 * body: sent as JSON.  quiet: do not ask for a key.
 * Throws ApiError for every status but 2xx, and for a server that is not reached.
 */
export async function request(path, { body, signal, quiet = false } = {}) {
  for (;;) {
    const sent = key;
    const response = await fetchOnce(path, body, signal, sent);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status !== 401 || quiet) throw error;
    // Another request may have been given the key in the meantime.
    if (key === sent && !(await newKey(sent !== null))) throw error;
  }
}

/** Fetch a path and return what its JSON says. */
export async function get(path, options) {
  const response = await request(path, options);
  return response.json();
}

async function fetchOnce(path, body, signal, sent) {
  const headers = {};
  if (sent !== null) headers.Authorization = `Bearer ${sent}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const settings = { method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store", credentials: "omit" };
  if (body !== undefined) settings.body = JSON.stringify(body);
  try {
    return await fetch(new URL(path, document.baseURI), settings);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server cannot be reached. Is it still running?" });
  }
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  let told = {};
  try {
    told = JSON.parse(text).error;
  } catch {
    // A proxy's page, say: its text is all there is.
  }
  const message = typeof told?.message === "string" ? told.message : text.slice(0, 2000) || response.statusText;
  return new ApiError(response.status, { ...told, message }, secondsOf(response.headers.get("Retry-After")));
}

// Retry-After is a number of seconds or a date.
function secondsOf(header) {
  if (header === null) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

// One dialog for all requests that wait for the key.
async function newKey(refused) {
  asking ??= askForKey(refused).finally(() => (asking = null));
  const given = await asking;
  if (given === null) return false;
  key = given;
  keep("key", key, tabStorage());
  return true;
}
