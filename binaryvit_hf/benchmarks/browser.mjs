// Times forwards in node on one thread, contestants in turns in this process: node browser.mjs PLAN.json
//
// The plan is written by browser.py. The answer is a line of JSON on stdout: for each contestant its image shape, the
// time of loading and of a forward in each turn, [CPU seconds, seconds].

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const plan = JSON.parse(await readFile(process.argv[2], "utf8"));

async function readBuffer(file) {
  const { buffer, byteOffset, byteLength } = await readFile(file);
  return buffer.slice(byteOffset, byteOffset + byteLength);
}

function createPixels(shape) {
  const size = shape.reduce((product, side) => product * side, 1);
  return Float32Array.from({ length: size }, () => 4 * Math.random() - 2);
}

// Read the files of a model. The returned function compiles the engine and loads the model; it is timed.
async function prepareOurs({ folder }) {
  const { load } = await import(pathToFileURL(plan.module));
  const engine = await readBuffer(plan.engine);
  const config = await readFile(join(folder, "config.json"), "utf8");
  const preprocessor = await readFile(join(folder, "preprocessor_config.json"), "utf8");
  const weights = await readBuffer(join(folder, "model.safetensors"));
  return async () => {
    const model = await load({ config, preprocessor, weights }, { engine });
    const pixels = createPixels(model.imageShape);
    return { shape: model.imageShape, forward: () => model.computeLogits(pixels) };
  };
}

async function prepareOnnx({ file, shape }) {
  const { env, InferenceSession, Tensor } = await import(pathToFileURL(plan.onnxruntime.module));
  env.wasm.numThreads = 1;
  env.wasm.wasmBinary = await readBuffer(plan.onnxruntime.engine);
  const bytes = await readBuffer(file);
  return async () => {
    const session = await InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    const inputs = { [session.inputNames[0]]: new Tensor("float32", createPixels(shape), [1, ...shape]) };
    return { shape, forward: async () => (await session.run(inputs))[session.outputNames[0]].data };
  };
}

// Returns the result of `work` and [CPU seconds, seconds].
async function measure(work) {
  const cpu = process.cpuUsage();
  const start = performance.now();
  const result = await work();
  const seconds = (performance.now() - start) / 1e3;
  const { user, system } = process.cpuUsage(cpu);
  return [result, [(user + system) / 1e6, seconds]];
}

// The times of a forward, on average over a turn. The first forward refills the caches and counts only if it fills the turn.
async function takeTurn(forward) {
  const [, first] = await measure(forward);
  if (first[1] > plan.turnSeconds) return first;
  const [count, times] = await measure(async () => {
    const end = performance.now() + 1e3 * plan.turnSeconds;
    let forwards = 0;
    do {
      await forward();
      forwards += 1;
    } while (performance.now() < end);
    return forwards;
  });
  return times.map((seconds) => seconds / count);
}

// V8 compiles the functions that run often again, with more optimisations.
async function warmUp(forward) {
  const end = performance.now() + 1e3 * plan.warmUpSeconds;
  do {
    const logits = await forward();
    if (!logits.length || !logits.every(Number.isFinite)) throw new Error("a logit is not a finite number");
  } while (performance.now() < end);
}

const contestants = [];
for (const contestant of plan.contestants) {
  try {
    const create = await (contestant.folder ? prepareOurs : prepareOnnx)(contestant);
    const [{ shape, forward }, loading] = await measure(create);
    contestants.push({ shape, loading, forward, turns: [] });
    if (plan.turns) await warmUp(forward);
  } catch (error) {
    process.stderr.write(`${contestant.name}: ${error.message}\n`);
    process.exit(1);
  }
}
for (let turn = 0; turn < plan.turns; turn += 1) {
  for (const { forward, turns } of contestants) turns.push(await takeTurn(forward));
}
const { node, v8 } = process.versions;
process.stdout.write(`${JSON.stringify({ node, v8, contestants })}\n`);
