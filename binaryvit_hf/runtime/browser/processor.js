/** Reads preprocessor_config.json, with the checks of `packed_model.py` and `preprocessing.py`. */

import { readColour } from "./colours.js";
import { BinaryViTError, UnsupportedModelError, quote } from "./errors.js";
import { isFlag, isFloat, isNull, isNumber, isObject, isText, isWhole } from "./json.js";

// Names for which AutoImageProcessor of transformers loads ViTImageProcessor.
const PROCESSOR_TYPES = ["ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil"];
const OWN_CODE = "image_processing_binaryvit.BinaryViTImageProcessor"; // has the outputs of ViTImageProcessor
// The fields that transformers reads, and what it takes if they are absent. `null` is not absent.
const DEFAULTS = {
  do_resize: true,
  size: { height: 224, width: 224 },
  default_to_square: true,
  resample: 2,
  do_center_crop: null,
  crop_size: null,
  do_rescale: true,
  rescale_factor: 1 / 255,
  do_normalize: true,
  image_mean: [0.5, 0.5, 0.5],
  image_std: [0.5, 0.5, 0.5],
  do_pad: null,
  device: null,
  auto_map: null,
};
const SWITCHES = ["do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "default_to_square"];
const RESIZED_SIZES = ["shortest_edge", "longest_edge shortest_edge", "max_height max_width", "height width"];
const RESAMPLES = [2, 3];
export const CHANNELS = 3; // of a picture
const MAX_SIDE = 2 ** 14; // pixels, before the crop
const [MAX_VALUE, MIN_CONTRAST] = [1e4, 1e-3]; // of a normalised picture; without normalisation, values go up to 255

/**
 * The steps from a picture to the input of a network, as `binaryvit_image_processor` of engine.h.
 *
 * @typedef {{ resample?: number, shortest_edge?: number, longest_edge?: number, max_height?: number,
 *   max_width?: number, height?: number, width?: number, crop_height?: number, crop_width?: number, rescale: boolean,
 *   normalize: boolean, rescale_factor: number, mean: number[], std: number[] }} Processor
 */

/**
 * @param {any} fields the content of preprocessor_config.json, from `parseJson`.
 * @returns {{ processor: Processor, background: number[] | null }} background: the colour that the model's training
 *   put behind transparent pixels, in red, green and blue; `null` if transparency is dropped.
 * @throws {UnsupportedModelError} It asks for another processor or step. The message names the field.
 * @throws {BinaryViTError} A number is out of range.
 */
export function readProcessor(fields) {
  if (!isObject(fields)) throw new BinaryViTError("it is not a JSON object.");
  checkSizes(fields);
  for (const field of ["pad_size", "backend"])
    if (!isNull(fields[field]))
      throw new UnsupportedModelError(`its image processor has ${field}=${quote(fields[field])}`);
  if (fields.auto_map === null) throw new BinaryViTError("auto_map must be an object, not null.");
  const processor = readSteps(fields);
  if (isNull(fields.background)) return { processor, background: null };
  const background = readColour(fields.background);
  if (background === null)
    throw new BinaryViTError(
      `background must be an opaque colour such as white or '#ffcc00', not ${quote(fields.background)}.`,
    );
  return { processor, background };
}

/** transformers checks these fields, also if a switch such as do_resize is false. */
function checkSizes(fields) {
  for (const field of ["size", "crop_size", "pad_size"]) {
    const value = fields[field] ?? null;
    const numbers = isObject(value) ? Object.values(value) : Array.isArray(value) ? value : [value];
    const given = numbers.filter((number) => isNumber(number) || isFlag(number)).map(Number);
    if (!given.every((number) => number >= 1 && number <= MAX_SIDE))
      throw new BinaryViTError(`${field} must be from 1 to ${MAX_SIDE}, not ${quote(value)}.`);
    if (!numbers.every((number) => number === null || isWhole(number) || isFlag(number)))
      throw new UnsupportedModelError(`its image processor has ${field}=${quote(value)}`);
  }
}

/** @returns {Processor} */
function readSteps(fields) {
  const kind = fields.image_processor_type ?? null;
  if (!PROCESSOR_TYPES.includes(kind)) throw unsupported("image_processor_type", kind, "ViTImageProcessor");
  const values = { ...DEFAULTS, ...fields };
  for (const name of SWITCHES)
    if (!(values[name] === null || isFlag(values[name]))) throw unsupported(name, values[name], "true or false");
  if (values.do_pad) throw unsupported("do_pad", values.do_pad, "none");
  if (!(values.device === null || values.device === "cpu")) throw unsupported("device", values.device, "none");
  const code = isObject(values.auto_map) ? values.auto_map.AutoImageProcessor : values.auto_map || null;
  if (!isNull(code) && !(isText(code) && code.split("--").at(-1) === OWN_CODE))
    throw unsupported("auto_map", values.auto_map, "none");
  if (!(values.do_rescale || values.do_normalize))
    throw new UnsupportedModelError("do_rescale and do_normalize are both false: the network takes no 8-bit numbers");
  return {
    ...(values.do_resize ? readResizing(values) : {}),
    ...(values.do_center_crop ? readCrop(values.crop_size) : {}),
    rescale: Boolean(values.do_rescale),
    normalize: Boolean(values.do_normalize),
    rescale_factor: values.do_rescale ? readNumber("rescale_factor", values.rescale_factor, false) : 1,
    mean: values.do_normalize ? readNumbers("image_mean", values.image_mean, true) : [0, 0, 0],
    std: values.do_normalize ? readNumbers("image_std", values.image_std, false) : [0, 0, 0],
  };
}

function readResizing({ resample, size, default_to_square: square }) {
  if (!RESAMPLES.includes(resample)) throw unsupported("resample", resample, "2 (bilinear) or 3 (bicubic)");
  const sides = readSides("size", size, square);
  if (!RESIZED_SIZES.includes(Object.keys(sides).sort().join(" ")))
    throw unsupported("size", size, "shortest_edge, max_height and max_width, or height and width");
  return { resample, ...sides };
}

function readCrop(size) {
  const sides = readSides("crop_size", size, true);
  if (Object.keys(sides).sort().join(" ") !== "height width")
    throw unsupported("crop_size", size, "height and width, from 1");
  return { crop_height: sides.height, crop_width: sides.width };
}

/** A size as numbers of pixels by name. One number is a square, or the shortest edge. */
function readSides(name, value, square) {
  let sides = value;
  if (isWhole(value)) sides = square ? { height: value, width: value } : { shortest_edge: value };
  else if (Array.isArray(value) && value.length === 2) sides = { height: value[0], width: value[1] };
  if (!isObject(sides)) throw unsupported(name, value, "numbers of pixels by name");
  const entries = Object.entries(sides).filter(([, length]) => length !== null);
  if (!entries.every(([, length]) => isWhole(length) && length >= 1 && length <= MAX_SIDE))
    throw unsupported(name, value, `numbers of pixels from 1 to ${MAX_SIDE}`);
  return Object.fromEntries(entries);
}

/** One number for each channel, from one or from three. */
function readNumbers(name, value, zero) {
  const items = Array.isArray(value) ? value : [value];
  if (items.length !== 1 && items.length !== CHANNELS) throw unsupported(name, value, "three numbers");
  return Array.from({ length: CHANNELS }, (_, channel) => readNumber(name, items[channel % items.length], zero));
}

function readNumber(name, value, zero) {
  const number = isNumber(value) ? Number(isFloat(value) ? value.value : value) : NaN;
  if (!Number.isFinite(number)) throw unsupported(name, value, "finite numbers");
  if (number === 0 && !zero) throw unsupported(name, value, "numbers other than 0");
  return number;
}

const unsupported = (name, value, supported) =>
  new UnsupportedModelError(
    `${name} is ${quote(value)}, which is not supported without transformers; supported: ${supported}`,
  );

/** An oblong picture that is half black, half white, to try a processor. */
export function halfWhitePicture() {
  const picture = { data: new Uint8Array(96 * 64 * CHANNELS), width: 96, height: 64 };
  picture.data.forEach((_, index) => (picture.data[index] = index % (96 * CHANNELS) < 48 * CHANNELS ? 0 : 255));
  return picture;
}

/** The first six digits of a number. */
const round = (number) => String(Number(number.toPrecision(6)));

/**
 * Check the shape of the images that a processor makes.
 *
 * @param {number[]} shape channels, height, width.
 * @param {number[]} expected of the network's images.
 * @throws {BinaryViTError} They differ.
 */
export function checkImageShape(shape, expected) {
  if (String(shape) !== String(expected))
    throw new BinaryViTError(
      `it makes images of (channels, height, width) (${shape.join(", ")}), ` +
        `the network takes (${expected.join(", ")}).`,
    );
}

/**
 * Check the input that a processor makes of `halfWhitePicture`.
 *
 * @param {Float32Array} values channels x height x width.
 * @throws {BinaryViTError} Black and white do not become different finite numbers.
 */
export function checkPixelValues(values) {
  const length = values.length / CHANNELS;
  const [lows, highs] = [[], []];
  for (let channel = 0; channel < CHANNELS; channel++) {
    const plane = values.subarray(channel * length, (channel + 1) * length);
    lows.push(plane.reduce((a, b) => Math.min(a, b)));
    highs.push(plane.reduce((a, b) => Math.max(a, b)));
  }
  // The comparisons also refuse NaN.
  const isUsable = lows.every(
    (low, channel) => low >= -MAX_VALUE && highs[channel] <= MAX_VALUE && highs[channel] - low >= MIN_CONTRAST,
  );
  if (!isUsable)
    throw new BinaryViTError(
      `it turns black and white into numbers from ${round(Math.min(...lows))} to ${round(Math.max(...highs))}: ` +
        "check its rescale_factor, image_mean and image_std.",
    );
}
