// Sets the chosen theme before anything is painted; without a choice the system's holds.
"use strict";
try {
  const chosen = localStorage.getItem("pymllm.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // The browser keeps nothing for this page: the system's theme it is.
}
