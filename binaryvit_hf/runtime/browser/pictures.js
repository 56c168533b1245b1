/** Decodes pictures to bytes, as `pixels.py` does. */

import { isCutOff } from "./cut_off.js";
import { BinaryViTError, messageOf } from "./errors.js";

const MAX_PIXELS = 2 ** 27; // decoding and resizing them takes 2 GB of memory
const MAX_ASPECT_RATIO = 1000;
// Of createImageBitmap. EXIF's orientation turns the picture upright.
const EXACT = /** @type {const} */ ({
  premultiplyAlpha: "none",
  colorSpaceConversion: "none",
  imageOrientation: "from-image",
});

/**
 * RGB or RGBA, 8 bits each, row by row. Alpha is not premultiplied.
 *
 * @typedef {{ data: Uint8Array | Uint8ClampedArray, width: number, height: number }} Picture
 */

/** Whether an image has its bytes already: `{ data, width, height }`, also ImageData. */
export const hasBytes = (image) => image !== null && typeof image === "object" && "data" in image;

/**
 * @param {any} picture
 * @returns {Picture}
 * @throws {BinaryViTError} Its bytes do not fit its size.
 */
export function checkPicture({ data, width, height }) {
  const isSide = (side) => Number.isSafeInteger(side) && side >= 1;
  if (!isSide(width) || !isSide(height))
    throw new BinaryViTError(
      `Width and height of a picture must be whole numbers from 1, not ${width} and ${height}.`,
    );
  if (!(data instanceof Uint8Array || data instanceof Uint8ClampedArray))
    throw new BinaryViTError("The data of a picture must be a Uint8Array or a Uint8ClampedArray.");
  if (data.length !== 3 * width * height && data.length !== 4 * width * height)
    throw new BinaryViTError(
      `A picture of ${width} x ${height} pixels must have 3 (RGB) or 4 bytes (RGBA) a pixel, ` +
        `not ${data.length} in all.`,
    );
  return { data, width, height };
}

/**
 * The picture with its transparent pixels on a colour, in RGB. Computes the bytes of Pillow's `alpha_composite`.
 *
 * @param {Picture} picture
 * @param {number[]} background red, green and blue.
 * @returns {Picture}
 */
export function putOnBackground({ data, width, height }, background) {
  if (data.length === 3 * width * height) return { data, width, height };
  const opaque = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    const alpha = data[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const sum = (data[from + channel] * alpha + background[channel] * (255 - alpha) + 128) << 7;
      opaque[to++] = ((sum >> 8) + sum) >> 15;
    }
  }
  return { data: opaque, width, height };
}

/**
 * Decodes a picture in a browser. EXIF's orientation turns it upright. Colours are not converted.
 *
 * @param {Blob | ImageBitmap | HTMLImageElement | HTMLCanvasElement | OffscreenCanvas | HTMLVideoElement} image
 * @returns {Promise<Picture>}
 * @throws {BinaryViTError} It cannot be decoded, or it is too large.
 */
export async function decodePicture(image) {
  if (typeof createImageBitmap === "undefined")
    throw new BinaryViTError(
      "Only browsers decode pictures; give { data, width, height } with the bytes of a decoder, " +
        "such as sharp or pngjs.",
    );
  let bitmap;
  try {
    bitmap = await createImageBitmap(image, EXACT);
    if (image instanceof Blob && isCutOff(new Uint8Array(await image.arrayBuffer())))
      throw new Error("it is cut off or damaged");
  } catch (error) {
    bitmap?.close();
    throw new BinaryViTError(`The picture cannot be read as an image (${messageOf(error)}).`);
  }
  try {
    checkSize(bitmap.width, bitmap.height);
    const data = readOpaque(bitmap);
    // A canvas stores colours times alpha, in 8 bits, and so loses the colours of transparent pixels.
    const pixels = isOpaque(data) ? data : await readTransparent(bitmap, data);
    return { data: pixels, width: bitmap.width, height: bitmap.height };
  } catch (error) {
    if (error instanceof BinaryViTError) throw error;
    throw new BinaryViTError(`The pixels of the picture cannot be read (${messageOf(error)}).`);
  } finally {
    bitmap.close();
  }
}

