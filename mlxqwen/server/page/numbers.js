// Numbers as people read them.

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const count = (value, name) => `${whole.format(value)} ${name}${value === 1 ? "" : "s"}`;
export const integer = (value) => whole.format(Math.round(value));
export const figure = (value) => short.format(value);

export function seconds(value) {
  if (value < 60) return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} s`;
  const all = Math.round(value);
  return `${Math.floor(all / 60)} min ${all % 60} s`;
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${short.format(value)} ${units[place]}`;
}

/** One line on a reply: its tokens and speed, the wait for the first one, and its prompt. */
export function replyFigures({ tokens, counted, rate, first, prompt, cached }) {
  const parts = [];
  if (tokens !== undefined) parts.push(count(tokens, "token"));
  else if (counted) parts.push(`about ${count(counted, "token")}`);
  if (rate !== undefined) parts.push(`${figure(rate)} tokens/s`);
  if (first !== undefined) parts.push(`first after ${first < 1 ? `${Math.round(first * 1000)} ms` : seconds(first)}`);
  if (prompt !== undefined) parts.push(`prompt ${integer(prompt)}${cached ? `, ${integer(cached)} cached` : ""}`);
  return parts.join(" · ");
}

/** What `/metrics` says of the server, `rate` from the numbers that were read `elapsed` seconds before. */
export function serverFigures(now, before, elapsed) {
  const said = now.mlxqwen_generated_tokens_total - (before?.mlxqwen_generated_tokens_total ?? NaN);
  const read = now.mlxqwen_prompt_tokens_total;
  const held = now.mlxqwen_cache_bytes + now.mlxqwen_prefix_cache_bytes;
  const known = { running: now.mlxqwen_running_replies, waiting: now.mlxqwen_waiting_replies, rate: said / elapsed };
  const shown = Object.fromEntries(
    Object.entries(known).map(([name, value]) => [name, value >= 0 ? figure(value) : "–"]),
  );
  shown.cached = read > 0 ? `${Math.round((100 * now.mlxqwen_cached_tokens_total) / read)} %` : "–";
  shown.memory = held >= 0 ? bytes(held) : "–";
  return shown;
}
