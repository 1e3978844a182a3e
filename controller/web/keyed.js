// The few lines that replace a framework: lists kept by key, text changed only where it differs.

const elements = new WeakMap();

/** Makes `parent`'s children match `items`, in order: elements are made, changed, moved or removed by key. */
export const keyed = (parent, items, key, create, update) => {
  const known = elements.get(parent) ?? new Map();
  elements.set(parent, known);
  const wanted = new Set(items.map(key));
  for (const [k, element] of known) {
    if (!wanted.has(k)) {
      element.remove();
      known.delete(k);
    }
  }
  items.forEach((item, index) => {
    const k = key(item);
    let element = known.get(k);
    if (!element) {
      element = create(item);
      known.set(k, element);
    }
    if (parent.children[index] !== element) parent.insertBefore(element, parent.children[index] ?? null);
    update(element, item);
  });
};

/** Sets the text of an element, leaving the document alone where it is the same. */
export const text = (element, value) => {
  const string = String(value);
  if (element.textContent !== string) element.textContent = string;
};

const parts = new WeakMap();

/** The descendant marked `data-part="name"`. */
export const part = (element, name) => {
  if (!parts.has(element)) parts.set(element, new Map());
  const found = parts.get(element);
  if (!found.has(name)) found.set(name, element.querySelector(`[data-part="${name}"]`));
  return found.get(name);
};
