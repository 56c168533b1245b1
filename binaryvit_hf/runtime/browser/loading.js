/** Reads the files of a model, from a URL or from memory. */

import { WEIGHTS, WEIGHTS_INDEX, namesInIndex } from "./checkpoint.js";
import { BinaryViTError, UnsupportedModelError, messageOf } from "./errors.js";
import { Float, fromValue, isObject, isText, parseJson } from "./json.js";

const [CONFIG, PROCESSOR] = ["config.json", "preprocessor_config.json"];
const NESTED_PROCESSOR = "processor_config.json"; // transformers prefers an image processor in it
const ADAPTER = "adapter_config.json"; // of PEFT, which changes what transformers computes
const MISSING = [404, 410];
const MAY_BE_MISSING = [...MISSING, 401, 403]; // stores may forbid to read what is not there
// Fields that must be floats in config.json; a JavaScript object has no 1.0.
const FLOATS = ["batch_norm_eps", "initializer_range"];

/**
 * Reads a model's files: `config` and `processor` from JSON, `weights` as names and contents.
 *
 * @typedef {Array<[string, Uint8Array]>} WeightFiles
 * @typedef {{ config: () => any, processor: () => any, weights: () => WeightFiles | Promise<WeightFiles> }} ModelFiles
 */

/**
 * The files of a folder. Their contents are read later, except the JSON files.
 *
 * @param {string | URL} folder
 * @returns {Promise<ModelFiles>}
 * @throws {BinaryViTError} The folder has no config.json.
 */
export async function openFolder(folder) {
  const base = asUrl(folder, "a model is a URL, or an object with config, preprocessor and weights.");
  if (!base.pathname.endsWith("/")) base.pathname += "/";
  const urlOf = (name) => {
    const url = new URL(encodeURIComponent(name), base);
    url.search = base.search;
    return url;
  };
  const [config, processor, nested, adapter] = await Promise.all([
    ...[CONFIG, PROCESSOR].map((name) => readUrl(urlOf(name))),
    ...[NESTED_PROCESSOR, ADAPTER].map((name) => readUrl(urlOf(name), MAY_BE_MISSING)),
  ]);
  if (config === null) throw new BinaryViTError(`it has no ${CONFIG}`);
  return {
    config() {
      if (holdsObject(adapter)) throw new UnsupportedModelError(`it has an adapter (${ADAPTER})`);
      return parseFile(config, CONFIG);
    },
    processor() {
      if (holdsObject(nested))
        throw new UnsupportedModelError(`its image processor is in ${NESTED_PROCESSOR}, not in ${PROCESSOR}`);
      if (processor === null) throw new BinaryViTError("there is no such file.");
      return parseFile(processor, PROCESSOR);
    },
    async weights() {
      const single = await readUrl(urlOf(WEIGHTS), MAY_BE_MISSING);
      if (single !== null) return [[WEIGHTS, single]];
      const index = await readUrl(urlOf(WEIGHTS_INDEX), MAY_BE_MISSING);
      if (index === null) {
        await readUrl(urlOf(WEIGHTS)); // says that it is forbidden
        throw new BinaryViTError(`there is no ${WEIGHTS}.`);
      }
      const names = namesInIndex(decodeText(index, WEIGHTS_INDEX));
      return Promise.all(
        names.map(async (name) => {
          const content = await readUrl(urlOf(name));
          if (content === null)
            throw new BinaryViTError(`the file '${name}' is missing, which ${WEIGHTS_INDEX} names.`);
          return [name, content];
        }),
      );
    },
  };
}

/**
 * The files of a model in memory.
 *
 * @param {{ config: any, preprocessor: any, weights: any }} content objects or JSON texts, and the bytes of one file
 *   or of several by name.
 * @returns {ModelFiles}
 * @throws {BinaryViTError} A part is missing or has another type.
 */
export function openContent({ config, preprocessor, weights }) {
  return {
    config() {
      const fields = readGiven(config, CONFIG);
      if (isObject(config) && isObject(fields))
        for (const name of FLOATS) if (typeof fields[name] === "number") fields[name] = new Float(fields[name]);
      return fields;
    },
    processor: () => readGiven(preprocessor, PROCESSOR),
    weights() {
      const single = asBytes(weights);
      if (single !== null) return [[WEIGHTS, single]];
      const files = weights !== null && typeof weights === "object" ? Object.entries(weights) : [];
      /** @type {WeightFiles} */
      const shards = files.map(([name, content]) => [name, asBytes(content)]);
      shards.sort(([a], [b]) => (a < b ? -1 : 1));
      if (!shards.length || shards.some(([, bytes]) => bytes === null))
        throw new BinaryViTError("the weights must be an ArrayBuffer, or ArrayBuffers by file name.");
      return shards;
    },
  };
}

