// Computes for the page, so that the page stays alive. Each message { id, call, given } is answered by { id, value } or
// { id, error }.
import { load } from "./binaryvit.js";

let model;

const calls = {
  /** Loads a model from { name: URL or ArrayBuffer }. Returns the sizes of its weights and of the engine. */
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
    return model.bytes;
  },

  async classify(picture) {
    const start = performance.now();
    const labels = await model.classify(picture, { topK: 5 });
    return { labels, milliseconds: performance.now() - start };
  },
};

async function read(file) {
  if (typeof file !== "string") return file;
  const response = await fetch(file).catch(() => ({ status: "nothing" }));
  if (!response.ok) throw Error(`The file '${file}' cannot be read: the server answers ${response.status}.`);
  return response.arrayBuffer();
}

addEventListener("message", async ({ data: { id, call, given } }) => {
  try {
    postMessage({ id, value: await calls[call](given) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
});
