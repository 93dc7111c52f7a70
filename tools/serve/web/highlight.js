// Colours of code: comments, strings, numbers, keywords and names of functions, for languages that models often write.

const words = (text) => new Set(text.split(" "));
const C_COMMENT = String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`;
const HASH_COMMENT = String.raw`#[^\n]*`;
const STRING = String.raw`"(?:[^"\\\n]|\\[^])*"?|'(?:[^'\\\n]|\\[^])*'?`;
const TRIPLE = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)`;
const TEMPLATE = "`(?:[^`\\\\]|\\\\[^])*`?";

const C_WORDS =
  "auto bool break case catch char class const constexpr continue default delete do double else enum extern false " +
  "float for goto if inline int long namespace new noexcept nullptr operator override private protected public " +
  "return short signed sizeof static struct switch template this throw true try typedef typename union unsigned " +
  "using virtual void volatile while";
const JS_WORDS =
  "async await break case catch class const continue default delete do else export extends false finally for from " +
  "function if import in instanceof interface let new null of return static super switch this throw true try type " +
  "typeof undefined var void while yield";

const LANGUAGES = {
  python: [
    HASH_COMMENT, `${TRIPLE}|${STRING}`,
    "and as assert async await break case class continue def del elif else except False finally for from global if " +
    "import in is lambda match None nonlocal not or pass raise return self True try while with yield",
  ],
  javascript: [C_COMMENT, `${STRING}|${TEMPLATE}`, JS_WORDS],
  c: [C_COMMENT, STRING, C_WORDS],
  java: [
    C_COMMENT, STRING,
    C_WORDS + " abstract boolean byte extends final finally implements import instanceof interface null package " +
    "super synchronized throws var",
  ],
  go: [
    C_COMMENT, `${STRING}|${TEMPLATE}`,
    "break case chan const continue default defer else fallthrough false for func go goto if import interface map " +
    "nil package range return select struct switch true type var",
  ],
  rust: [
    C_COMMENT, String.raw`"(?:[^"\\]|\\[^])*"?|'(?:[^'\\\n]|\\.)'`,
    "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move " +
    "mut pub ref return self Self static struct super trait true type unsafe use where while",
  ],
  bash: [
    String.raw`(?<![^\s;])#[^\n]*`, STRING,
    "case do done elif else esac exit export fi for function if in local return set then until while",
  ],
  json: ["(?!)", STRING, "true false null"],
  yaml: [HASH_COMMENT, STRING, "true false null"],
  sql: [
    String.raw`--[^\n]*|\/\*[^]*?(?:\*\/|$)`, STRING,
    "and as asc by case create delete desc distinct drop else end from group having in index inner insert into is " +
    "join left limit not null on or order outer primary right select set table then union update values when where",
  ],
  html: [String.raw`<!--[^]*?(?:-->|$)`, String.raw`"[^"\n]*"`, ""],
  css: [String.raw`\/\*[^]*?(?:\*\/|$)`, STRING, ""],
};
const ALIASES = {
  py: "python", python3: "python", js: "javascript", jsx: "javascript", ts: "javascript", tsx: "javascript",
  typescript: "javascript", "c++": "c", cpp: "c", h: "c", cuda: "c", "c#": "java", csharp: "java", kotlin: "java",
  golang: "go", rs: "rust", sh: "bash", shell: "bash", zsh: "bash", console: "bash", yml: "yaml", toml: "yaml",
  xml: "html", svg: "html",
};
const MOST = 50_000; // letters; longer code stays plain

const compiled = new Map();

function rules(language) {
  const name = Object.hasOwn(ALIASES, language) ? ALIASES[language] : language;
  if (!Object.hasOwn(LANGUAGES, name)) return null;
  if (!compiled.has(name)) {
    const [comment, string, keywords] = LANGUAGES[name];
    const groups = [
      `(?<comment>${comment})`, `(?<string>${string})`, String.raw`(?<number>\b\d[\w.]*)`,
      String.raw`(?<word>[\p{L}_$][\p{L}\p{N}_$]*)(?<call>\s?\()?`,
    ];
    compiled.set(name, {
      pattern: new RegExp(groups.join("|"), "gu"),
      words: words(keywords),
      folds: name === "sql",
      calls: !["json", "yaml", "html", "css"].includes(name),
    });
  }
  return compiled.get(name);
}

/** Return nodes with the text of `code`, in which parts of `language` have classes. */
export function highlighted(code, language) {
  const rule = code.length > MOST ? null : rules(language.toLowerCase());
  if (!rule) return [document.createTextNode(code)];
  const nodes = [];
  let end = 0;
  const add = (from, to, kind) => {
    if (from > end) nodes.push(document.createTextNode(code.slice(end, from)));
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = code.slice(from, to);
    nodes.push(span);
    end = to;
  };
  for (const { index, groups } of code.matchAll(rule.pattern)) {
    const { word, call } = groups;
    const kind = ["comment", "string", "number"].find((name) => groups[name]);
    if (kind) add(index, index + groups[kind].length, kind);
    else if (rule.words.has(rule.folds ? word.toLowerCase() : word)) add(index, index + word.length, "keyword");
    else if (call && rule.calls) add(index, index + word.length, "call");
  }
  if (end < code.length) nodes.push(document.createTextNode(code.slice(end)));
  return nodes;
}
