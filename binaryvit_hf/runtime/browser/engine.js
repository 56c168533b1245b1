/** Calls `binaryvit.wasm` through the C interface of engine.h. Addresses have 32 bits. */

import { BinaryViTError } from "./errors.js";
import { CHANNELS } from "./processor.js";

const ERROR_BYTES = 500;
const MOST_KEPT = 2 ** 26; // bytes of memory of an instance for preprocessing, which large pictures let grow
const NO_MEMORY = "The engine ran out of memory; use a smaller picture, or close other models.";
// Fields of the struct binaryvit_image_processor: whole numbers, then doubles.
const PROCESSOR_SIDES = [
  ...[
    "resample",
    "shortest_edge",
    "longest_edge",
    "max_height",
    "max_width",
    "height",
    "width",
    "crop_height",
    "crop_width",
  ],
  ...["rescale", "normalize"],
];

const FUNCTIONS = [
  ...["binaryvit_kernels", "binaryvit_create", "binaryvit_classify", "binaryvit_find_attention_size"],
  ...["binaryvit_attention", "binaryvit_preprocessed_size", "binaryvit_pixel_values", "malloc", "free", "_initialize"],
];

/**
 * @param {WebAssembly.Module} module
 * @throws {BinaryViTError} It is not this version's binaryvit.wasm.
 */
export function checkEngine(module) {
  const names = WebAssembly.Module.exports(module).map(({ name }) => name);
  const missing = FUNCTIONS.find((name) => !names.includes(name));
  if (missing !== undefined || WebAssembly.Module.imports(module).length > 0)
    throw new BinaryViTError(
      "The engine is not the binaryvit.wasm of this version: take the file beside binaryvit.js.",
    );
}

/** One instance of the module. After a trap it starts a new one, because the memory of the old one may be damaged. */
export class Engine {
  /** Of the instance, or `null` until it is needed. @type {any} */
  exports = null;

  /** @param {WebAssembly.Module} module */
  constructor(module) {
    this.module = module;
  }

  /**
   * The result of `work`, which gets a `Scratch` of this instance's memory.
   *
   * @template T
   * @param {(scratch: Scratch) => T} work
   * @returns {T}
   * @throws {BinaryViTError} Memory ran out.
   */
  run(work) {
    try {
      if (this.exports === null) {
        this.exports = new WebAssembly.Instance(this.module).exports;
        this.exports._initialize();
      }
      const scratch = new Scratch(this.exports);
      const result = work(scratch);
      scratch.free();
      return result;
    } catch (error) {
      this.exports = null;
      // A trap, or an array that is too large.
      const isMemory = error instanceof WebAssembly.RuntimeError || error instanceof RangeError;
      throw isMemory ? new BinaryViTError(NO_MEMORY) : error;
    }
  }

  /**
   * Channels, height and width of what `preprocess` makes of a picture.
   *
   * @param {import("./processor.js").Processor} processor
   * @param {{ width: number, height: number }} picture
   * @throws {BinaryViTError} A side would have no pixel after resizing.
   */
  outputShape(processor, { width, height }) {
    const shape = this.run((scratch) => {
      const [steps, sides] = [scratch.put(packProcessor(processor)), scratch.allocate(8)];
      const status = scratch.exports.binaryvit_preprocessed_size(steps, height, width, sides, sides + 4);
      return status === 0 ? [CHANNELS, ...scratch.read(Int32Array, sides, 2)] : null;
    });
    if (shape === null)
      throw new BinaryViTError(`a picture of ${width} x ${height} pixels cannot be resized: it is too long or empty.`);
    return shape;
  }

  /**
   * Computes the input of a network from a picture.
   *
   * @param {import("./processor.js").Processor} processor
   * @param {import("./pictures.js").Picture} picture its alpha is dropped.
   * @returns {Float32Array} channels x height x width, of `outputShape`.
   * @throws {BinaryViTError} See `outputShape`, or memory ran out.
   */
  preprocess(processor, picture) {
    const length = this.outputShape(processor, picture).reduce((product, side) => product * side);
    const { data, width, height } = picture;
    const values = this.run((scratch) => {
      const [steps, output] = [scratch.put(packProcessor(processor)), scratch.allocate(4 * length)];
      const input = scratch.put(packPicture(scratch.put(data), width, height, data.length / (width * height)));
      check(scratch.exports.binaryvit_pixel_values(steps, input, output));
      return scratch.read(Float32Array, output, length);
    });
    if (this.exports.memory.buffer.byteLength > MOST_KEPT) this.exports = null;
    return values;
  }
}

/** A backbone with its classifier in the memory of an engine. It is made again when the engine has a new instance. */
export class Network {
  /**
   * @param {Engine} engine
   * @param {import("./architecture.js").Architecture} architecture
   * @param {Map<string, Uint8Array | Float32Array>} tensors of the backbone, by name without prefix.
   * @param {Float32Array} weight of the classifier: labels x channels.
   * @param {Float32Array} bias of the classifier.
   * @throws {BinaryViTError} The engine cannot run the network, or memory ran out.
   */
  constructor(engine, architecture, tensors, weight, bias) {
    this.engine = engine;
    this.architecture = architecture;
    this.tensors = tensors;
    this.weight = weight;
    this.bias = bias;
    engine.run((scratch) => this.place(scratch));
  }

  /** The addresses of model, weight and bias. */
  place(scratch) {
    if (this.home === scratch.exports) return this.addresses;
    const model = createModel(scratch, this.architecture, this.tensors);
    this.addresses = { model, weight: scratch.keep(this.weight), bias: scratch.keep(this.bias) };
    this.home = scratch.exports;
    return this.addresses;
  }

