// Reads the text format in which servers tell Prometheus their figures.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** Return the samples of a text: `name`, `labels`, `value`. Lines that are none are passed over. */
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line.trim());
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, unescape(value)]));
    samples.push({ name: match[1], labels, value: numberOf(match[3]) });
  }
  return samples;
}

function unescape(value) {
  return value.replace(/\\(.)/g, (_, character) => (character === "n" ? "\n" : character));
}

function numberOf(text) {
  const infinity = { "+Inf": Infinity, "-Inf": -Infinity };
  return infinity[text] ?? Number(text);
}

/** Return the sum of the samples of one name, or null without any. */
export function sumOf(samples, name) {
  const values = samples.filter((sample) => sample.name === name).map((sample) => sample.value);
  return values.length ? values.reduce((sum, value) => sum + value, 0) : null;
}

/** Return the largest of the samples of one name, or null without any. */
export function maxOf(samples, name) {
  const values = samples.filter((sample) => sample.name === name).map((sample) => sample.value);
  return values.length ? Math.max(...values) : null;
}
