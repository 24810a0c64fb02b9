// Makes elements. Text goes in as text nodes, never as HTML, so that no answer can be markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element: h("button", { class: "quiet", onclick: stop }, "Stop").
 * Attributes that are null, undefined or false are left out; `on...` are listeners.
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return the element of this id, which index.html has. */
export function byId(id) {
  return document.getElementById(id);
}

// Outlines of 24 x 24.
const ICONS = {
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 13l4 4L19 7",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  retry: "M20 12a8 8 0 1 1-2.4-5.7M20 4v4h-4",
  clear: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  settings: "M4 7h10M18 7h2M14 4v6M4 17h2M10 17h10M8 14v6",
  theme: "M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z",
  close: "M6 6l12 12M18 6L6 18",
  key: "M14 10a4 4 0 1 1-1.2-2.8L21 7v3l-2 1v2h-3v-2z",
  tool: "M14 7a4 4 0 0 0-5.3 5.3L4 17l3 3 4.7-4.7A4 4 0 0 0 17 10l-2.5 2.5-3-3z",
  down: "M6 10l6 6 6-6",
};

/** Make an icon; it says nothing to a screen reader, its button does. */
export function icon(name) {
  const attributes = { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" };
  return svg("svg", attributes, svg("path", { d: ICONS[name] }));
}

/** Make a button that shows an icon alone. */
export function iconButton(name, label, onclick, attributes = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}
