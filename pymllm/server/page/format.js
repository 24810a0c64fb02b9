// Writes figures for people.

const UNITS = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];

/** Write a number of bytes with three digits, in powers of 1000 as `pymllm plan` does. */
export function bytes(count) {
  for (const [size, unit] of UNITS) {
    if (count >= size) return `${digits(count / size)} ${unit}`;
  }
  return `${count} B`;
}

/** Write a number with about three digits. */
export function digits(value) {
  const places = value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
}

/** Write a whole number with its thousands apart. */
export function whole(value) {
  return Math.round(value).toLocaleString("en");
}

/** Write a share as a percentage. */
export function percent(share) {
  const value = share * 100;
  return `${value > 0 && value < 1 ? "<1" : Math.round(value)} %`;
}

/** Write a time that is given in milliseconds. */
export function duration(milliseconds) {
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  if (milliseconds < 60000) return `${(milliseconds / 1000).toFixed(milliseconds < 10000 ? 2 : 1)} s`;
  return `${Math.floor(milliseconds / 60000)} min ${Math.round((milliseconds % 60000) / 1000)} s`;
}
