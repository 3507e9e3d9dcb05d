// Markdown as DOM nodes: headings, paragraphs, lists, quotes, tables, code, emphasis. What a model writes is only ever
// text: HTML, links and images in it are shown as they were written.

import { copyButton } from "./copying.js";

const DEEPEST = 8;
const FENCE = /^( {0,3})(`{3,}|~{3,}) *([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6}) (.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const INDENTED = /^(?: {2,}|\t)/;
const TABLE_RULE_CELL = /^:?-+:?$/;
const INLINE = new RegExp(
  [
    /\\(?<escaped>[*_`])/,
    /``(?!`)(?<code2>(?:[^`]|`(?!`))+)``/,
    /`(?<code>[^`]+)`/,
    /\*\*\*(?=\S)(?<both>[^*]+)(?<=\S)\*\*\*/,
    /\*\*(?=\S)(?<strong>(?:[^*]|\*(?!\*))+)(?<=\S)\*\*/,
    /\*(?=[^\s*])(?<em>[^*]+)(?<=\S)\*/,
    /(?<!\w)_(?=[^\s_])(?<em2>[^_]+)(?<=\S)_(?!\w)/,
  ]
    .map((part) => part.source)
    .join("|"),
  "g",
);

/** A function that shows a text in `target`, and of a text that grows makes only its end anew. */
export function markdownView(target) {
  let shown = [];
  return (text) => {
    const blocks = blocksOf(text.split(/\r?\n/));
    const keys = blocks.map(({ kind, lines }) => `${kind}\n${lines.join("\n")}`);
    let same = 0;
    while (same < keys.length && keys[same] === shown[same]) same += 1;
    while (target.childNodes.length > same) target.lastChild.remove();
    for (const block of blocks.slice(same)) target.append(rendered(block, 0));
    shown = keys;
  };
}

function blocksOf(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const kind = kindOf(lines, at);
    const end = ENDS[kind](lines, at);
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return blocks;
}

function kindOf(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && isTableRule(lines[at + 1])) return "table";
  return "paragraph";
}

const ENDS = {
  code(lines, at) {
    const mark = FENCE.exec(lines[at])[2];
    let end = at + 1;
    while (end < lines.length && !isFenceEnd(lines[end], mark)) end += 1;
    return Math.min(end + 1, lines.length);
  },
  heading: (_, at) => at + 1,
  rule: (_, at) => at + 1,
  quote: (lines, at) => endWhile(lines, at, (line) => QUOTE.test(line)),
  table: (lines, at) => endWhile(lines, at, (line) => line.includes("|")),
  paragraph: (lines, at) => endWhile(lines, at, (line, place) => line.trim() !== "" && kindOf(lines, place) === "paragraph"),
  list(lines, at) {
    const first = ITEM.exec(lines[at]);
    return endWhile(lines, at, (line, place) => {
      const item = ITEM.exec(line);
      if (item) return item[1].length > first[1].length || isOrdered(item) === isOrdered(first);
      if (INDENTED.test(line)) return true;
      if (line.trim() !== "") return lines[place - 1].trim() !== "" && kindOf(lines, place) === "paragraph";
      const next = lines[place + 1] ?? "";
      return ITEM.test(next) || (INDENTED.test(next) && next.trim() !== "");
    });
  },
};

function endWhile(lines, at, holds) {
  let end = at + 1;
  while (end < lines.length && holds(lines[end], end)) end += 1;
  return end;
}

const isOrdered = (item) => /\d/.test(item[2]);

function isFenceEnd(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function isTableRule(line) {
  return line !== undefined && line.includes("|") && cells(line).every((cell) => TABLE_RULE_CELL.test(cell));
}

function cells(line) {
  const parts = line.trim().split("|");
  if (parts[0] === "") parts.shift();
  if (parts.at(-1) === "") parts.pop();
  return parts.map((part) => part.trim());
}

function rendered({ kind, lines }, depth) {
  if (kind === "code") return code(lines);
  if (kind === "rule") return document.createElement("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    // The page's own title is the first heading.
    return made(`h${Math.min(marks.length + 1, 6)}`, inline(text.trim()));
  }
  if (kind === "table") return table(lines);
  if (depth < DEEPEST && kind === "quote") {
    const inner = lines.map((line) => line.replace(QUOTE, ""));
    return made("blockquote", blocksOf(inner).map((block) => rendered(block, depth + 1)));
  }
  if (depth < DEEPEST && kind === "list") return list(lines, depth);
  return made("p", inline(lines.join("\n")));
}

function list(lines, depth) {
  const head = ITEM.exec(lines[0]);
  const items = [];
  let offset = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= head[1].length + 1) {
      offset = line.length - item[3].length;
      items.push([item[3]]);
    } else {
      const indent = line.length - line.trimStart().length;
      items.at(-1).push(line.slice(Math.min(indent, offset)));
    }
  }
  const element = made(isOrdered(head) ? "ol" : "ul");
  if (isOrdered(head)) element.start = parseInt(head[2], 10);
  for (const item of items) {
    const parts = blocksOf(item).map((block) => rendered(block, depth + 1));
    // One paragraph, alone or above a list of its own, needs no space around it.
    const first = parts[0]?.tagName === "P" ? [...parts.shift().childNodes] : [];
    element.append(made("li", first.concat(parts)));
  }
  return element;
}

function table([head, , ...rows]) {
  const row = (kind, line) => made("tr", cells(line).map((cell) => made(kind, inline(cell))));
  const body = made("tbody", rows.map((line) => row("td", line)));
  const element = made("div", [made("table", [made("thead", [row("th", head)]), body])]);
  element.className = "wide-content";
  element.tabIndex = 0;
  return element;
}

function code(lines) {
  const [, indent, mark, language] = FENCE.exec(lines[0]);
  const isClosed = lines.length > 1 && isFenceEnd(lines.at(-1), mark);
  const inner = lines.slice(1, isClosed ? -1 : undefined);
  const text = inner.map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line)).join("\n");
  const bar = made("div", [made("span", [language]), copyButton(() => text)]);
  bar.className = "bar";
  const block = made("pre", [made("code", [text])]);
  block.tabIndex = 0;
  const element = made("div", [bar, block]);
  element.className = "code";
  return element;
}

function inline(text) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, found.index));
    at = found.index + found[0].length;
    const { escaped, code2, code: plain, both, strong, em, em2 } = found.groups;
    if (escaped !== undefined) nodes.push(escaped);
    else if (both !== undefined) nodes.push(made("strong", [made("em", inline(both))]));
    else if (strong !== undefined) nodes.push(made("strong", inline(strong)));
    else if (em !== undefined || em2 !== undefined) nodes.push(made("em", inline(em ?? em2)));
    else nodes.push(made("code", [plain ?? code2.trim()]));
  }
  return [...nodes, text.slice(at)].filter((node) => node !== "");
}

function made(tag, children = []) {
  const element = document.createElement(tag);
  for (const child of children) element.append(child);
  return element;
}
