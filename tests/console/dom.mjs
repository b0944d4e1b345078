// As much of a document as the console needs to be drawn without a browser. It has no layout, no parser and no real events:
// how the page looks and what the keyboard does is tested with a browser.

class Node {
  constructor(nodeType, name) {
    Object.assign(this, { nodeType, localName: name, parentNode: null, childNodes: [], attributes: {}, dataset: {}, listeners: {} });
  }
  get ownerDocument() { return globalThis.document; }
  get isConnected() { return this === document.documentElement || (this.parentNode?.isConnected ?? false); }
  get firstChild() { return this.childNodes[0] ?? null; }
  get nextSibling() { return this.parentNode?.childNodes[this.parentNode.childNodes.indexOf(this) + 1] ?? null; }
  get textContent() { return this.nodeType === 3 ? this.data : this.childNodes.map((node) => node.textContent).join(""); }
  set textContent(text) { this.childNodes = text === "" ? [] : [document.createTextNode(text)]; }
  insertBefore(node, next) {
    node.remove();
    this.childNodes.splice(next ? this.childNodes.indexOf(next) : this.childNodes.length, 0, node);
    node.parentNode = this;
    return node;
  }
  appendChild(node) { return this.insertBefore(node, null); }
  removeChild(node) { node.remove(); }
  remove() {
    this.parentNode?.childNodes.splice(this.parentNode.childNodes.indexOf(this), 1);
    this.parentNode = null;
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  removeAttribute(name) { delete this.attributes[name]; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  removeEventListener(name) { delete this.listeners[name]; }
  focus() {}
  showModal() {}
  querySelector() { return null; }
  /** All elements below of this name. */
  all(name) { return this.childNodes.flatMap((node) => [...(node.localName === name ? [node] : []), ...node.all(name)]); }
  /** Does what a user does, as far as a listener of this element sees it. */
  fire(type, more = {}) {
    const event = { type, target: this, preventDefault() {}, stopPropagation() {}, ...more };
    (this.listeners[type] ?? this.listeners[type[0].toUpperCase() + type.slice(1)]).call(this, event);
  }
}

/** Loads the console at `hash` and gives `{ app, go }`: what is drawn, and a way to another page. `fetch` has to be there. */
export async function open(hash) {
  const root = new Node(1, "html");
  const [app, announcements] = [new Node(1, "div"), new Node(1, "div")];
  app.namespaceURI = "http://www.w3.org/1999/xhtml";
  root.appendChild(app);
  root.appendChild(announcements);
  const moves = [];
  globalThis.document = {
    documentElement: root, title: "", hidden: false, activeElement: null,
    getElementById: (id) => ({ app, announcements })[id] ?? null,
    createElementNS: (_, name) => new Node(1, name),
    createTextNode: (data) => Object.assign(new Node(3), { data: String(data) }),
    addEventListener() {}, removeEventListener() {},
  };
  globalThis.location = { hash };
  globalThis.addEventListener = (type, listener) => { if (type === "hashchange") moves.push(listener); };
  await import("../../console/app.js");
  // Its listeners are there once the first effects have run.
  await until(() => moves.length > 0);
  return { app, go: (next) => { location.hash = next; for (const move of moves) move(); } };
}

/** Waits for what `look` finds. */
export async function until(look) {
  for (let tries = 0; tries < 1000; tries += 1) {
    const found = look();
    if (found) return found;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw new Error(`It did not come: ${look}\n${document.documentElement.textContent.slice(0, 2000)}`);
}