  /**
   * @param {Float32Array} pixelValues channels x height x width.
   * @returns {Float32Array} The logits.
   * @throws {BinaryViTError} Memory ran out.
   */
  logits(pixelValues) {
    return this.engine.run((scratch) => {
      const { model, weight, bias } = this.place(scratch);
      const [images, logits] = [scratch.put(pixelValues), scratch.allocate(this.bias.byteLength)];
      check(scratch.exports.binaryvit_classify(model, images, 1n, 1, weight, bias, this.bias.length, logits));
      return scratch.read(Float32Array, logits, this.bias.length);
    });
  }

  /**
   * The attention probabilities of a layer.
   *
   * @param {Float32Array} pixelValues channels x height x width.
   * @param {number} layer counts through all stages.
   * @returns {{ heads: number, queries: number[], keys: number[], hasClassToken: boolean, values: Float32Array }}
   * @throws {BinaryViTError} Memory ran out.
   */
  attention(pixelValues, layer) {
    return this.engine.run((scratch) => {
      const { model } = this.place(scratch);
      const { exports } = scratch;
      const size = scratch.allocate(28);
      check(exports.binaryvit_find_attention_size(model, layer, size));
      const [heads, queries, keys, ...grids] = scratch.read(Int32Array, size, 7);
      const length = heads * queries * keys;
      const [image, values] = [scratch.put(pixelValues), scratch.allocate(4 * length)];
      check(exports.binaryvit_attention(model, image, layer, values));
      return {
        heads,
        queries: grids.slice(0, 2),
        keys: grids.slice(2),
        hasClassToken: queries > grids[0] * grids[1],
        values: scratch.read(Float32Array, values, length),
      };
    });
  }
}

/** Memory of an instance that is freed at the end of one piece of work. */
class Scratch {
  constructor(exports) {
    this.exports = exports;
    this.addresses = [];
  }

  allocate(bytes) {
    // The C library's malloc takes 32 bits.
    const address = bytes < 2 ** 32 ? this.exports.malloc(bytes) >>> 0 : 0;
    if (address === 0 && bytes > 0) throw new BinaryViTError(NO_MEMORY);
    this.addresses.push(address);
    return address;
  }

  /** A copy of an array in the instance's memory. */
  put(array) {
    const address = this.allocate(array.byteLength);
    const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
    new Uint8Array(this.exports.memory.buffer).set(bytes, address);
    return address;
  }

  /** A copy that is not freed. */
  keep(array) {
    const address = this.put(array);
    this.addresses.pop();
    return address;
  }

  putText(text) {
    return this.put(new TextEncoder().encode(`${text}\0`));
  }

  /** A copy of numbers in the instance's memory: growing the memory detaches views. */
  read(Kind, address, length) {
    return new Kind(this.exports.memory.buffer, address, length).slice();
  }

  readText(address) {
    const bytes = new Uint8Array(this.exports.memory.buffer, address);
    return new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)));
  }

  free() {
    for (const address of this.addresses) this.exports.free(address);
  }
}

function check(status) {
  if (status !== 0) throw new BinaryViTError(NO_MEMORY);
}

function createModel(scratch, { fields, imageSize, patchSize }, tensors) {
  const lists = ["hidden_sizes", "depths", "num_attention_heads", "intermediate_sizes", "sequence_reduction_ratios"];
  const flags = ["use_class_token", "use_stem_norm", "use_layer_scale", "binarize_patch_embeddings"];
  const config = new Int32Array([
    ...imageSize,
    ...patchSize,
    fields.num_channels,
    fields.hidden_sizes.length,
    ...lists.map((name) => scratch.put(Int32Array.from(fields[name]))),
    fields.avg_pool_kernel_sizes.length,
    scratch.put(Int32Array.from(fields.avg_pool_kernel_sizes)),
    ...flags.map((name) => Number(fields[name])),
    0, // batch_norm_eps
  ]);
  new Float32Array(config.buffer)[config.length - 1] = fields.batch_norm_eps.value;
  const named = new DataView(new ArrayBuffer(16 * tensors.size));
  [...tensors].forEach(([name, tensor], index) => {
    named.setUint32(16 * index, scratch.putText(name), true);
    named.setUint32(16 * index + 4, scratch.put(tensor), true);
    named.setBigInt64(16 * index + 8, BigInt(tensor.byteLength), true);
  });
  const error = scratch.allocate(ERROR_BYTES);
  const [settings, entries] = [scratch.put(config), scratch.put(named)];
  const kernels = scratch.putText(scratch.readText(scratch.exports.binaryvit_kernels()).split(" ")[0]);
  const model = scratch.exports.binaryvit_create(kernels, settings, entries, tensors.size, error, ERROR_BYTES);
  if (model !== 0) return model;
  throw new BinaryViTError(`The engine cannot run this model: ${scratch.readText(error)}.`);
}

/** The struct binaryvit_image_processor. */
function packProcessor(processor) {
  const bytes = new DataView(new ArrayBuffer(104));
  PROCESSOR_SIDES.forEach((name, index) => bytes.setInt32(4 * index, Number(processor[name] ?? 0), true));
  [processor.rescale_factor, ...processor.mean, ...processor.std].forEach((number, index) =>
    bytes.setFloat64(48 + 8 * index, number, true),
  );
  return bytes;
}

/** The struct binaryvit_picture. */
function packPicture(pixels, width, height, pixelBytes) {
  const bytes = new DataView(new ArrayBuffer(32));
  bytes.setUint32(0, pixels, true);
  bytes.setBigInt64(8, BigInt(width * pixelBytes), true);
  [height, width, pixelBytes].forEach((number, index) => bytes.setInt32(16 + 4 * index, number, true));
  return bytes;
}
