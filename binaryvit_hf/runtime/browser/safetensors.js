/** Reads safetensors files, with the checks of the library `safetensors`. */

import { BinaryViTError, messageOf } from "./errors.js";
import { isNull, isObject, isText, isWhole, parseJson } from "./json.js";

const HEADER_START = 8; // bytes before the header: its length
const LONGEST_HEADER = 100_000_000;
// Bits of one element.
const DTYPE_BITS = {
  BOOL: 8,
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  U8: 8,
  I8: 8,
  F8_E5M2: 8,
  F8_E4M3: 8,
  F8_E8M0: 8,
  F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8,
  I16: 16,
  U16: 16,
  F16: 16,
  BF16: 16,
  I32: 32,
  U32: 32,
  F32: 32,
  C64: 64,
  F64: 64,
  I64: 64,
  U64: 64,
};

/**
 * @typedef {{ dtype: string, shape: number[], bytes: Uint8Array }} StoredTensor Its bytes are a view of the file.
 */

/**
 * The tensors of a file by name, and its metadata.
 *
 * @param {Uint8Array} file
 * @param {string} fileName for messages.
 * @returns {{ tensors: Map<string, StoredTensor>, metadata: Object<string, string> }}
 * @throws {BinaryViTError} The file is damaged. The message names the file.
 */
export function readSafetensors(file, fileName) {
  let header = {};
  let start = 0;
  try {
    start = readHeaderLength(file);
    header = readHeader(file.subarray(HEADER_START, start));
    return { tensors: readTensors(header, file.subarray(start)), metadata: readMetadata(header.__metadata__) };
  } catch (error) {
    const cut = isObject(header) ? firstCutTensor(header, file.length - start) : undefined;
    const damage = cut === undefined ? "is damaged" : `is cut off before the end of tensor '${cut}'`;
    throw new BinaryViTError(`'${fileName}' ${damage} (${messageOf(error)}): download it again.`);
  }
}

/** Where the header ends. */
function readHeaderLength(file) {
  if (file.length < HEADER_START) throw new Error("its header is too small");
  const length = new DataView(file.buffer, file.byteOffset).getBigUint64(0, true);
  if (length > LONGEST_HEADER) throw new Error("its header is too large");
  if (HEADER_START + Number(length) > file.length) throw new Error("its header is cut off");
  return HEADER_START + Number(length);
}

function readHeader(bytes) {
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  const header = parseJson(text, { strict: true });
  if (!isObject(header)) throw new Error("its header is no JSON object");
  return header;
}

function readMetadata(metadata) {
  if (isNull(metadata)) return Object.create(null);
  if (!isObject(metadata) || !Object.values(metadata).every(isText))
    throw new Error("its metadata is no text by name");
  return metadata;
}

/** @returns {Map<string, StoredTensor>} */
function readTensors(header, content) {
  const entries = Object.entries(header).filter(([name]) => name !== "__metadata__");
  for (const [name, entry] of entries) checkEntry(name, entry);
  entries.sort(([, a], [, b]) => a.data_offsets[0] - b.data_offsets[0] || a.data_offsets[1] - b.data_offsets[1]);
  const tensors = new Map();
  let end = 0;
  for (const [name, { dtype, shape, data_offsets }] of entries) {
    const [first, last] = data_offsets;
    if (first !== end || last < first) throw new Error(`invalid offset for tensor '${name}'`);
    // BigInt: a product beyond 2^53 would be rounded.
    const bits = shape.reduce((product, side) => product * BigInt(side), BigInt(DTYPE_BITS[dtype]));
    if (bits !== 8n * BigInt(last - first)) throw new Error(`shape, dtype and offsets of tensor '${name}' do not fit`);
    tensors.set(name, { dtype, shape, bytes: content.subarray(first, last) });
    end = last;
  }
  if (end !== content.length) throw new Error("its tensors do not cover the file");
  return tensors;
}

function checkEntry(name, entry) {
  if (!isObject(entry)) throw new Error(`'${name}' is no tensor`);
  const { dtype, shape, data_offsets } = entry;
  if (!isText(dtype) || !Object.hasOwn(DTYPE_BITS, dtype)) throw new Error(`tensor '${name}' has an unknown dtype`);
  if (!areLengths(shape)) throw new Error(`tensor '${name}' has no shape`);
  if (!areLengths(data_offsets) || data_offsets.length !== 2) throw new Error(`tensor '${name}' has no offsets`);
}

const areLengths = (list) =>
  Array.isArray(list) && list.every((each) => isWhole(each) && each >= 0 && Number.isSafeInteger(each));

/** The name of the first tensor that ends after the file does. */
function firstCutTensor(header, length) {
  const ends = Object.entries(header)
    .map(([name, entry]) => [entry?.data_offsets?.[1], name])
    .filter(([end, name]) => name !== "__metadata__" && end > length);
  return ends.sort(([a, nameA], [b, nameB]) => a - b || (nameA < nameB ? -1 : 1))[0]?.[1];
}
