/**
 * Classifies pictures with a packed BinaryViT, in browsers and in node.
 *
 * ```js
 * import { load } from "./binaryvit.js";
 *
 * const model = await load("https://host/folder");
 * const [best] = await model.classify(image); // { label: "cat", score: 0.98 }
 * ```
 *
 * It computes what `Classifier` of the Python package `binaryvit_runtime` computes from the same files.
 */

export { BinaryViTError, UnsupportedModelError } from "./errors.js";
export { BinaryViTModel, load } from "./model.js";
export { decodePicture } from "./pictures.js";
