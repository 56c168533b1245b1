/** Classifies pictures with a packed BinaryViT, in browsers and in node. */

/** A model, a picture or an argument cannot be used. The message is one sentence. */
export class BinaryViTError extends Error {}

/** A model that only PyTorch computes. The message names what is not supported. */
export class UnsupportedModelError extends BinaryViTError {}

/** RGB or RGBA, 8 bits each, row by row. Alpha is not premultiplied. */
export interface Picture {
  data: Uint8Array | Uint8ClampedArray;
  width: number;
  height: number;
}

/** What a browser decodes. */
export type EncodedPicture =
  Blob | ImageBitmap | HTMLImageElement | HTMLCanvasElement | OffscreenCanvas | HTMLVideoElement;

/** Content of a model's files: objects, JSON texts or their bytes, and the bytes of one file or of shards by name. */
export interface ModelContent {
  config: string | ArrayBuffer | ArrayBufferView | object;
  preprocessor: string | ArrayBuffer | ArrayBufferView | object;
  weights: ArrayBuffer | ArrayBufferView | Record<string, ArrayBuffer | ArrayBufferView>;
}

export interface LoadOptions {
  /** binaryvit.wasm. Default: the file beside the module. */
  engine?: string | URL | ArrayBuffer | ArrayBufferView | WebAssembly.Module;
  /** The model's name in messages. Default: its URL. */
  name?: string;
}

export interface BackgroundOptions {
  /**
   * The colour to put behind transparent pixels, such as `white` or `#ffcc00`, or `null` to drop transparency.
   * Default: the model's, from its training.
   */
  background?: string | null;
}

export interface ClassifyOptions extends BackgroundOptions {
  /** Number of labels, 5 by default; all labels if the model has fewer. */
  topK?: number;
}

export interface Label {
  label: string;
  score: number;
}

/** The attention probabilities of a layer. The network is binary: a probability is 0 or one value above 0. */
export interface Attention {
  heads: number;
  /** Height and width of the grid of queries. */
  queries: [height: number, width: number];
  /** Height and width of the grid of keys, which are fewer if the layer reduces its tokens. */
  keys: [height: number, width: number];
  /** Whether the class token is the first query and the first key, before the grids. */
  hasClassToken: boolean;
  /** heads x queries x keys, row by row. */
  values: Float32Array;
}

/**
 * Load a packed model with its image processor.
 *
 * @param source the URL of a folder with config.json, preprocessor_config.json and model.safetensors (or its shards
 *   and their index); in node also a path. Or the content of these files.
 * @throws {UnsupportedModelError} Only PyTorch computes this model.
 * @throws {BinaryViTError} There is no such model, or it is damaged. The message says why.
 */
export function load(source: string | URL | ModelContent, options?: LoadOptions): Promise<BinaryViTModel>;

/** Classifies pictures. `load` makes it. */
export class BinaryViTModel {
  private constructor();

  /** The label of each logit. */
  readonly labels: readonly string[];

  /** Channels, height and width of the network's input. */
  readonly imageShape: readonly [channels: number, height: number, width: number];

  /** Sizes of the files in bytes; of the engine `null` if it was given as a module. */
  readonly bytes: { readonly weights: number; readonly engine: number | null };

  /** Layers with attention, of all stages. */
  readonly numLayers: number;

  /**
   * Classify one picture. Several calls may wait at once; files are decoded in turn. Node decodes no files: give it
   * the bytes of a decoder, such as sharp or pngjs.
   *
   * @returns Labels with their scores, best first.
   * @throws {BinaryViTError} The picture cannot be read, an argument is wrong, or the model is disposed.
   */
  classify(image: Picture | EncodedPicture, options?: ClassifyOptions): Promise<Label[]>;

  /**
   * The network's input for a picture: channels x height x width, normalised.
   *
   * @throws {BinaryViTError} It is no picture, an argument is wrong, or the model is disposed.
   */
  preprocess(picture: Picture, options?: BackgroundOptions): Float32Array;

  /**
   * The logits of one image, one for each label.
   *
   * @throws {BinaryViTError} The image has another size, or the model is disposed.
   */
  computeLogits(pixelValues: Float32Array): Float32Array;

  /**
   * What each query of a layer attends to.
   *
   * @param layer from 0 to `numLayers - 1`, through all stages.
   * @throws {BinaryViTError} It is no picture, there is no such layer, an argument is wrong, or the model is disposed.
   */
  attention(picture: Picture, layer: number, options?: BackgroundOptions): Attention;

  /** Free the memory of the model. Calls that wait, and later ones, fail with a `BinaryViTError`. */
  dispose(): void;
}

/**
 * Decode a picture in a browser. EXIF's orientation turns it upright. Colours are not converted.
 *
 * @throws {BinaryViTError} It cannot be decoded, or it is too large.
 */
export function decodePicture(image: EncodedPicture): Promise<Picture>;
