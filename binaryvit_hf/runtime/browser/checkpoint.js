/** Reads a packed checkpoint, with all checks of `checkpoint.py`. `quantization_binaryvit.py` describes the files. */

import { listTensors } from "./architecture.js";
import { BinaryViTError, UnsupportedModelError, messageOf, quote } from "./errors.js";
import { areEqual, isObject, isText, parseJson } from "./json.js";
import { readSafetensors } from "./safetensors.js";

const FORMATS = ["1", "2"];
// Modules whose tensors a file stores together, and the names of the two tensors that hold them.
const MODULES = /^(embeddings|norm|stages\.\d+\.(?:patch_embeddings|layers\.\d+))\./;
const JOINED_FLOATS = "floats";
const JOINED_BYTES = "bytes";
const BYTES_OF = { float32: 4, float16: 2, uint8: 1, int64: 8 };
const TORCH_NAMES = { F32: "torch.float32", F16: "torch.float16", U8: "torch.uint8", I64: "torch.int64" };
const NUMPY_NAMES = { F32: "float32", F16: "float16", U8: "uint8", I64: "int64" };
const SAFETENSORS_NAMES = { uint8: "U8", int64: "I64" };

/** Of the backbone's tensors in a classifier. */
export const PREFIX = "binaryvit.";
export const WEIGHTS = "model.safetensors";
export const WEIGHTS_INDEX = "model.safetensors.index.json";

/** @typedef {import("./safetensors.js").StoredTensor & { file: string }} CheckpointTensor */

/**
 * The tensors of a packed classifier by name: bits as `Uint8Array`, floats as `Float32Array`. They are copies.
 *
 * @param {Array<[string, Uint8Array]>} files name and content of each file.
 * @param {import("./architecture.js").Architecture} architecture
 * @param {number} numLabels
 * @returns {Map<string, Uint8Array | Float32Array>}
 * @throws {BinaryViTError} A file is damaged, or tensors and config were not saved together, or do not fit each other.
 */
export function loadTensors(files, architecture, numLabels) {
  const checkpoint = readCheckpoint(files);
  checkSavedConfig(checkpoint, architecture);
  const found = splitTensors(checkpoint, architecture);
  checkTensors(found, checkpoint, architecture, numLabels);
  checkChecksums(checkpoint);
  const tensors = new Map();
  for (const [name, tensor] of found) {
    if (tensor.dtype === "I64") continue; // counts, which nothing uses
    tensors.set(name, tensor.dtype === "U8" ? tensor.bytes.slice() : readFloats(tensor));
    if (tensor.dtype !== "U8" && !tensors.get(name).every(Number.isFinite))
      throw new BinaryViTError(
        `tensor '${name}' has values that are not finite: it is damaged, or its training diverged.`,
      );
  }
  return tensors;
}

/**
 * The files that an index names.
 *
 * @throws {BinaryViTError} It is no index of weight files.
 */
export function namesInIndex(text) {
  try {
    const names = [...new Set(Object.values(parseJson(text).weight_map))].sort();
    if (!names.length || !names.every((name) => isText(name) && isFileName(name)))
      throw new Error("it names no files of its folder");
    return names;
  } catch (error) {
    throw new BinaryViTError(`${WEIGHTS_INDEX} is damaged (${messageOf(error)}): download it again.`);
  }
}

const isFileName = (name) => !/[/\\]/.test(name) && !["", ".", ".."].includes(name);

function readCheckpoint(files) {
  /** @type {Map<string, CheckpointTensor>} As in the files. */
  const stored = new Map();
  let last;
  for (const [file, content] of files) {
    last = { file, ...readSafetensors(content, file) };
    for (const [name, tensor] of last.tensors) {
      if (!(tensor.dtype in NUMPY_NAMES))
        throw new UnsupportedModelError(`its tensor '${name}' has the dtype ${tensor.dtype}`);
      stored.set(name, { ...tensor, file });
    }
    const format = last.metadata.binaryvit_format;
    if (!FORMATS.includes(format))
      throw new BinaryViTError(
        `'${file}' has the packed format ${quote(format ?? null)}, not '${FORMATS.at(-1)}': ` +
          "download it again, or update binaryvit_hf.",
      );
  }
  const { file, metadata } = last;
  try {
    const hasShapes = metadata.binaryvit_format === "1";
    const config = parseJson(metadata.binaryvit_config ?? "");
    const shapes = parseJson(hasShapes ? (metadata.binaryvit_shapes ?? "") : "{}");
    if (!isObject(config) || !isObject(shapes))
      throw new Error("binaryvit_config and binaryvit_shapes must be objects");
    if (!isText(metadata.binaryvit_crc32)) throw new Error("it has no checksums");
    return { stored, config, shapes: hasShapes ? shapes : null, checksums: metadata.binaryvit_crc32 };
  } catch (error) {
    throw new BinaryViTError(`The metadata of '${file}' is damaged (${messageOf(error)}): download it again.`);
  }
}

function checkSavedConfig(checkpoint, architecture) {
  for (const [field, value] of Object.entries(architecture.fields)) {
    const stored = checkpoint.config[field];
    if (!areEqual(value, stored))
      throw new BinaryViTError(
        `The config has ${field}=${quote(value)}, but the packed weights were saved with ` +
          `${field}=${quote(stored ?? null)}: load the config.json that was saved with them.`,
      );
  }
}

/**
 * The tensors of a checkpoint by the names that they have in a model. They are views.
 *
 * @returns {Map<string, CheckpointTensor>} Without `file` if a tensor is a part of a stored one.
 */
