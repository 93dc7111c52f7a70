// Makes DOM nodes. A text becomes a text node, never markup.

/** Return a new element with attributes, and with nodes and texts as its children. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Return a button that does `action` with what it belongs to. */
export function button(label, action, attributes = {}) {
  return element("button", { type: "button", class: "quiet", "data-action": action, ...attributes }, label);
}

/** Show an element or hide it. */
export function show(shown, visible) {
  shown.hidden = !visible;
}
