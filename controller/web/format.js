// Numbers as people read them. Used by the console and by the call page.

const scaled = (value, units, step) => {
  let unit = 0;
  while (value >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  const digits = value >= 100 || unit === 0 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
};

/** A rate given in bytes a second, said in bits a second as networks are. */
export const bitrate = (bytesPerSecond) => scaled((bytesPerSecond ?? 0) * 8, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s"], 1000);

/** A count with thousands separated. */
export const count = (value) => Math.round(value ?? 0).toLocaleString("en-GB");

/** Seconds as the two largest units: `4 m 10 s`. */
export const duration = (seconds) => {
  const whole = Math.max(0, Math.round(seconds ?? 0));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} m ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} m`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
};

/** Wall-clock time of Unix milliseconds. */
export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

/** The name inside a TURN REST user name (`expiry:name`); other names as they are. */
export const person = (user) => /^\d{9,}:(.+)$/.exec(user ?? "")?.[1] ?? (user || "—");

/** `1 relay`, `2 relays`. */
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