function splitTensors({ stored, shapes }, architecture) {
  if (shapes !== null) return stored; // format 1
  const tensors = new Map(stored);
  for (const [whole, members] of listModules(architecture)) {
    const joined = stored.get(whole);
    if (joined === undefined) continue;
    tensors.delete(whole);
    const parts = members.filter(({ name }) => !stored.has(name));
    const kind = whole.endsWith(JOINED_FLOATS) ? "float32" : "uint8";
    const countElements = ({ name, shape }) =>
      shape.reduce((product, side) => product * side, 1) * (kind === "float32" ? 1 : BYTES_OF[dtypeOf(name)]);
    checkShape(whole, joined, [parts.reduce((sum, part) => sum + countElements(part), 0)]);
    checkDtype(whole, joined, kind);
    let start = 0;
    for (const part of parts) {
      const end = start + countElements(part) * BYTES_OF[NUMPY_NAMES[joined.dtype]];
      const dtype = SAFETENSORS_NAMES[dtypeOf(part.name)] ?? joined.dtype;
      tensors.set(part.name, { dtype, shape: part.shape, bytes: joined.bytes.subarray(start, end) });
      start = end;
    }
  }
  return tensors;
}

/** The backbone's tensors, in the order of their names, by the name of the tensor of a file that holds them. */
function listModules(architecture) {
  const modules = new Map();
  const tensors = listTensors(architecture).sort((a, b) => (a.name < b.name ? -1 : 1));
  for (const { name, shape } of tensors) {
    const whole = `${PREFIX}${MODULES.exec(name)?.[1]}.${dtypeOf(name) === "float32" ? JOINED_FLOATS : JOINED_BYTES}`;
    if (!modules.has(whole)) modules.set(whole, []);
    modules.get(whole).push({ name: PREFIX + name, shape });
  }
  return modules;
}

/** The dtype that a tensor has in a float32 model. */
const dtypeOf = (name) =>
  ({ packed_weight: "uint8", num_batches_tracked: "int64" })[name.slice(name.lastIndexOf(".") + 1)] ?? "float32";

function checkTensors(tensors, { shapes }, architecture, numLabels) {
  const ofBackbone = listTensors(architecture);
  const expected = new Map(ofBackbone.map(({ name, shape }) => [PREFIX + name, shape]));
  expected.set("classifier.weight", [numLabels, architecture.hiddenSizes.at(-1)]).set("classifier.bias", [numLabels]);
  if (![...tensors.keys()].some((name) => name.startsWith("classifier.")))
    throw new BinaryViTError(
      "The packed checkpoint was saved without a classifier, so it gives no labels: train one in PyTorch " +
        "(from_pretrained with num_labels and ignore_mismatched_sizes).",
    );
  for (const [name, shape] of expected) {
    const tensor = tensors.get(name);
    if (tensor === undefined)
      throw new BinaryViTError(`The packed checkpoint lacks the tensor '${name}': download it again.`);
    if (tensor.file === undefined) continue; // `splitTensors` made its shape and dtype
    checkShape(name, tensor, shape);
    checkDtype(name, tensor, dtypeOf(name));
  }
  for (const { name, packedFrom } of shapes === null ? [] : ofBackbone) {
    const stored = shapes[PREFIX + name];
    if (packedFrom !== undefined && !areEqual(stored, packedFrom))
      throw new BinaryViTError(
        `Tensor '${PREFIX + name}' of '${tensors.get(PREFIX + name).file}' was packed from the shape ` +
          `${quote(stored ?? null)}, but the config makes it ${quote(packedFrom)}.`,
      );
  }
  const unexpected = [...tensors.keys()].filter((name) => !expected.has(name)).sort()[0];
  if (unexpected !== undefined) throw new BinaryViTError(`the network of the config has no tensor '${unexpected}'.`);
}

function checkShape(name, tensor, shape) {
  if (!areEqual(tensor.shape, shape))
    throw new BinaryViTError(
      `Tensor '${name}' of '${tensor.file}' has the shape ${describeShape(tensor.shape)}, ` +
        `but the config makes it ${describeShape(shape)}.`,
    );
}

function checkDtype(name, { dtype, file }, kind) {
  if (NUMPY_NAMES[dtype] !== kind && !(kind === "float32" && dtype === "F16"))
    throw new BinaryViTError(
      `Tensor '${name}' of '${file}' has the dtype ${NUMPY_NAMES[dtype]}, but must be ${kind}.`,
    );
}

function checkChecksums({ stored, checksums }) {
  [...stored.keys()].sort().forEach((name, index) => {
    const tensor = stored.get(name);
    if (checksum(tensor) !== checksums.slice(8 * index, 8 * index + 8))
      throw new BinaryViTError(
        `Tensor '${name}' of '${tensor.file}' was changed after saving (its checksum differs): download it again.`,
      );
  });
}

/** CRC-32 of dtype, shape and content, as eight hexadecimal digits. */
function checksum({ dtype, shape, bytes }) {
  const head = new TextEncoder().encode(TORCH_NAMES[dtype] + describeShape(shape));
  return updateCrc32(updateCrc32(0, head), bytes).toString(16).padStart(8, "0");
}

/** A shape as Python writes a tuple. */
export const describeShape = (shape) => (shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(", ")})`);

const CRC32_OF_BYTE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

/** The CRC-32, as of zlib, of what `crc` is the CRC-32 of, followed by these bytes. */
export function updateCrc32(crc, bytes) {
  crc = ~crc;
  for (let i = 0; i < bytes.length; i++) crc = CRC32_OF_BYTE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** @returns {Float32Array} */
function readFloats({ dtype, bytes }) {
  // A copy starts at a multiple of 4, which the view may not.
  const { buffer } = bytes.slice();
  if (dtype === "F32") return new Float32Array(buffer);
  return Float32Array.from(new Uint16Array(buffer), widenHalf);
}

/** The value of a float16 by its bits. */
function widenHalf(bits) {
  const sign = bits >>> 15 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}