/**
 * The engine as a module.
 *
 * @param {string | URL | BufferSource | WebAssembly.Module} engine
 * @returns {Promise<{ module: WebAssembly.Module, bytes: number | null }>}
 * @throws {BinaryViTError} It cannot be read or compiled.
 */
export async function compileEngine(engine) {
  if (engine instanceof WebAssembly.Module) return { module: engine, bytes: null };
  const given = asBytes(engine);
  const url = given === null ? asUrl(engine, "The engine is a URL, the bytes of binaryvit.wasm, or a module.") : null;
  const bytes = given ?? (await readUrl(url));
  if (bytes === null)
    throw new BinaryViTError(`There is no engine at '${url}': copy binaryvit.wasm there, or give its URL as engine.`);
  try {
    return { module: await WebAssembly.compile(/** @type {BufferSource} */ (bytes)), bytes: bytes.length };
  } catch (error) {
    throw new BinaryViTError(
      `The engine${url === null ? "" : ` '${url}'`} cannot be compiled (${messageOf(error)}): ` +
        "it is damaged, or this browser has no WebAssembly SIMD.",
    );
  }
}

function readGiven(content, name) {
  if (content === undefined) throw new BinaryViTError(`${name} is missing.`);
  if (isText(content)) return parseText(content, name);
  const bytes = asBytes(content);
  if (bytes !== null) return parseFile(bytes, name);
  try {
    return fromValue(content);
  } catch (error) {
    throw new BinaryViTError(`${name} is damaged: ${messageOf(error)}`);
  }
}

const parseFile = (bytes, name) => parseText(decodeText(bytes, name), name);

function parseText(text, name) {
  try {
    return parseJson(text);
  } catch (error) {
    throw new BinaryViTError(`${name} is damaged: ${messageOf(error)}`);
  }
}

function decodeText(bytes, name) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new BinaryViTError(`${name} is damaged: it is no UTF-8 text`);
  }
}

/** Whether a file is there: some servers answer to any name with a page. */
function holdsObject(bytes) {
  try {
    return bytes !== null && isObject(parseFile(bytes, ""));
  } catch {
    return false;
  }
}

/** The bytes of an ArrayBuffer or of a view, or `null` for anything else. */
function asBytes(content) {
  if (content instanceof ArrayBuffer) return new Uint8Array(content);
  if (ArrayBuffer.isView(content)) return new Uint8Array(content.buffer, content.byteOffset, content.byteLength);
  return null;
}

/** A URL, also of a path: of the page in browsers, of a file in node. */
function asUrl(address, kinds) {
  if (!isText(address) && !(address instanceof URL)) throw new BinaryViTError(kinds);
  const node = nodeModule("node:url");
  try {
    if (node !== null && !/^[a-z][a-z0-9+.-]+:/i.test(String(address))) return node.pathToFileURL(String(address));
    return new URL(address, globalThis.location?.href);
  } catch {
    throw new BinaryViTError(`'${address}' is no URL.`);
  }
}

/** A module of node, or `null` in browsers. Bundlers would look for an imported one. */
function nodeModule(name) {
  const { process } = globalThis;
  if (process?.versions?.node && !process.getBuiltinModule)
    throw new BinaryViTError(`Node ${process.versions.node} is too old: use 20.16 or newer, or 22.3 or newer.`);
  return process?.getBuiltinModule?.(name) ?? null;
}

/** The bytes at a URL, or `null` if the server answers with a status that says that there is no such file. */
async function readUrl(url, missing = MISSING) {
  const files = url.protocol === "file:" ? nodeModule("node:fs/promises") : null;
  try {
    if (files !== null) return asBytes(await files.readFile(url));
    const response = await fetch(url, { cache: "no-cache" }); // not weights of today with an older config.json
    if (missing.includes(response.status)) return null;
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
  } catch (error) {
    if (error?.code === "ENOENT") return null;
    throw new BinaryViTError(`The file '${url}' cannot be read (${messageOf(error)}).`);
  }
}
