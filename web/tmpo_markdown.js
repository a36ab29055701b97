// The Markdown that this pack's nodes write, as elements: headings, tables, lists, paragraphs, `code` and **bold**.
// Text from a node only ever becomes text. Pictures are named, not loaded.

import { addStyle, element } from "./tmpo_dom.js";

const CSS = `
.tmpo-markdown { padding: 6px 10px; user-select: text; cursor: text; }
.tmpo-markdown > * { margin: 0 0 8px; }
.tmpo-markdown > :last-child { margin-bottom: 0; }
.tmpo-markdown h3 { font-size: 14px; }
.tmpo-markdown table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.tmpo-markdown th { color: var(--descrip-text); font-weight: normal; vertical-align: bottom; }
.tmpo-markdown th, .tmpo-markdown td { padding: 2px 0 2px 10px; text-align: right; border-bottom: 1px solid var(--border-color); }
.tmpo-markdown tr > :first-child { padding-left: 0; text-align: left; }
.tmpo-markdown ul { padding-left: 18px; }
.tmpo-markdown code { padding: 0 3px; border-radius: 3px; background: var(--comfy-input-bg); }
`;

/** A line with `code` and **bold** as elements. An interval such as [+0.1, +0.2] is not broken. */
function inline(tag, text) {
  const made = element(tag);
  for (const part of text.split(/(`[^`]+`|\*\*[^*]+\*\*)/)) {
    if (part.startsWith("`")) made.append(element("code", "", part.slice(1, -1)));
    else if (part.startsWith("**")) made.append(element("strong", "", part.slice(2, -2)));
    else made.append(part.replace(/\[[^\]]*\]/g, (interval) => interval.replaceAll(" ", "\u00a0")));
  }
  return made;
}

function row(tag, line) {
  const made = element("tr");
  const cells = line.replace(/^\||\|$/g, "").split("|");
  made.append(...cells.map((cell) => inline(tag, cell.trim())));
  return made;
}

function table([head, , ...lines]) {
  const made = element("table");
  made.createTHead().append(row("th", head));
  made.createTBody().append(...lines.map((line) => row("td", line)));
  return made;
}

function list(lines) {
  const made = element("ul");
  const boxes = { "[x] ": "\u2713 ", "[ ] ": "\u2717 " };
  made.append(...lines.map((line) => inline("li", line.slice(2).replace(/^\[[x ]\] /, (box) => boxes[box]))));
  return made;
}

function block(text) {
  const lines = text.split("\n");
  if (/^\|.*\n\|[-:| ]+$/m.test(text) && lines.every((line) => line.startsWith("|"))) return table(lines);
  if (lines.every((line) => line.startsWith("- "))) return list(lines);
  const heading = text.match(/^#+ (.*)$/);
  if (heading) return inline("h3", heading[1]);
  return inline("p", text.replace(/!\[([^\]]*)\]\(([^)]*)\)/g, "$1: $2"));
}

/** The elements of a text. Its blocks are separated by empty lines. */
export function markdown(text) {
  const made = element("div", "tmpo-markdown");
  made.append(...text.trim().split(/\n{2,}/).map(block));
  return made;
}

addStyle(CSS);
