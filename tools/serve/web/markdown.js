// Markdown of answers as DOM nodes. HTML in the text stays text; links lead only to http and https. The time grows with
// the length of the text, whatever is in it, and lists and quotes have a depth of at most MAX_DEPTH.

import { button, element } from "./elements.js";
import { highlighted } from "./highlight.js";

const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}|\t|$)/;
const DELIMITERS = /^[ \t]*[|:-][ \t|:-]*$/;
const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const URL_IN_TEXT = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const URL_IN_ANGLES = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const LINK = /!?\[((?:[^[\]\\]|\\.){0,2000})\]\(([^()\s]{0,1000}(?:\([^()\s]{0,500}\)[^()\s]{0,500}){0,3})(?:\s+"[^"\n]{0,500}")?\)/y;

/** Make `container` show `text`. Blocks that it shows already stay as they are: an answer grows at its end. */
export function showMarkdown(container, text) {
  const wanted = blocksOf(text.split("\n"), 0);
  const shown = container.shownBlocks ?? [];
  let same = 0;
  while (same < wanted.length && shown[same] === wanted[same].source) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of wanted.slice(same)) container.append(block.build());
  container.shownBlocks = wanted.map((block) => block.source);
}

// -- blocks -----------------------------------------------------------------------------------------------------------

/** Return the blocks of some lines: each has a `source`, which decides what `build` returns. */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [end, build] = blockAt(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return blocks;
}

/** Return where the block that begins at a line ends, and a function that builds it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = fenceOf(line);
  if (fence) return codeAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [at + 1, () => headingOf(heading[1].length, line.slice(heading[0].length))];
  if (RULE.test(line)) return [at + 1, () => element("hr")];
  if (depth < MAX_DEPTH && QUOTE.test(line)) {
    const end = endOf(lines, at + 1, (each) => QUOTE.test(each));
    const inner = lines.slice(at, end).map((each) => each.replace(QUOTE, ""));
    return [end, () => element("blockquote", {}, ...built(inner, depth + 1))];
  }
  if (depth < MAX_DEPTH && ITEM.test(line)) return listAt(lines, at, depth);
  if (line.includes("|") && isDelimiterRow(lines[at + 1])) return tableAt(lines, at);
  const end = endOf(lines, at + 1, (each) => each.trim() && !interrupts(each, depth));
  return [end, () => paragraph(lines.slice(at, end))];
}

function endOf(lines, from, goesOn) {
  let end = from;
  while (end < lines.length && goesOn(lines[end])) end += 1;
  return end;
}

/** Return whether a line ends the paragraph before it. */
function interrupts(line, depth) {
  const item = depth < MAX_DEPTH && ITEM.exec(line);
  return (
    fenceOf(line) || HEADING.test(line) || RULE.test(line) || (depth < MAX_DEPTH && QUOTE.test(line)) ||
    (item && item[3] !== "" && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1))
  );
}

function built(lines, depth) {
  return blocksOf(lines, depth).map((block) => block.build());
}

function paragraph(lines) {
  const made = element("p");
  addInline(made, lines.map((line) => line.trimStart()).join("\n").trimEnd(), 0);
  return made;
}

function headingOf(level, text) {
  let end = text.trimEnd();
  while (end.endsWith("#")) end = end.slice(0, -1);
  const made = element("h3", { class: `level-${level}` }); // the page has two levels of its own; a skipped one misleads
  addInline(made, end.trim(), 0);
  return made;
}

/** Return the mark that begins a block of code, and the rest of its line; null if the line begins none. */
function fenceOf(line) {
  const match = FENCE.exec(line);
  const info = match && line.slice(match[0].length);
  return match && !info.includes("`") ? [match[1], info] : null;
}

function codeAt(lines, at, [mark, info]) {
  const isEnd = (line) => {
    const trimmed = line.trim();
    return trimmed.length >= mark.length && [...trimmed].every((letter) => letter === mark[0]);
  };
  const end = endOf(lines, at + 1, (line) => !isEnd(line));
  const language = info.trim().split(/\s/)[0].slice(0, 30);
  return [Math.min(end + 1, lines.length), () => codeBlock(lines.slice(at + 1, end).join("\n"), language)];
}

