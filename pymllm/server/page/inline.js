// Reads the inside of a paragraph into spans: bold, italic, struck, code, links. All else is text, tags too.

const MARKS = [["***", "both"], ["**", "bold"], ["__", "bold"], ["~~", "struck"], ["*", "italic"], ["_", "italic"]];
const MAX_DEPTH = 4;
const ESCAPED = /[\\`*_{}[\]()#+\-.!|~<>]/;
const TARGET = /^(https?:\/\/\w[^\s()<>]{0,2000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,1000})?)\)/;
const BARE = /^https?:\/\/\w[^\s<>"'`]{1,2000}/;

/** Return the spans of a text: texts, and objects with a `kind` (code, bold, italic, struck, link), and `text` or `spans`. */
export function spansOf(text, depth = 0) {
  const spans = [];
  const without = new Set(); // marks that do not close behind here, so that each is searched for once
  let plain = "";
  let at = 0;
  const add = (span, end) => {
    if (plain) spans.push(plain);
    plain = "";
    spans.push(span);
    at = end;
  };
  while (at < text.length) {
    const character = text[at];
    if (character === "\\" && ESCAPED.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (character === "`") {
      const found = codeAt(text, at, without);
      if (found.span) add(found.span, found.end);
      else {
        plain += text.slice(at, found.end);
        at = found.end;
      }
    } else if (character === "[" || character === "h") {
      const found = linkAt(text, at);
      if (found) add(found.span, found.end);
      else {
        plain += character;
        at += 1;
      }
    } else {
      const found = depth < MAX_DEPTH ? markedAt(text, at, without, depth) : null;
      if (found) add(found.span, found.end);
      else {
        plain += character;
        at += 1;
      }
    }
  }
  if (plain) spans.push(plain);
  return spans;
}

function codeAt(text, at, without) {
  let end = at;
  while (text[end] === "`") end += 1;
  const ticks = text.slice(at, end);
  for (let from = end; !without.has(ticks); ) {
    const close = text.indexOf(ticks, from);
    if (close < 0) {
      without.add(ticks);
      break;
    }
    let after = close;
    while (text[after] === "`") after += 1;
    if (after - close === ticks.length) {
      const inner = text.slice(end, close).replaceAll("\n", " ");
      const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
      return { span: { kind: "code", text: padded ? inner.slice(1, -1) : inner }, end: after };
    }
    from = after;
  }
  return { span: null, end };
}

// Only addresses of the web: no other scheme becomes a link.
function linkAt(text, at) {
  if (text[at] === "[") {
    // A label has no other bracket, so that each character belongs to one label at most.
    const next = text.indexOf("[", at + 1);
    const label = text.slice(at + 1, next < 0 ? text.length : next);
    const end = label.indexOf("](http");
    if (end < 1 || label.slice(0, end).includes("]")) return null;
    const url = TARGET.exec(text.slice(at + end + 3, at + end + 3300));
    return url && { span: { kind: "link", text: label.slice(0, end), url: url[1] }, end: at + end + 3 + url[0].length };
  }
  if (at > 0 && /\w/.test(text[at - 1])) return null;
  const bare = BARE.exec(text.slice(at, at + 2010));
  if (!bare) return null;
  // A sentence's end is not the address's.
  let end = bare[0].length;
  while (".,;:!?)]*_~".includes(bare[0][end - 1])) end -= 1;
  const url = bare[0].slice(0, end);
  return { span: { kind: "link", text: url, url }, end: at + url.length };
}

function markedAt(text, at, without, depth) {
  for (const [mark, kind] of MARKS) {
    if (!text.startsWith(mark, at) || without.has(mark)) continue;
    const begin = at + mark.length;
    // A mark opens before a letter; one of underscores does so at a word's edge alone, as in snake_case.
    if (/\s/.test(text[begin] ?? " ") || (mark[0] === "_" && /\w/.test(text[at - 1] ?? ""))) continue;
    const close = closeOf(text, begin, mark);
    if (close < 0) {
      without.add(mark);
      continue;
    }
    const inner = spansOf(text.slice(begin, close), depth + 1);
    const spans = kind === "both" ? [{ kind: "italic", spans: inner }] : inner;
    return { span: { kind: kind === "both" ? "bold" : kind, spans }, end: close + mark.length };
  }
  return null;
}

function closeOf(text, begin, mark) {
  for (let close = text.indexOf(mark, begin + 1); close >= 0; close = text.indexOf(mark, close + 1)) {
    const [before, after] = [text[close - 1], text[close + mark.length] ?? ""];
    if (/\s/.test(before) || before === "\\") continue;
    if (mark[0] === "_" && /\w/.test(after)) continue;
    // A single mark is not half of a double one.
    if (mark.length === 1 && (after === mark || before === mark)) continue;
    return close;
  }
  return -1;
}