function isOpaque(data) {
  for (let index = 3; index < data.length; index += 4) if (data[index] !== 255) return false;
  return true;
}

function haveEqualAlpha(left, right) {
  for (let index = 3; index < left.length; index += 4) if (left[index] !== right[index]) return false;
  return true;
}

/** The pixels of a bitmap. They are exact where it is opaque. */
function readOpaque(bitmap) {
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  const colour = [1, 2, 3, 255];
  context.fillStyle = `rgb(${colour.slice(0, 3)})`;
  context.fillRect(width - 1, height - 1, 1, 1);
  const found = context.getImageData(width - 1, height - 1, 1, 1).data;
  // On a canvas that is too large, browsers draw nothing and read zeros, without an error.
  if (found.every((value) => value === 0))
    throw new BinaryViTError(
      `The picture is too large for this browser: it has ${width} x ${height} pixels; make it smaller.`,
    );
  if (String(found) !== String(colour))
    throw new BinaryViTError(
      "This browser gives pages random pixels instead of those of a picture, against fingerprinting: " +
        "allow this page to read canvases.",
    );
  context.clearRect(width - 1, height - 1, 1, 1);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, width, height).data;
}

/**
 * The exact pixels of a bitmap.
 *
 * @param {ImageBitmap} bitmap without premultiplied alpha.
 * @param {Uint8ClampedArray} fromCanvas its pixels by `readOpaque`, whose alpha is exact.
 */
async function readTransparent(bitmap, fromCanvas) {
  const data = readTexture(bitmap) ?? (await readFrame(bitmap));
  if (data === null)
    throw new BinaryViTError(
      "A transparent picture needs WebGL, which this browser lacks: save it without transparency.",
    );
  // A lost context or a texture that is too large gives zeros.
  if (!haveEqualAlpha(data, fromCanvas))
    throw new BinaryViTError("The transparent picture is too large for WebGL: make it smaller.");
  return data;
}

/** The pixels of a bitmap through a texture of WebGL; `null` if there is no WebGL. */
function readTexture(bitmap) {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl");
  if (gl === null) return null;
  const data = new Uint8Array(4 * width * height);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(
    gl.FRAMEBUFFER,
    gl.COLOR_ATTACHMENT0,
    gl.TEXTURE_2D,
    gl.getParameter(gl.TEXTURE_BINDING_2D),
    0,
  );
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  const hasFailed = gl.getError() !== gl.NO_ERROR;
  gl.getExtension("WEBGL_lose_context")?.loseContext(); // frees its memory: a page may have few contexts
  return hasFailed ? new Uint8Array(data.length) : data;
}

/** The pixels of a bitmap through a frame of video; `null` if this browser's frames lose colours, as Chromium's do. */
async function readFrame(bitmap) {
  if (typeof VideoFrame === "undefined") return null;
  const faint = new ImageData(Uint8ClampedArray.of(200, 100, 50, 1), 1);
  const copied = await copyFrame(await createImageBitmap(faint, EXACT));
  return String(copied) === String(faint.data) ? copyFrame(bitmap) : null;
}

async function copyFrame(bitmap) {
  const frame = new VideoFrame(bitmap, { timestamp: 0, alpha: "keep" });
  const data = new Uint8Array(4 * bitmap.width * bitmap.height);
  await frame.copyTo(data, /** @type {any} */ ({ format: "RGBA" })); // TypeScript knows no format
  frame.close();
  return data;
}

function checkSize(width, height) {
  const size = `The picture is too large: it has ${width} x ${height} pixels,`;
  if (width * height > MAX_PIXELS) throw new BinaryViTError(`${size} more than ${MAX_PIXELS}; make it smaller.`);
  if (Math.max(width, height) > MAX_ASPECT_RATIO * Math.min(width, height))
    throw new BinaryViTError(`${size} one side more than ${MAX_ASPECT_RATIO} times the other; cut it.`);
}