function codeBlock(code, language) {
  const head = element("div", { class: "code-head" }, element("span", {}, language), button("Copy", "copy-code"));
  return element(
    "div", { class: "code" }, head, element("pre", { tabindex: 0 }, element("code", {}, ...highlighted(code, language))),
  );
}

function listAt(lines, at, depth) {
  const [, , mark] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(mark);
  const kind = mark.at(-1);
  const items = [];
  let [isLoose, end] = [false, at];
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[2].at(-1) !== kind || /\d/.test(item[2]) !== isOrdered || RULE.test(lines[end])) break;
    const inner = item[3].length > 0 && item[3] !== "\t" ? item[0].length : item[1].length + item[2].length + 1;
    const last = endOfItem(lines, end + 1, inner, depth);
    const own = [lines[end].slice(item[0].length), ...lines.slice(end + 1, last).map((line) => dedented(line, inner))];
    items.push(own);
    const next = endOf(lines, last, (line) => !line.trim());
    isLoose ||= own.some((line, number) => !line.trim() && own.slice(number + 1).some((later) => later.trim()));
    if (next > last && next < lines.length && ITEM.test(lines[next])) isLoose = true;
    end = next < lines.length && ITEM.test(lines[next]) ? next : last;
  }
  const first = isOrdered ? parseInt(mark, 10) : 1;
  const start = first === 1 ? undefined : String(first);
  return [
    end,
    () => element(isOrdered ? "ol" : "ul", { start }, ...items.map((own) => listItem(own, isLoose, depth))),
  ];
}

/** Return where the lines of a list's item end: those that are indented, and those that continue its paragraph. */
function endOfItem(lines, from, inner, depth) {
  let end = from;
  for (let at = from; at < lines.length; at += 1) {
    const line = lines[at];
    if (!line.trim()) continue;
    const isIndented = indentOf(line) >= inner;
    const continues = at === end && !ITEM.test(line) && !interrupts(line, depth);
    if (!isIndented && !continues) break;
    end = at + 1;
  }
  return end;
}

