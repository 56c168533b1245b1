/** A model that classifies pictures. */

import { readArchitecture, readLabels } from "./architecture.js";
import { PREFIX, loadTensors } from "./checkpoint.js";
import { readColour } from "./colours.js";
import { Engine, Network, checkEngine } from "./engine.js";
import { BinaryViTError, UnsupportedModelError, messageOf, quote } from "./errors.js";
import { compileEngine, openContent, openFolder } from "./loading.js";
import { checkPicture, decodePicture, hasBytes, putOnBackground } from "./pictures.js";
import { checkImageShape, checkPixelValues, halfWhitePicture, readProcessor } from "./processor.js";

/**
 * Load a packed model with its image processor.
 *
 * @param {string | URL | { config: any, preprocessor: any, weights: any }} source the URL of a folder with
 *   config.json, preprocessor_config.json and model.safetensors (or its shards and their index); in node also a path.
 *   Or the content of these files: objects or JSON texts, and an ArrayBuffer, or ArrayBuffers by file name for shards.
 * @param {object} [options]
 * @param {string | URL | BufferSource | WebAssembly.Module} [options.engine] Default: binaryvit.wasm beside this file.
 * @param {string} [options.name] the model's name in messages. Default: its URL.
 * @returns {Promise<BinaryViTModel>}
 * @throws {UnsupportedModelError} Only PyTorch computes this model. The message names what is not supported.
 * @throws {BinaryViTError} There is no such model, or it is damaged. The message says why.
 */
export async function load(source, { engine = new URL("./binaryvit.wasm", import.meta.url), name } = {}) {
  const called = quote(name ?? (isContent(source) ? "model" : String(source)));
  const { module, bytes } = await compileEngine(engine);
  checkEngine(module);
  const files = isContent(source)
    ? openContent(/** @type {any} */ (source))
    : await named(`The model ${called} cannot be loaded`, called, () => openFolder(/** @type {any} */ (source)));
  const { architecture, labels, toScores } = await named(`The config of ${called} cannot be loaded`, called, () => {
    const config = files.config();
    const found = { architecture: readArchitecture(config), labels: readLabels(config) };
    return { ...found, toScores: scoreFunction(config.problem_type, found.labels.length) };
  });
  // An instance of its own: what a large picture does to its memory does not meet the network.
  const preprocessing = new Engine(module);
  const imageShape = [architecture.numChannels, ...architecture.imageSize];
  const subject = `The image processor of ${called} (preprocessor_config.json) cannot be used`;
  const { processor, background } = await named(subject, called, () => {
    const read = readProcessor(files.processor());
    const picture = halfWhitePicture();
    checkImageShape(preprocessing.outputShape(read.processor, picture), imageShape);
    checkPixelValues(preprocessing.preprocess(read.processor, picture));
    return read;
  });
  return named(`The weights of ${called} cannot be loaded`, called, async () => {
    const weights = await files.weights();
    const tensors = loadTensors(weights, architecture, labels.length);
    const backbone = new Map();
    for (const [tensor, values] of tensors)
      if (tensor.startsWith(PREFIX)) backbone.set(tensor.slice(PREFIX.length), values);
    const weight = /** @type {Float32Array} */ (tensors.get("classifier.weight"));
    const bias = /** @type {Float32Array} */ (tensors.get("classifier.bias"));
    const sizes = { weights: weights.reduce((sum, [, content]) => sum + content.length, 0), engine: bytes };
    return new BinaryViTModel({
      network: new Network(new Engine(module), architecture, backbone, weight, bias),
      numLayers: architecture.fields.depths.reduce((sum, depth) => sum + depth),
      ...{ preprocessing, called, labels, toScores, processor, background, imageShape, bytes: sizes },
    });
  });
}

const isContent = (source) => source !== null && typeof source === "object" && !(source instanceof URL);

/** Classifies pictures. `load` makes it. */
export class BinaryViTModel {
  #parts;

  constructor(parts) {
    this.#parts = parts;
    /** The label of each logit. @type {string[]} */
    this.labels = [...parts.labels];
    /** Channels, height and width of the network's input. @type {number[]} */
    this.imageShape = [...parts.imageShape];
    /** Sizes of the files in bytes; of the engine `null` if it was given as a module. */
    this.bytes = { ...parts.bytes };
    /** Layers with attention, of all stages. @type {number} */
    this.numLayers = parts.numLayers;
  }

  /**
   * Classify one picture. Several calls may wait at once; files are decoded in turn.
   *
   * @param {Blob | ImageBitmap | HTMLImageElement | HTMLCanvasElement | OffscreenCanvas | ImageData
   *   | import("./pictures.js").Picture} image In node only `{ data, width, height }`, the bytes of a decoder.
   * @param {object} [options]
   * @param {number} [options.topK] number of labels; all labels if the model has fewer.
   * @param {string | null} [options.background] the colour to put behind transparent pixels, such as `white` or
   *   `#ffcc00`, or `null` to drop transparency. Default: the model's, from its training.
   * @returns {Promise<Array<{ label: string, score: number }>>} Best first.
   * @throws {BinaryViTError} The picture cannot be read, an argument is wrong, or the model is disposed.
   */
  async classify(image, { topK = 5, background } = {}) {
    if (!Number.isSafeInteger(topK) || topK < 1)
      throw new BinaryViTError(`topK is the number of labels, 1 or more, not ${quote(topK)}.`);
    const colour = this.#background(background);
    const logits = await this.#logitsOf(image, colour);
    if (!logits.every(Number.isFinite))
      throw new BinaryViTError(
        `The logits of the model ${this.#alive().called} are not finite: it is damaged, or its training diverged.`,
      );
    const scores = this.#alive().toScores(logits);
    const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
    return order.slice(0, topK).map((index) => ({ label: this.labels[index], score: scores[index] }));
  }

