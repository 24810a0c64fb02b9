// Shows markdown: each block an element, made anew only if its text has changed, so that a long answer streams smoothly.

import { h, icon } from "./dom.js";
import { spansOf } from "./inline.js";
import { blocksOf } from "./markdown.js";

/** The view of one text that grows. */
export class MarkdownView {
  constructor() {
    this.element = h("div", { class: "markdown", dir: "auto" });
    this.shown = [];
  }

  /** Show this text. */
  update(text) {
    const blocks = blocksOf(text);
    blocks.forEach((block, index) => {
      const before = this.shown[index];
      if (before?.source === block.source && before.kind === block.kind && before.open === block.open) return;
      if (block.kind === "code" && before?.kind === "code" && before.language === block.language) {
        // The element stays, and with it what was selected in it.
        this.element.children[index].querySelector("code").textContent = block.text;
      } else {
        const element = elementOf(block);
        if (before) this.element.children[index].replaceWith(element);
        else this.element.append(element);
      }
      this.shown[index] = block;
    });
    while (this.shown.length > blocks.length) {
      this.shown.pop();
      this.element.lastElementChild.remove();
    }
  }
}

function elementOf(block) {
  switch (block.kind) {
    case "code":
      return codeElement(block);
    case "heading":
      // Answers are below the page's own headings.
      return h(`h${Math.min(6, block.level + 2)}`, {}, ...inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, ...block.blocks.map(elementOf));
    case "list":
      return listElement(block);
    case "table":
      return tableElement(block);
    default:
      return h("p", {}, ...inline(block.text));
  }
}

function codeElement({ language, text }) {
  const code = h("code", {}, text);
  const copy = h("button", { type: "button", class: "quiet-button", onclick: () => copyText(code.textContent, copy) }, icon("copy"), "Copy");
  return h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, language || "text"), copy), h("pre", { tabindex: "0" }, code));
}

function listElement({ ordered, start, items }) {
  const tight = (blocks) => blocks.length === 1 || (blocks.length === 2 && blocks[1].kind === "list");
  const elements = items.map((blocks) =>
    h("li", {}, ...(tight(blocks) && blocks[0]?.kind === "paragraph"
      ? [...inline(blocks[0].text), ...blocks.slice(1).map(elementOf)]
      : blocks.map(elementOf))),
  );
  return h(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null }, ...elements);
}

function tableElement({ head, align, rows }) {
  // Short rows are not filled up: a wide head over many of them would be a huge table made of a short text.
  const cells = (tag, texts) => texts.slice(0, head.length).map((text, index) => h(tag, { class: `to-${align[index] ?? "left"}` }, ...inline(text)));
  return h("div", { class: "scroll" },
    h("table", {},
      h("thead", {}, h("tr", {}, ...cells("th", head))),
      h("tbody", {}, ...rows.map((row) => h("tr", {}, ...cells("td", row))))),
  );
}

const TAGS = { bold: "strong", italic: "em", struck: "s" };

function inline(text) {
  return spansOf(text).map(spanNode);
}

function spanNode(span) {
  if (typeof span === "string") return span;
  if (span.kind === "code") return h("code", {}, span.text);
  if (span.kind === "link") {
    // The address is shown, as a text may say that it leads elsewhere.
    return h("a", { href: span.url, title: span.url, target: "_blank", rel: "noopener noreferrer nofollow" }, span.text);
  }
  return h(TAGS[span.kind], {}, ...span.spans.map(spanNode));
}

/** Copy a text, and say so on the button. */
export async function copyText(text, button) {
  const before = [...button.childNodes];
  button.replaceChildren(icon((await copied(text)) ? "check" : "close"), ...(before.length > 1 ? ["Copied"] : []));
  setTimeout(() => button.replaceChildren(...before), 1500);
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over plain HTTP, from another machine, there is no navigator.clipboard.
    const area = h("textarea", { class: "offscreen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
