// Markdown to DOM nodes. Nodes are made one by one and text only ever becomes text, so nothing that a model writes can
// become markup of its own. A text that is still growing is rendered as far as it goes: an open fence is a code block.

const el = (name, ...children) => {
  const node = document.createElement(name);
  node.append(...children);
  return node;
};

const INLINE = new RegExp([
  "(`+)(?<code>[^]*?[^`])\\1(?!`)",
  "\\*\\*(?<strong>\\S(?:[^]*?\\S)?)\\*\\*",
  "(?<![\\w*])\\*(?<em>[^\\s*](?:[^*\\n]*?[^\\s*])?)\\*(?![\\w*])",
  "(?<!\\w)_(?<em2>[^\\s_](?:[^_\\n]*?[^\\s_])?)_(?!\\w)",
  "~~(?<del>\\S(?:[^]*?\\S)?)~~",
  "!?\\[(?<label>[^\\]\\n]*)\\]\\((?<href>[^()\\s]*(?:\\([^()\\s]*\\)[^()\\s]*)*)(?:\\s+\"[^\"]*\")?\\)",
  "(?<url>https?:\\/\\/[^\\s<>()\\[\\]`]*[^\\s<>()\\[\\]`.,;:!?'\"])",
].join("|"), "g");

const link = (href, children) => {
  if (!/^(https?:|mailto:)/i.test(href)) return el("span", ...children);
  const a = el("a", ...children);
  a.href = href;
  a.target = "_blank";
  a.rel = "noopener noreferrer";
  return a;
};

function inline(text, depth = 0) {
  const nodes = [];
  let at = 0;
  for (const match of depth < 6 ? text.matchAll(INLINE) : []) {
    const g = match.groups;
    if (match.index > at) nodes.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const inner = g.strong ?? g.em ?? g.em2 ?? g.del;
    if (g.code !== undefined) nodes.push(el("code", g.code.replace(/^ (.*) $/s, "$1")));
    else if (inner !== undefined) nodes.push(el(g.strong !== undefined ? "strong" : g.del !== undefined ? "del" : "em",
                                                ...inline(inner, depth + 1)));
    else if (g.url) nodes.push(link(g.url, [g.url]));
    else nodes.push(link(g.href, inline(g.label || g.href, depth + 1)));
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function code(text, language) {
  const copy = el("button", "Copy");
  copy.type = "button";
  copy.className = "quiet";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  const bar = el("div", el("span", language || "code"), copy);
  bar.className = "bar";
  const pre = el("pre", el("code", text));
  pre.tabIndex = 0; // long lines scroll, also by keyboard
  const box = el("div", bar, pre);
  box.className = "code";
  return box;
}

const FENCE = /^(\s{0,3})(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s{0,3}([-*_])(?:\s*\1){2,}\s*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const starts = (line) => FENCE.test(line) || ITEM.test(line) || RULE.test(line) || HEADING.test(line)
  || /^\s{0,3}>/.test(line);
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((c) => c.trim().replaceAll("\\|", "|"));

function list(lines, i) {
  const first = ITEM.exec(lines[i]);
  const ordered = /\d/.test(first[2]);
  const node = el(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2], 10) !== 1) node.start = parseInt(first[2], 10);
  const indent = first[1].length;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length < indent || item[1].length > indent + 1 || /\d/.test(item[2]) !== ordered) break;
    const width = lines[i].length - item[3].length;
    const inner = [item[3]];
    for (i += 1; i < lines.length; i += 1) {
      const line = lines[i];
      const deeper = line.length - line.trimStart().length > indent;
      if (line.trim() === "") {
        const next = lines[i + 1] ?? "";
        if (next.trim() === "" || next.length - next.trimStart().length <= indent) break;
        inner.push("");
      } else if (deeper) inner.push(line.slice(Math.min(width, line.length - line.trimStart().length)));
      else if (starts(line)) break;
      else inner.push(line);
    }
    const blocks = render(inner.join("\n"));
    node.append(el("li", ...(blocks[0]?.nodeName === "P" ? [...blocks[0].childNodes, ...blocks.slice(1)] : blocks)));
    while (i < lines.length && lines[i].trim() === "" && ITEM.test(lines[i + 1] ?? "")
           && ITEM.exec(lines[i + 1])[1].length === indent) i += 1;
  }
  return [node, i];
}

// The nodes of a text. Headings are moved so that the highest one is `top`, below the page's own.
export function render(text, top = 2) {
  const highest = Math.min(6, ...[...text.matchAll(/^\s{0,3}(#{1,6})\s/gm)].map((m) => m[1].length));
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const nodes = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (fence) {
      const body = [];
      for (i += 1; i < lines.length && !(lines[i].trim().startsWith(fence[2]) && /^\s*[`~]+\s*$/.test(lines[i])); i += 1) {
        body.push(lines[i].startsWith(fence[1]) ? lines[i].slice(fence[1].length) : lines[i]);
      }
      i += 1;
      nodes.push(code(body.join("\n"), fence[3]));
    } else if (heading) {
      nodes.push(el(`h${Math.min(6, heading[1].length - highest + top)}`, ...inline(heading[2])));
      i += 1;
    } else if (RULE.test(line)) {
      nodes.push(el("hr"));
      i += 1;
    } else if (/^\s{0,3}>/.test(line)) {
      const quoted = [];
      for (; i < lines.length && /^\s{0,3}>/.test(lines[i]); i += 1) quoted.push(lines[i].replace(/^\s{0,3}> ?/, ""));
      nodes.push(el("blockquote", ...render(quoted.join("\n"))));
    } else if (ITEM.test(line)) {
      const [node, next] = list(lines, i);
      nodes.push(node);
      i = Math.max(next, i + 1);
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[i + 1] ?? "")) {
      const table = el("table", el("thead", el("tr", ...cells(line).map((c) => el("th", ...inline(c))))));
      const body = el("tbody");
      for (i += 2; i < lines.length && lines[i].includes("|"); i += 1) {
        body.append(el("tr", ...cells(lines[i]).map((c) => el("td", ...inline(c)))));
      }
      table.append(body);
      const box = el("div", table);
      box.className = "table";
      box.tabIndex = 0;
      nodes.push(box);
    } else if (line.trim() === "") {
      i += 1;
    } else {
      const paragraph = [line];
      for (i += 1; i < lines.length && lines[i].trim() !== "" && !starts(lines[i]); i += 1) paragraph.push(lines[i]);
      const p = el("p");
      paragraph.forEach((part, n) => p.append(...(n ? [el("br")] : []), ...inline(part.trim())));
      nodes.push(p);
    }
  }
  return nodes;
}
