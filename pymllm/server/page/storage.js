// Keeps values in the browser; where it keeps nothing (private windows, full storage), the page goes on without.

/** Return a value that was kept as JSON, or null. */
export function recall(name, store = localStorageOrNull()) {
  try {
    return JSON.parse(store.getItem(`pymllm.${name}`));
  } catch {
    return null;
  }
}

/** Keep a value as JSON, and return whether that worked. null removes it. */
export function keep(name, value, store = localStorageOrNull()) {
  try {
    if (value === null) store.removeItem(`pymllm.${name}`);
    else store.setItem(`pymllm.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Return the storage that lasts as long as the tab, or null. */
export function tabStorage() {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
}

function localStorageOrNull() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}