function indentOf(line) {
  let columns = 0;
  for (const letter of line) {
    if (letter === " ") columns += 1;
    else if (letter === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

function dedented(line, columns) {
  let [at, column] = [0, 0];
  while (at < line.length && column < columns && (line[at] === " " || line[at] === "\t")) {
    column += line[at] === " " ? 1 : 4 - (column % 4);
    at += 1;
  }
  return line.slice(at);
}

function listItem(lines, isLoose, depth) {
  const nodes = built(lines, depth + 1).flatMap((node) => (!isLoose && node.tagName === "P" ? [...node.childNodes] : [node]));
  return element("li", {}, ...nodes);
}

function isDelimiterRow(line) {
  return line !== undefined && line.includes("-") && line.includes("|") && DELIMITERS.test(line);
}

function tableAt(lines, at) {
  const end = endOf(lines, at + 2, (line) => line.trim() && line.includes("|"));
  return [
    end,
    () => {
      const sides = cellsOf(lines[at + 1]).map((cell) => {
        const trimmed = cell.trim();
        return trimmed.endsWith(":") ? (trimmed.startsWith(":") ? "middle" : "right") : undefined;
      });
      const row = (line, tag) =>
        element(
          "tr", {},
          ...cellsOf(line).slice(0, sides.length).map((cell, column) => {
            const made = element(tag, { class: sides[column] });
            addInline(made, cell.trim(), 0);
            return made;
          }),
        );
      const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
      const table = element("table", {}, element("thead", {}, row(lines[at], "th")), element("tbody", {}, ...body));
      return element("div", { class: "table", tabindex: 0 }, table);
    },
  ];
}

function cellsOf(line) {
  const cells = [""];
  for (let at = 0; at < line.length; at += 1) {
    if (line[at] === "\\" && line[at + 1] === "|") {
      cells[cells.length - 1] += "|";
      at += 1;
    } else if (line[at] === "|") cells.push("");
    else cells[cells.length - 1] += line[at];
  }
  if (!cells[0].trim()) cells.shift();
  if (cells.length && !cells.at(-1).trim()) cells.pop();
  return cells;
}

// -- inside of a block ------------------------------------------------------------------------------------------------

/** Add a text to `parent`, with code, emphasis, links and line breaks. */
function addInline(parent, text, depth) {
  const missing = new Set(); // marks that do not occur any more
  let [at, plain] = [0, 0];
  const add = (node, next) => {
    if (at > plain) parent.append(text.slice(plain, at));
    parent.append(node);
    at = plain = next;
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    at = found.index;
    const part = inlineAt(text, at, missing, depth);
    if (part) add(...part);
    else at += runLength(text, at);
  }
  if (plain < text.length) parent.append(text.slice(plain));
}

/** Return the node for what begins at a special letter, and where it ends; null if the letter is only a letter. */
function inlineAt(text, at, missing, depth) {
  const letter = text[at];
  if (letter === "\n") return [element("br"), at + 1];
  if (letter === "\\") {
    if (text[at + 1] === "\n") return [element("br"), at + 2];
    return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? [document.createTextNode(text[at + 1]), at + 2] : null;
  }
  if (letter === "`") return codeSpan(text, at, missing);
  if (letter === "h") return bareUrl(text, at);
  if (letter === "<") {
    URL_IN_ANGLES.lastIndex = at;
    const match = URL_IN_ANGLES.exec(text);
    return match && [linkTo(match[1], match[1]), at + match[0].length];
  }
  if (letter === "[" || letter === "!") {
    LINK.lastIndex = at;
    const match = LINK.exec(text);
    if (!match || !/^https?:\/\//i.test(match[2])) return null;
    const link = linkTo(match[2]);
    if (depth < MAX_DEPTH) addInline(link, match[1], depth + 1);
    else link.append(match[1]);
    return [link, at + match[0].length];
  }
  return depth < MAX_DEPTH ? emphasis(text, at, missing, depth) : null;
}

function runLength(text, at) {
  let end = at + 1;
  if ("*_~`".includes(text[at])) while (text[end] === text[at]) end += 1;
  return end - at;
}

function codeSpan(text, at, missing) {
  const mark = "`".repeat(runLength(text, at));
  if (missing.has(mark)) return null;
  for (let end = at + mark.length; (end = text.indexOf("`", end)) >= 0; end += runLength(text, end)) {
    if (runLength(text, end) !== mark.length) continue;
    const code = text.slice(at + mark.length, end).replaceAll("\n", " ");
    const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
    return [element("code", {}, isPadded ? code.slice(1, -1) : code), end + mark.length];
  }
  missing.add(mark);
  return null;
}

function bareUrl(text, at) {
  URL_IN_TEXT.lastIndex = at;
  let url = URL_IN_TEXT.exec(text)?.[0] ?? "";
  const isExtra = (letter) => ".,;:!?*_~".includes(letter) || (letter === ")" && !url.includes("(")) || letter === "]";
  while (url && isExtra(url.at(-1))) url = url.slice(0, -1);
  return url.length > "https://".length ? [linkTo(url, url), at + url.length] : null;
}

function linkTo(address, ...children) {
  return element("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, ...children);
}

function emphasis(text, at, missing, depth) {
  const letter = text[at];
  const run = runLength(text, at);
  const sizes = letter === "~" ? [2] : [3, 2, 1];
  for (const size of sizes) {
    if (run < size || (size === 1 && run > 1)) continue;
    const from = at + run;
    if (from >= text.length || /\s/.test(text[from]) || (letter === "_" && isWord(text[at - 1]))) return null;
    const end = closing(text, from, letter, size, missing);
    if (end < 0) continue;
    const inner = element({ 1: "em", 2: letter === "~" ? "del" : "strong", 3: "strong" }[size]);
    addInline(inner, text.slice(at + size, end), depth + 1);
    return [size === 3 ? element("em", {}, inner) : inner, end + size];
  }
  return null;
}

/** Return where the mark of `size` letters that ends an emphasis begins; -1 if there is none. */
function closing(text, from, letter, size, missing) {
  const mark = letter.repeat(size);
  if (missing.has(mark)) return -1;
  for (let end = from; (end = text.indexOf(mark, end)) >= 0; ) {
    const run = runLength(text, end);
    const fits = size === 1 ? run === 1 || run === 3 : run >= size;
    const at = end + (run - size);
    if (fits && !/[\s\\]/.test(text[end - 1]) && !(letter === "_" && isWord(text[end + run]))) return at;
    end += run;
  }
  missing.add(mark);
  return -1;
}

function isWord(letter) {
  return letter !== undefined && /[\p{L}\p{N}]/u.test(letter);
}
