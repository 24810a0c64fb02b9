// Orders the layers of a plan for the eye: by the block that they are in, and by colour.

export const COLOURS = 10;

/** What the picture can be coloured by: a title, and what a layer is called under it. */
export const ASPECTS = {
  method: { title: "Method", of: (layer) => layer.method_detail },
  kernel: { title: "Kernel", of: (layer) => layer.kernel },
  numerics: { title: "Numerics", of: (layer) => layer.numerics },
  kind: { title: "Kind", of: (layer) => layer.kind },
};

/** Return the block that a layer is in: its name up to the first number, or all of it. */
export function blockOf(prefix) {
  const parts = prefix.split(".");
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  return at < 0 ? prefix : parts.slice(0, at + 1).join(".");
}

/** Return the plan's blocks in order: `name`, `layers`, `bytes` of their weights. */
export function blocksOfPlan(layers) {
  const blocks = new Map();
  for (const layer of layers) {
    const name = blockOf(layer.prefix);
    if (!blocks.has(name)) blocks.set(name, { name, layers: [], bytes: 0 });
    const block = blocks.get(name);
    block.layers.push(layer);
    block.bytes += layer.bytes;
  }
  return [...blocks.values()];
}

/**
 * Return how many bytes the width of the picture is. A block of several times the usual size (a large vocabulary, say) would
 * leave nothing to see of the others: it is drawn cut off.
 */
export function widthOf(blocks) {
  const sizes = blocks.map((block) => block.bytes).filter((size) => size > 0).sort((a, b) => a - b);
  if (!sizes.length) return 1;
  const usual = sizes[Math.floor(sizes.length / 2)];
  return sizes.findLast((size) => size <= 2 * usual) ?? sizes.at(-1);
}

/**
 * Return what an aspect tells apart: `name`, `bytes`, `count` of layers and `colour`, the largest first.
 * Those beyond the colours share the last one.
 */
export function groupsOf(layers, aspect) {
  const groups = new Map();
  for (const layer of layers) {
    const name = ASPECTS[aspect].of(layer);
    if (!groups.has(name)) groups.set(name, { name, bytes: 0, count: 0 });
    const group = groups.get(name);
    group.bytes += layer.bytes;
    group.count += 1;
  }
  const sorted = [...groups.values()].sort((a, b) => b.bytes - a.bytes || b.count - a.count);
  return sorted.map((group, index) => ({ ...group, colour: Math.min(index, COLOURS - 1) }));
}

/** Return how many bits a weight of a matrix takes, all that belongs to it counted; null for what is no single matrix. */
export function bitsOf(layer) {
  if (!layer.bytes || !["linear", "lm_head", "embedding"].includes(layer.kind) || layer.shape_local.length !== 2) return null;
  return (layer.bytes * 8) / (layer.shape_local[0] * layer.shape_local[1]);
}
