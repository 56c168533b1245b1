/**
 * Reads JSON as Python's `json` does: whole numbers differ from floats, and NaN and Infinity are numbers. `JSON.parse`
 * makes one number of 224 and 224.0, but a config with the second is damaged.
 *
 * Objects have no prototype. Whole numbers are `number`, beyond 2^53 `bigint`. Floats are `Float`.
 */

const DEEPEST = 400; // brackets within brackets; 100 in the header of safetensors
const SPACE = /[ \t\n\r]*/y;
const TOKEN = /([[\]{}:,"])|(-?(?:0|[1-9]\d*))(\.\d+)?([eE][-+]?\d+)?|(true|false|null|NaN|-?Infinity)/y;
const [QUOTE, BACKSLASH] = [34, 92];
const LONGEST_NUMBER = 4300; // digits, as in Python
const WORDS = { true: true, false: false, null: null };

/** A number that has a fraction or an exponent in its file. It compares like its value. */
export class Float {
  constructor(value) {
    this.value = value;
  }

  valueOf() {
    return this.value;
  }

  toString() {
    return Number.isInteger(this.value) && Math.abs(this.value) < 1e16 ? `${this.value}.0` : String(this.value);
  }
}

export const isWhole = (value) => typeof value === "number" || typeof value === "bigint";
export const isFloat = (value) => value instanceof Float;
export const isNumber = (value) => isWhole(value) || isFloat(value);
export const isText = (value) => typeof value === "string";
export const isFlag = (value) => typeof value === "boolean";
export const isNull = (value) => value === null || value === undefined;
export const isObject = (value) =>
  value !== null && typeof value === "object" && !Array.isArray(value) && !isFloat(value);

/**
 * The value of a JSON text.
 *
 * @param {string} text
 * @param {{ strict?: boolean }} [options] strict: as in the header of safetensors, without NaN, Infinity, halves of
 *   surrogate pairs and names that occur twice.
 * @throws {SyntaxError} It is not JSON.
 */
export function parseJson(text, { strict = false } = {}) {
  const reader = new JsonReader(text, strict);
  const value = reader.value(reader.token(), 0);
  reader.skipSpace();
  if (reader.place < text.length) reader.fail("more text");
  return value;
}

class JsonReader {
  constructor(text, strict) {
    this.text = text;
    this.strict = strict;
    this.place = 0;
  }

  fail(what) {
    throw new SyntaxError(`${what} at character ${this.place}`);
  }

  skipSpace() {
    SPACE.lastIndex = this.place;
    SPACE.exec(this.text);
    this.place = SPACE.lastIndex;
  }

  /** A bracket, colon or comma as `sign`, or anything else as `value`. */
  token() {
    this.skipSpace();
    TOKEN.lastIndex = this.place;
    const found = TOKEN.exec(this.text);
    if (found === null) this.fail(this.place < this.text.length ? "unexpected text" : "the text ends");
    const [all, sign, digits, fraction, exponent, word] = found;
    if (sign === '"') return { value: this.string(), isName: true };
    this.place += all.length;
    if (sign !== undefined) return { sign };
    if (digits !== undefined) return { value: this.number(digits, fraction, exponent) };
    if (word in WORDS) return { value: WORDS[word] };
    if (this.strict) this.fail(`unexpected ${word}`);
    return { value: new Float(Number(word)) };
  }

  string() {
    let end = this.place + 1;
    for (let code; (code = this.text.charCodeAt(end)) !== QUOTE; end += code === BACKSLASH ? 2 : 1)
      if (!(code >= 32)) this.fail("a text without an end");
    const quoted = this.text.slice(this.place, end + 1);
    const value = quoted.includes("\\") ? JSON.parse(quoted) : quoted.slice(1, -1);
    if (this.strict && /\p{Surrogate}/u.test(value)) this.fail("half of a surrogate pair");
    this.place = end + 1;
    return value;
  }

  number(digits, fraction = "", exponent = "") {
    const value = Number(digits + fraction + exponent);
    if (fraction || exponent || (this.strict && digits === "-0")) {
      if (this.strict && !Number.isFinite(value)) this.fail("a number out of range");
      return new Float(value);
    }
    if (digits.length > LONGEST_NUMBER) this.fail("a number with too many digits");
    return Number.isSafeInteger(value) ? value + 0 : BigInt(digits);
  }

  value(token, depth) {
    if (depth > (this.strict ? DEEPEST / 4 : DEEPEST)) this.fail("too many brackets");
    if (token.sign === undefined) return token.value;
    if (token.sign === "[") return this.list(depth);
    if (token.sign === "{") return this.object(depth);
    return this.fail(`unexpected '${token.sign}'`);
  }

  list(depth) {
    const list = [];
    let token = this.token();
    if (token.sign === "]") return list;
    for (;;) {
      list.push(this.value(token, depth + 1));
      if (this.isEnd("]")) return list;
      token = this.token();
    }
  }

  object(depth) {
    const object = Object.create(null);
    let token = this.token();
    if (token.sign === "}") return object;
    for (;;) {
      if (!token.isName) this.fail("a name is missing");
      if (this.strict && token.value in object) this.fail(`'${token.value}' for the second time`);
      if (this.token().sign !== ":") this.fail("a colon is missing");
      object[token.value] = this.value(this.token(), depth + 1);
      if (this.isEnd("}")) return object;
      token = this.token();
    }
  }

  isEnd(bracket) {
    const { sign } = this.token();
    if (sign !== bracket && sign !== ",") this.fail("a comma is missing");
    return sign === bracket;
  }
}

/** A JavaScript value as `parseJson` gives it. Whole numbers become whole numbers: JavaScript has no 1.0. */
export function fromValue(value, depth = 0) {
  if (depth > DEEPEST) throw new SyntaxError("too many brackets");
  if (typeof value === "number") return Number.isSafeInteger(value) ? value + 0 : new Float(value);
  if (value === null || ["string", "boolean", "bigint"].includes(typeof value)) return value;
  if (Array.isArray(value)) return value.map((each) => fromValue(each, depth + 1));
  if (typeof value !== "object") throw new SyntaxError(`a ${typeof value} is no JSON`);
  const object = Object.create(null);
  for (const [name, each] of Object.entries(value)) if (each !== undefined) object[name] = fromValue(each, depth + 1);
  return object;
}

/** Whether two values of `parseJson` are equal as in Python: 1, 1.0 and true are. */
export function areEqual(a, b) {
  if (isNull(a) || isNull(b)) return isNull(a) && isNull(b);
  if (isText(a) || isText(b)) return a === b;
  if (Array.isArray(a) || Array.isArray(b))
    return Array.isArray(a) && Array.isArray(b) && a.length === b.length && a.every((each, i) => areEqual(each, b[i]));
  if (isObject(a) || isObject(b)) {
    if (!isObject(a) || !isObject(b)) return false;
    const names = Object.keys(a);
    return names.length === Object.keys(b).length && names.every((name) => name in b && areEqual(a[name], b[name]));
  }
  const left = isFloat(a) ? a.value : isFlag(a) ? Number(a) : a;
  const right = isFloat(b) ? b.value : isFlag(b) ? Number(b) : b;
  return left == right; // eslint-disable-line eqeqeq -- a bigint and a number of one value are equal
}
