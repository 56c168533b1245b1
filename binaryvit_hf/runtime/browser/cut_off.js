/** Finds pictures that are cut off, as Pillow does: Firefox decodes the part that is there without an error. */

import { updateCrc32 } from "./checkpoint.js";

const [PNG, JPEG, GIF, BMP] = ["\x89PNG\r\n\x1a\n", "\xff\xd8\xff", "GIF8", "BM"];

/**
 * Whether a picture in the format PNG, JPEG, GIF or BMP ends too early, or a PNG has a wrong checksum.
 *
 * @param {Uint8Array} bytes of a file, in any format.
 */
export function isCutOff(bytes) {
  const startsWith = (mark) => [...mark].every((character, index) => bytes[index] === character.charCodeAt(0));
  if (startsWith(PNG)) return !isWholePng(bytes);
  if (startsWith(JPEG)) return !isWholeJpeg(bytes);
  if (startsWith(GIF)) return !isWholeGif(bytes);
  return startsWith(BMP) && !isWholeBmp(bytes);
}

const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** Whether the pixels are followed by another chunk. Other decoders also accept a file without its last bytes. */
function isWholePng(bytes) {
  const view = viewOf(bytes);
  let hasPixels = false;
  for (let chunk = PNG.length; chunk + 8 <= bytes.length; ) {
    const end = chunk + 8 + view.getUint32(chunk);
    const isPixels = view.getUint32(chunk + 4) === 0x49444154; // "IDAT"
    if (hasPixels && !isPixels) return true;
    if (isPixels && (end + 4 > bytes.length || view.getUint32(end) !== updateCrc32(0, bytes.subarray(chunk + 4, end))))
      return false;
    hasPixels = isPixels;
    chunk = end + 4;
  }
  return false;
}

/** Whether the mark of the end follows the first scan. Before it, a smaller picture may have such a mark too. */
function isWholeJpeg(bytes) {
  const [fill, startOfScan, endOfImage] = [0xff, 0xda, 0xd9];
  let at = 2;
  while (at + 4 <= bytes.length && bytes[at + 1] !== startOfScan)
    at += bytes[at] === fill && bytes[at + 1] !== fill ? 2 + viewOf(bytes).getUint16(at + 2) : 1;
  for (; at + 1 < bytes.length; at++) if (bytes[at] === fill && bytes[at + 1] === endOfImage) return true;
  return false;
}

/** Whether the first picture is there. */
function isWholeGif(bytes) {
  const [extension, image] = [0x21, 0x2c];
  const afterColours = (at, flags) => at + (flags & 128 ? 3 * 2 ** ((flags & 7) + 1) : 0);
  let at = afterColours(13, bytes[10]);
  while (at < bytes.length) {
    const kind = bytes[at];
    if (kind !== extension && kind !== image) return false;
    at = kind === image ? afterColours(at + 10, bytes[at + 9]) + 1 : at + 2;
    while (bytes[at] > 0) at += 1 + bytes[at]; // blocks, each after its length; the last one has none
    at++;
    if (kind === image) return at <= bytes.length;
  }
  return false;
}

/** Whether all rows are there, without the padding of the last one. Only sizes of uncompressed pictures are known. */
function isWholeBmp(bytes) {
  if (bytes.length < 34) return false;
  const view = viewOf(bytes);
  const isKnown = view.getUint32(14, true) >= 40 && [0, 3].includes(view.getUint32(30, true));
  if (!isKnown) return true;
  const [start, width] = [view.getUint32(10, true), view.getInt32(18, true)];
  const [height, bits] = [Math.abs(view.getInt32(22, true)), view.getUint16(28, true)];
  return start + 4 * Math.ceil((width * bits) / 32) * (height - 1) + Math.ceil((width * bits) / 8) <= bytes.length;
}
