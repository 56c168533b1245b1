/** Errors of this module. Each message is one sentence: what is wrong, where, and what to do. */

/** A model, a picture or an argument cannot be used. */
export class BinaryViTError extends Error {
  name = "BinaryViTError";
}

/** A model that only PyTorch computes. The message names what is not supported. */
export class UnsupportedModelError extends BinaryViTError {
  name = "UnsupportedModelError";
}

/** Part of a message: a value as text, shortened. */
export function quote(value) {
  return shorten(asText(value), 300);
}

function asText(value) {
  if (typeof value === "string") return `'${value}'`;
  if (Array.isArray(value)) return `[${value.map(asText).join(", ")}]`;
  if (value !== null && typeof value === "object" && Object.getPrototypeOf(value) === null)
    return `{${Object.entries(value)
      .map(([name, each]) => `'${name}': ${asText(each)}`)
      .join(", ")}}`;
  return String(value);
}

/** The first line of a text, at most `length` characters long. */
export function shorten(text, length) {
  const line = text.replace(/[\u0000-\u001f\u007f-\u009f]+/g, " ").trim();
  return line.length <= length ? line : `${line.slice(0, length / 2)} … ${line.slice(-length / 2)}`;
}

/** The message of any error, as the end of a sentence: without a full stop. */
export function messageOf(error) {
  return shorten(String(error?.message || error), 300).replace(/\.$/, "");
}
