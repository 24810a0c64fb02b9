// Reads markdown into blocks: plain values, which markdown_view.js makes elements of.
// Hostile text costs time in proportion to its length: lines are looked at once, and nesting is bounded.

const MAX_DEPTH = 6;
const FENCE = /^ {0,3}(?:(`{3,})([^`]*)|(~{3,})(.*))$/s;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/s;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +(.*)|$)/s;
const QUOTE = /^ {0,3}> ?(.*)$/s;
const DIVIDER = /^[ :|-]+$/;

/**
 * Return the blocks of a text. Each has a `kind`, and `source`, the lines that it came from:
 * `code` (text, language, open), `heading` (level, text), `rule`, `quote` (blocks), `list` (ordered, start, items: lists of
 * blocks), `table` (head, align, rows: cells' texts) or `paragraph` (text).
 */
export function blocksOf(text, depth = 0) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const begin = at;
    const [block, next] = blockAt(lines, at, depth);
    at = next;
    blocks.push({ ...block, source: lines.slice(begin, at).join("\n") });
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return codeAt(lines, at);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: withoutClosing(heading[2]) }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return listAt(lines, at, depth);
  if (isTable(lines, at)) return tableAt(lines, at);
  let end = at + 1;
  while (end < lines.length && !endsParagraph(lines, end, depth)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

// "## Title ##" is the title alone.
function withoutClosing(text) {
  const title = text.trimEnd();
  let end = title.length;
  while (title[end - 1] === "#") end -= 1;
  return end === 0 || title[end - 1] === " " ? title.slice(0, end).trimEnd() : title;
}

function endsParagraph(lines, at, depth) {
  const line = lines[at];
  if (line.trim() === "" || FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  return depth < MAX_DEPTH && (QUOTE.test(line) || /^ {0,3}(?:[-*+]|1[.)]) +\S/.test(line));
}

function codeAt(lines, at) {
  const [, ticks, after, tildes, behind] = FENCE.exec(lines[at]);
  const fence = ticks ?? tildes;
  const language = (after ?? behind).trim().split(/\s/, 1)[0];
  const indent = leading(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], fence)) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, leading(line))));
  return [{ kind: "code", language, text: text.join("\n"), open: end === lines.length }, Math.min(end + 1, lines.length)];
}

function closes(line, fence) {
  const inner = line.trim();
  return inner.length >= fence.length && inner[0] === fence[0] && inner === fence[0].repeat(inner.length);
}

function quoteAt(lines, at, depth) {
  const inner = [];
  let end = at;
  for (let match; end < lines.length && (match = QUOTE.exec(lines[end])); end += 1) inner.push(match[1]);
  return [{ kind: "quote", blocks: blocksOf(inner.join("\n"), depth + 1) }, end];
}

function listAt(lines, at, depth) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(marker);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || Math.abs(item[1].length - indent.length) > 1 || /\d/.test(item[2]) !== ordered || RULE.test(lines[end])) break;
    const inner = [item[3] ?? ""];
    const width = item[1].length + item[2].length + 1;
    for (end += 1; end < lines.length && belongs(lines, end, item[1].length); end += 1) {
      const line = lines[end];
      inner.push(line.slice(Math.min(width, leading(line))));
    }
    while (inner.length > 1 && inner.at(-1).trim() === "") inner.pop();
    items.push(blocksOf(inner.join("\n"), depth + 1));
    // An empty line between two items does not end their list.
    if (lines[end]?.trim() === "" && ITEM.test(lines[end + 1] ?? "") && !RULE.test(lines[end + 1])) end += 1;
  }
  return [{ kind: "list", ordered, start: ordered ? parseInt(marker, 10) : 1, items }, end];
}

// A line goes on with an item if it is indented more, or an empty line before such a one, or the item's paragraph goes on.
function belongs(lines, at, indent) {
  const line = lines[at];
  if (line.trim() === "") {
    // One empty line; what follows two stands alone.
    const next = lines[at + 1];
    return next !== undefined && next.trim() !== "" && leading(next) > indent + 1;
  }
  if (leading(line) > indent + 1) return true;
  return lines[at - 1].trim() !== "" && !ITEM.test(line) && !endsParagraph(lines, at, 0);
}

function leading(line) {
  return line.length - line.trimStart().length;
}

function isTable(lines, at) {
  return at + 1 < lines.length && lines[at].includes("|") && lines[at + 1].includes("|") && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1]);
}

function tableAt(lines, at) {
  const align = cellsOf(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "right" : "left";
  });
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) rows.push(cellsOf(lines[end]));
  return [{ kind: "table", head: cellsOf(lines[at]), align, rows }, end];
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}
