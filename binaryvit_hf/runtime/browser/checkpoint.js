/** Reads a packed checkpoint, with all checks of `checkpoint.py`. */

import { listTensors } from "./architecture.js";
import { BinaryViTError, UnsupportedModelError, messageOf, quote } from "./errors.js";
import { areEqual, isObject, isText, parseJson } from "./json.js";
import { readSafetensors } from "./safetensors.js";

const FORMAT = "1";
const TORCH_NAMES = { F32: "torch.float32", F16: "torch.float16", U8: "torch.uint8", I64: "torch.int64" };
const NUMPY_NAMES = { F32: "float32", F16: "float16", U8: "uint8", I64: "int64" };

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
  checkTensors(checkpoint, architecture, numLabels);
  checkChecksums(checkpoint);
  const tensors = new Map();
  for (const [name, tensor] of checkpoint.tensors) {
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
  /** @type {Map<string, CheckpointTensor>} */
  const tensors = new Map();
  let stored;
  for (const [file, content] of files) {
    stored = { file, ...readSafetensors(content, file) };
    for (const [name, tensor] of stored.tensors) {
      if (!(tensor.dtype in NUMPY_NAMES))
        throw new UnsupportedModelError(`its tensor '${name}' has the dtype ${tensor.dtype}`);
      tensors.set(name, { ...tensor, file });
    }
    const format = stored.metadata.binaryvit_format;
    if (format !== FORMAT)
      throw new BinaryViTError(
        `'${file}' has the packed format ${quote(format ?? null)}, not '${FORMAT}': ` +
          "download it again, or update binaryvit_hf.",
      );
  }
  const { file, metadata } = stored;
  try {
    const config = parseJson(metadata.binaryvit_config ?? "");
    const shapes = parseJson(metadata.binaryvit_shapes ?? "");
    if (!isObject(config) || !isObject(shapes))
      throw new Error("binaryvit_config and binaryvit_shapes must be objects");
    if (!isText(metadata.binaryvit_crc32)) throw new Error("it has no checksums");
    return { tensors, config, shapes, checksums: metadata.binaryvit_crc32 };
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

function checkTensors({ tensors, shapes }, architecture, numLabels) {
  const ofBackbone = listTensors(architecture);
  const expected = new Map(ofBackbone.map(({ name, shape }) => [PREFIX + name, shape]));
  expected.set("classifier.weight", [numLabels, architecture.hiddenSizes.at(-1)]).set("classifier.bias", [numLabels]);
  for (const [name, shape] of expected) {
    const tensor = tensors.get(name);
    if (tensor === undefined)
      throw new BinaryViTError(`The packed checkpoint lacks the tensor '${name}': download it again.`);
    if (!areEqual(tensor.shape, shape))
      throw new BinaryViTError(
        `Tensor '${name}' of '${tensor.file}' has the shape ${describeShape(tensor.shape)}, ` +
          `but the config makes it ${describeShape(shape)}.`,
      );
    checkDtype(name, tensor);
  }
  for (const { name, packedFrom } of ofBackbone) {
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

function checkDtype(name, { dtype, file }) {
  const ending = name.slice(name.lastIndexOf(".") + 1);
  const kind = { packed_weight: "uint8", num_batches_tracked: "int64" }[ending] ?? "float32";
  if (NUMPY_NAMES[dtype] !== kind && !(kind === "float32" && dtype === "F16"))
    throw new BinaryViTError(
      `Tensor '${name}' of '${file}' has the dtype ${NUMPY_NAMES[dtype]}, but must be ${kind}.`,
    );
}

function checkChecksums({ tensors, checksums }) {
  [...tensors.keys()].sort().forEach((name, index) => {
    const tensor = tensors.get(name);
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