  /**
   * The network's input for a picture: channels x height x width, normalised.
   *
   * @param {import("./pictures.js").Picture | ImageData} picture `decodePicture` makes one from a file.
   * @param {{ background?: string | null }} [options] see `classify`.
   * @returns {Float32Array}
   * @throws {BinaryViTError} It is no picture, an argument is wrong, or the model is disposed.
   */
  preprocess(picture, { background } = {}) {
    return this.#pixelValues(picture, this.#background(background));
  }

  /**
   * The logits of one image.
   *
   * @param {Float32Array} pixelValues from `preprocess`.
   * @returns {Float32Array} One for each label.
   * @throws {BinaryViTError} The image has another size, or the model is disposed.
   */
  computeLogits(pixelValues) {
    const { network, imageShape } = this.#alive();
    const length = imageShape.reduce((product, side) => product * side);
    if (!(pixelValues instanceof Float32Array) || pixelValues.length !== length)
      throw new BinaryViTError(`An image must be a Float32Array of ${length} numbers, (${imageShape.join(", ")}).`);
    return network.logits(pixelValues);
  }

  /**
   * What each query of a layer attends to. The network is binary: a probability is 0 or one value above 0.
   *
   * @param {import("./pictures.js").Picture | ImageData} picture `decodePicture` makes one from a file.
   * @param {number} layer from 0 to `numLayers - 1`, through all stages.
   * @param {{ background?: string | null }} [options] see `classify`.
   * @returns {{ heads: number, queries: number[], keys: number[], hasClassToken: boolean, values: Float32Array }}
   *   Heights and widths of the grids of queries and keys, and the probabilities: heads x queries x keys, row by row.
   *   If the network has a class token, it is the first query and the first key, before the grids.
   * @throws {BinaryViTError} It is no picture, there is no such layer, an argument is wrong, or the model is disposed.
   */
  attention(picture, layer, { background } = {}) {
    const { network } = this.#alive();
    if (!Number.isSafeInteger(layer) || layer < 0 || layer >= this.numLayers)
      throw new BinaryViTError(`layer must be a whole number from 0 to ${this.numLayers - 1}, not ${quote(layer)}.`);
    return network.attention(this.#pixelValues(picture, this.#background(background)), layer);
  }

  /** Free the memory of the model. Calls that wait, and later ones, fail with a `BinaryViTError`. */
  dispose() {
    this.#parts = null;
  }

  #alive() {
    if (this.#parts === null) throw new BinaryViTError("The model is disposed: load it again.");
    return this.#parts;
  }

  #background(background) {
    if (background === undefined) return this.#alive().background;
    const colour = background === null ? null : readColour(background);
    if (background !== null && colour === null)
      throw new BinaryViTError(
        `background must be null or an opaque colour such as white or '#ffcc00', not ${quote(background)}.`,
      );
    return colour;
  }

  async #logitsOf(image, background) {
    const compute = (picture) => this.computeLogits(this.#pixelValues(picture, background));
    if (hasBytes(image)) return compute(image);
    const decode = () => decodePicture(/** @type {any} */ (image)).then(compute);
    // A file can wait for its turn; a canvas or a video shows something else by then.
    return image instanceof Blob ? inTurn(decode) : decode();
  }

  #pixelValues(image, background) {
    const { preprocessing, processor, imageShape } = this.#alive();
    if (!hasBytes(image))
      throw new BinaryViTError("A picture must be { data, width, height }: decodePicture makes one.");
    const picture = checkPicture(image);
    try {
      const shape = preprocessing.outputShape(processor, picture);
      if (String(shape) !== String(imageShape))
        throw new BinaryViTError(`its image has the shape (${shape.join(", ")}), not (${imageShape.join(", ")}).`);
      return preprocessing.preprocess(processor, background === null ? picture : putOnBackground(picture, background));
    } catch (error) {
      throw new BinaryViTError(`The picture cannot be classified: ${messageOf(error)}.`);
    }
  }
}

let lastTurn = Promise.resolve();

/** The result of `work`, which starts when earlier work has ended: decoded photos are large. */
function inTurn(work) {
  const result = lastTurn.then(work);
  lastTurn = result.then(() => {}, () => {});
  return result;
}

/**
 * The result of `work`. Its errors get the model's name.
 *
 * @throws {UnsupportedModelError}
 * @throws {BinaryViTError} `subject: message`.
 */
async function named(subject, called, work) {
  try {
    return await work();
  } catch (error) {
    if (error instanceof UnsupportedModelError)
      throw new UnsupportedModelError(`The model ${called} needs PyTorch: ${messageOf(error)}.`);
    if (error instanceof BinaryViTError) throw new BinaryViTError(`${subject}: ${error.message.replace(/\.$/, "")}.`);
    throw error;
  }
}

/** Logits to scores, as the pipeline of transformers chooses. */
function scoreFunction(problemType, numLabels) {
  if (problemType === "regression") return (logits) => logits;
  return problemType === "multi_label_classification" || numLabels === 1 ? sigmoid : softmax;
}

const sigmoid = (logits) => logits.map((logit) => 1 / (1 + Math.exp(-logit)));

function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const exponentials = logits.map((logit) => Math.exp(logit - most));
  const total = exponentials.reduce((sum, each) => sum + each);
  return exponentials.map((each) => each / total);
}
