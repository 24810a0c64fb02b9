// Starts the page: its views, the theme, the models, the key.

import { forgetKey, get, hasKey, onKeyNeeded } from "./api.js";
import { startChat } from "./chat.js";
import { byId, h } from "./dom.js";
import { bytes } from "./format.js";
import { askForKey } from "./key_dialog.js";
import { showAnswer, startLive } from "./live.js";
import { fetchPlan, showPlan, startPlan, summaryOf } from "./plan.js";
import { keep, recall } from "./storage.js";

const VIEWS = ["chat", "plan", "live"];

function showView() {
  const asked = location.hash.slice(1);
  const view = VIEWS.includes(asked) ? asked : "chat";
  for (const name of VIEWS) {
    byId(name).hidden = name !== view;
    const link = byId(`${name}-link`);
    if (name === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = view;
  document.title = view === "chat" ? "pymllm" : `${byId(`${view}-link`).textContent} · pymllm`;
  if (view === "plan") showPlan();
  // Each view begins at its top, but a conversation goes on at its end.
  window.scrollTo(0, view === "chat" ? document.documentElement.scrollHeight : 0);
}

function startTheme() {
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try {
      // As theme.js reads it.
      localStorage.setItem("pymllm.theme", root.dataset.theme);
    } catch {
      // It holds as long as the page does.
    }
  });
}

function startSettingsPanel() {
  const panel = byId("settings");
  const button = byId("settings-button");
  const toggle = (open) => {
    panel.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    (open ? panel.querySelector("textarea") : button).focus();
  };
  button.addEventListener("click", () => toggle(panel.hidden));
  byId("settings-close").addEventListener("click", () => toggle(false));
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") toggle(false);
  });
}

function startKey() {
  onKeyNeeded(async (refused) => {
    const key = await askForKey(refused);
    byId("forget-key").hidden = key === null && !hasKey();
    return key;
  });
  byId("forget-key").hidden = !hasKey();
  byId("forget-key").addEventListener("click", () => {
    forgetKey();
    location.reload();
  });
}

async function showModels() {
  const select = byId("model");
  try {
    const { data } = await get("v1/models");
    const kept = recall("model");
    select.replaceChildren(...data.map(({ id, parent }) => h("option", { value: id, selected: id === kept }, parent ? `${id} (adapter)` : id)));
    select.hidden = false;
    byId("hello-model").textContent = data[0]?.id ?? "";
    byId("start-error").hidden = true;
  } catch (error) {
    byId("start-error").hidden = false;
    byId("start-error-text").textContent = error.message;
    return;
  }
  try {
    const plan = await fetchPlan({ quiet: true });
    byId("hello-facts").replaceChildren(...[...summaryOf(plan), `${bytes(plan.totals.weight_bytes)} of weights`].map((text) => h("span", {}, text)));
  } catch {
    // Without a plan there is nothing to say; the view of it tells why.
  }
  startLive();
}

startTheme();
startKey();
startSettingsPanel();
startChat(showAnswer);
startPlan();
addEventListener("hashchange", showView);
showView();
byId("model").addEventListener("change", () => keep("model", byId("model").value));
byId("start-again").addEventListener("click", showModels);
showModels();
