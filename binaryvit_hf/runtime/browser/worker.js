// Computes for the page, so that the page stays alive. Each message { id, call, given } is answered by { id, value } or
// { id, error }.
import { decodePicture, load } from "./binaryvit.js";

let model;
let black, white; // the network's inputs of plain pictures

const calls = {
  /** Loads a model from { name: URL or ArrayBuffer }. Returns the sizes of its weights and of the engine, and its layers. */
  async load({ name, files, engine }) {
    const content = new Map(await Promise.all(Object.entries(files).map(async ([file, at]) => [file, await read(at)])));
    const text = (file) => new TextDecoder().decode(content.get(file));
    const weights = [...content].filter(([file]) => file.endsWith(".safetensors"));
    const source = {
      config: text("config.json"),
      preprocessor: text("preprocessor_config.json"),
      weights: Object.fromEntries(weights),
    };
    model = await load(source, { engine: await read(engine), name });
    [black, white] = [0, 255].map((grey) =>
      model.preprocess({ data: new Uint8Array(3 * 64 * 64).fill(grey), width: 64, height: 64 }),
    );
    return { ...model.bytes, layers: model.numLayers };
  },

  async classify(picture) {
    const start = performance.now();
    const decoded = await decode(picture);
    const labels = await model.classify(decoded, { topK: 5 });
    return { labels, milliseconds: performance.now() - start, seen: see(decoded) };
  },

  /** For each head of a layer: the part of the queries that attend to each key. */
  async attention({ picture, layer }) {
    const { heads, queries, keys, hasClassToken, values } = model.attention(await decode(picture), layer);
    const first = Number(hasClassToken);
    const [numQueries, numKeys] = [queries, keys].map(([height, width]) => height * width + first);
    const parts = Array.from({ length: heads }, () => new Float32Array(numKeys));
    values.forEach((value, index) => {
      if (value > 0) parts[Math.floor(index / (numQueries * numKeys))][index % numKeys] += 1 / numQueries;
    });
    const heatmaps = parts.map((part) => part.subarray(first));
    return { heatmaps, grid: keys };
  },
};

function decode(picture) {
  return picture instanceof Blob ? decodePicture(picture) : picture;
}

/** The part of a picture that the network gets, as ImageData. */
function see(picture) {
  const [, height, width] = model.imageShape;
  const seen = new ImageData(width, height);
  model.preprocess(picture).forEach((value, index) => {
    const [channel, pixel] = [Math.floor(index / (width * height)), index % (width * height)];
    seen.data[4 * pixel + channel] = (255 * (value - black[index])) / (white[index] - black[index]);
  });
  for (let pixel = 0; pixel < width * height; pixel++) seen.data[4 * pixel + 3] = 255;
  return seen;
}

async function read(file) {
  if (typeof file !== "string") return file;
  try {
    // A server that says nothing about caches would let the browser mix the files of this model with those of an earlier one.
    const response = await fetch(file, { cache: "no-cache" });
    if (response.ok) return await response.arrayBuffer();
    throw Error(`the server answers ${response.status}`);
  } catch (error) {
    throw Error(`The file '${file}' cannot be read (${error.message}): load the page again.`);
  }
}

addEventListener("message", async ({ data: { id, call, given } }) => {
  try {
    postMessage({ id, value: await calls[call](given) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
});
postMessage({ id: 0 }); // it is ready
