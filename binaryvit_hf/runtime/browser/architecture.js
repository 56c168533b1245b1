/** The network of a config.json: sizes, names and shapes of tensors, labels. Makes the checks of `architecture.py`. */

import { BinaryViTError, UnsupportedModelError, quote } from "./errors.js";
import { Float, areEqual, isFlag, isFloat, isNull, isNumber, isObject, isText, isWhole } from "./json.js";

const QUANT_METHOD = "binaryvit";
const PER_STAGE = ["depths", "num_attention_heads", "intermediate_sizes", "sequence_reduction_ratios"];
// Least and most of each field, as in BinaryViTConfig: far above useful networks.
const RANGES = {
  image_size: [1, 2 ** 14],
  patch_size: [1, 2 ** 14],
  num_channels: [1, 2 ** 10],
  hidden_sizes: [1, 2 ** 16],
  depths: [1, 200],
  num_attention_heads: [1, 2 ** 10],
  intermediate_sizes: [1, 2 ** 18],
  sequence_reduction_ratios: [1, 2 ** 14],
  avg_pool_kernel_sizes: [1, 2 ** 10],
  layer_scale_init_value: [-1e4, 1e4],
  quantization_clip_value: [1e-6, 1e6],
  attention_clip_init_value: [1e-6, 1e6],
  batch_norm_eps: [1e-30, 1e4],
  batch_norm_momentum: [0, 1],
  initializer_range: [0, 1e4],
};
const PROBABILITIES = ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"];
// Types of single numbers that are not whole, as in BinaryViTConfig.
const TYPES = {
  layer_scale_init_value: isNumber,
  quantization_clip_value: isNumber,
  attention_clip_init_value: isNumber,
  batch_norm_eps: isFloat,
  batch_norm_momentum: isNumber,
  initializer_range: isFloat,
};
// Values of transformers' settings with which the runtime gives the same answers as transformers.
const SETTINGS = {
  problem_type: [null, "regression", "single_label_classification", "multi_label_classification"],
  return_dict: [true],
  output_hidden_states: [false, null],
  output_attentions: [false, null],
  is_encoder_decoder: [false],
  chunk_size_feed_forward: [0],
  attn_implementation: [null],
  per_layer_config: [null],
  transformers_weights: [null],
  out_features: [null],
  out_indices: [null],
  configuration_files: [],
  pretrained_cfg: [],
};
const [MAX_LIST_LENGTH, MAX_LAYERS, MAX_LABELS] = [16, 200, 100_000];
const [MAX_PARAMETERS, MAX_ACTIVATIONS, MAX_TOKENS] = [1e10, 2 ** 32, 2 ** 22];
const TRAINING_FIELDS = [
  "layer_scale_init_value",
  "attention_clip_init_value",
  "batch_norm_momentum",
  "initializer_range",
];
const FLAGS = ["use_class_token", "use_stem_norm", "use_layer_scale", "binarize_patch_embeddings"];
const SIZES = ["image_size", "patch_size"];
// The config fields that decide the outputs. The defaults are BinaryViTConfig's.
const DEFAULT_FIELDS = {
  image_size: 224,
  patch_size: 4,
  num_channels: 3,
  hidden_sizes: [64, 128, 256, 512],
  depths: [3, 4, 8, 4],
  num_attention_heads: [1, 2, 4, 8],
  intermediate_sizes: [512, 1024, 1024, 2048],
  sequence_reduction_ratios: [8, 4, 1, 1],
  use_class_token: false,
  use_stem_norm: true,
  use_layer_scale: true,
  avg_pool_kernel_sizes: [3, 5],
  binarize_patch_embeddings: true,
  weight_bits: 1,
  input_bits: 1,
  quantization_clip_value: new Float(2.5),
  batch_norm_eps: new Float(1e-5),
};

/**
 * @typedef {object} Architecture
 * @property {Object<string, any>} fields the config fields that decide the outputs, by their names in config.json.
 * @property {number[]} imageSize height and width.
 * @property {number[]} patchSize height and width.
 * @property {number} numChannels
 * @property {number[]} hiddenSizes of each stage.
 * @property {number[][]} gridSizes height and width in tokens of each stage's map.
 */

/**
 * The network of a config.json.
 *
 * @param {any} config the content of the file, from `parseJson`.
 * @returns {Architecture}
 * @throws {UnsupportedModelError} Only PyTorch computes this model, or a setting is not supported.
 * @throws {BinaryViTError} The fields do not describe a network. Both messages name the field.
 */
export function readArchitecture(config) {
  if (!isObject(config) || !isText(config.model_type))
    throw new BinaryViTError("config.json is not a JSON object with the name of a model type ('model_type').");
  if (config.model_type !== "binaryvit")
    throw new UnsupportedModelError(`its model_type is ${quote(config.model_type)}, not 'binaryvit'`);
  if (isNull(config.quantization_config))
    throw new UnsupportedModelError("its weights are not packed (`binaryvit pack` packs them)");
  checkPacking(config.quantization_config);
  for (const field of ["weight_bits", "input_bits"])
    if (field in config && config[field] !== 1)
      throw new UnsupportedModelError(
        `its ${field} is ${quote(config[field])}, and the engine multiplies single bits`,
      );
  // Without a dtype, transformers computes in the dtype of the file, which may be float16.
  const dtype = config.dtype ?? config.torch_dtype ?? null;
  if (dtype !== "float32") throw new UnsupportedModelError(`its dtype is ${quote(dtype)}, not 'float32'`);
  checkSettings(config);
  checkTrainingFields(config);
  const fields = { ...DEFAULT_FIELDS };
  for (const name of Object.keys(fields)) if (name in config) fields[name] = config[name];
  checkFields(fields);
  checkStages(fields);
  checkMap(fields);
  const architecture = {
    fields,
    imageSize: asPair(fields.image_size),
    patchSize: asPair(fields.patch_size),
    numChannels: fields.num_channels,
    hiddenSizes: fields.hidden_sizes,
    gridSizes: gridSizesOf(fields),
  };
  const derived = { num_hidden_layers: sum(fields.depths), hidden_size: fields.hidden_sizes.at(-1) };
  for (const [field, value] of Object.entries(derived))
    if (field in config && !areEqual(config[field], value))
      throw new BinaryViTError(`${field} must be ${value}, not ${quote(config[field])}.`);
  checkParameters(architecture, readLabels(config).length);
  return architecture;
}

/**
 * The label of each logit. As in transformers, a config without labels has two.
 *
 * @param {any} config the content of config.json.
 * @returns {any[]} Text, or numbers where id2label has them.
 * @throws {BinaryViTError} They are not labels.
 * @throws {UnsupportedModelError} num_labels is not the number of labels in id2label.
 */
export function readLabels(config) {
  const given = "num_labels" in config ? config.num_labels : 2;
  const number = isFlag(given) ? Number(given) : given;
  if (!isWhole(number) || !(number >= 1 && number <= MAX_LABELS))
    throw new BinaryViTError(`num_labels must be a whole number from 1 to ${MAX_LABELS}, not ${quote(given)}.`);
  const id2label =
    config.id2label ?? Object.fromEntries(Array.from({ length: Number(number) }, (_, i) => [i, `LABEL_${i}`]));
  if (!isObject(id2label) || !isIn(Object.keys(id2label).length, 1, MAX_LABELS))
    throw new BinaryViTError(`id2label must map numbers to labels, from 1 to ${MAX_LABELS} of them.`);
  const count = Object.keys(id2label).length;
  const labels = Array.from({ length: count }, (_, index) => id2label[index]);
  if (labels.includes(undefined))
    throw new BinaryViTError(`The keys of id2label must be 0 to ${count - 1}, one of each.`);
  if (!labels.every((label) => isText(label) || isWhole(label) || isFlag(label)))
    throw new BinaryViTError("The labels of id2label must be text.");
  if ("num_labels" in config && number !== count)
    throw new UnsupportedModelError(`its config has num_labels=${quote(given)} and ${count} labels in id2label`);
  if (count === 1 && config.problem_type === "single_label_classification")
    throw new BinaryViTError("problem_type is 'single_label_classification', but there is a single label.");
  return labels;
}

function checkPacking(packing) {
  if (!isObject(packing) || packing.quant_method !== QUANT_METHOD)
    throw new BinaryViTError(`quant_method of the quantization_config must be '${QUANT_METHOD}'.`);
  if ("half" in packing && !isFlag(packing.half))
    throw new BinaryViTError(`half of the quantization_config must be true or false, not ${quote(packing.half)}.`);
  const unknown = Object.keys(packing)
    .filter((name) => !["quant_method", "half"].includes(name))
    .sort()[0];
  if (unknown !== undefined)
    throw new BinaryViTError(`A quantization_config of '${QUANT_METHOD}' has no '${unknown}'; it has 'half'.`);
}

function checkSettings(config) {
  const wrong = Object.keys(SETTINGS).filter((field) => field in config && !SETTINGS[field].includes(config[field]));
  const { transformers_version: version, architectures, label2id } = config;
  if (!(isNull(version) || isText(version))) wrong.push("transformers_version");
  if (!(isNull(architectures) || (Array.isArray(architectures) && architectures.every(isText))))
    wrong.push("architectures");
  const isMap = isObject(label2id) && [isWhole, isText].some((isKind) => Object.values(label2id).every(isKind));
  if (!(isNull(label2id) || isMap)) wrong.push("label2id");
  if (wrong.length) throw new UnsupportedModelError(`its config has ${wrong[0]}=${quote(config[wrong[0]])}`);
}

/** Fields that do not decide the outputs are checked too, because BinaryViTConfig refuses a damaged one. */
function checkTrainingFields(config) {
  for (const field of TRAINING_FIELDS) if (field in config) checkRange(field, [config[field]]);
  for (const field of PROBABILITIES)
    if (field in config && !(isNumber(config[field]) && Number(config[field]) >= 0 && Number(config[field]) < 1))
      throw new BinaryViTError(`${field} must be a probability below 1, not ${quote(config[field])}.`);
}

function checkFields(fields) {
  for (const field of Object.keys(RANGES).filter((name) => !TRAINING_FIELDS.includes(name))) {
    const value = fields[field];
    const isList = Array.isArray(value);
    if (isList !== (Array.isArray(DEFAULT_FIELDS[field]) || (SIZES.includes(field) && isList)))
      throw new BinaryViTError(`${field} must ${isList ? "not be" : "be"} a list, not ${quote(value)}.`);
    checkRange(field, isList ? value : [value]);
  }
  for (const field of FLAGS)
    if (!isFlag(fields[field]))
      throw new BinaryViTError(`${field} must be true or false, not ${quote(fields[field])}.`);
  if (fields.avg_pool_kernel_sizes.some((kernel) => kernel % 2 === 0))
    throw new BinaryViTError(`avg_pool_kernel_sizes=${quote(fields.avg_pool_kernel_sizes)} must be odd.`);
}

function checkRange(field, numbers) {
  const [least, most] = RANGES[field];
  if (numbers.length > MAX_LIST_LENGTH)
    throw new BinaryViTError(`${field} has ${numbers.length} values; the maximum is ${MAX_LIST_LENGTH}.`);
  const isKind = TYPES[field] ?? isWhole;
  if (!numbers.every((number) => isKind(number) && isIn(number, least, most)))
    throw new BinaryViTError(
      `${field} must be from ${least} to ${most}, not ${quote(numbers.length > 1 ? numbers : numbers[0])}.`,
    );
}

/** Whether a number is in a range. NaN is in none. */
const isIn = (number, least, most) => number >= least && number <= most;

function checkStages(fields) {
  const { hidden_sizes: sizes, num_attention_heads: heads, intermediate_sizes: inner } = fields;
  if (!sizes.length) throw new BinaryViTError("hidden_sizes is empty, but a network has at least one stage.");
  for (const field of PER_STAGE)
    if (fields[field].length !== sizes.length)
      throw new BinaryViTError(`${field}=${quote(fields[field])} must have one value per stage.`);
  if (sum(fields.depths) > MAX_LAYERS)
    throw new BinaryViTError(`depths=${quote(fields.depths)} are more than ${MAX_LAYERS} layers.`);
  sizes.forEach((channels, stage) => {
    if (channels % heads[stage] || inner[stage] % channels || channels % (sizes[stage - 1] ?? 1))
      throw new BinaryViTError(
        `hidden_sizes=${quote(sizes)} must be multiples of num_attention_heads and of the stage before, and divide ` +
          "intermediate_sizes.",
      );
  });
  const isPyramid =
    sizes.length > 1 ||
    fields.avg_pool_kernel_sizes.length ||
    fields.sequence_reduction_ratios.some((ratio) => ratio > 1);
  if (fields.use_class_token && isPyramid)
    throw new BinaryViTError("use_class_token needs one stage, no reduction and no pooling branches.");
}

function checkMap(fields) {
  if (SIZES.some((field) => asPair(fields[field]).length !== 2))
    throw new BinaryViTError("image_size and patch_size must be one number or (height, width).");
  const patch = asPair(fields.patch_size);
  asPair(fields.image_size).forEach((size, axis) =>
    fields.sequence_reduction_ratios.forEach((ratio, stage) => {
      if (size % (patch[axis] * 2 ** stage * ratio))
        throw new BinaryViTError(
          `image_size=${quote(fields.image_size)} cannot be divided by patch_size=${quote(fields.patch_size)}, ` +
            "stages and sequence_reduction_ratios.",
        );
    }),
  );
  gridSizesOf(fields).forEach(([height, width], stage) => {
    const tokens = height * width;
    const keys = Math.floor(tokens / fields.sequence_reduction_ratios[stage] ** 2);
    const probabilities = fields.num_attention_heads[stage] * tokens * keys;
    if (tokens > MAX_TOKENS || Math.max(probabilities, tokens * fields.intermediate_sizes[stage]) > MAX_ACTIVATIONS)
      throw new BinaryViTError(`stage ${stage} has ${tokens} tokens an image, too many for its attention or MLP.`);
  });
}

function checkParameters({ fields, patchSize, gridSizes, hiddenSizes }, numLabels) {
  let inputs = fields.num_channels * patchSize[0] * patchSize[1];
  let parameters = hiddenSizes.at(-1) * numLabels;
  gridSizes.forEach(([height, width], stage) => {
    const channels = hiddenSizes[stage];
    const projections = fields.sequence_reduction_ratios[stage] === 1 ? 4 : 5;
    parameters += channels * (inputs + height * width);
    parameters += fields.depths[stage] * channels * (projections * channels + 2 * fields.intermediate_sizes[stage]);
    inputs = 4 * channels;
  });
  if (parameters > MAX_PARAMETERS)
    throw new BinaryViTError(
      `the network has ${parameters.toExponential(1)} weights; the maximum is ${MAX_PARAMETERS.toExponential(0)}.`,
    );
}

/** A size as [height, width]. */
const asPair = (size) => (Array.isArray(size) ? size : [size, size]);

const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);

/** Height and width in tokens of each stage's map. */
function gridSizesOf(fields) {
  const patch = asPair(fields.patch_size);
  const [height, width] = asPair(fields.image_size).map((size, axis) => Math.floor(size / patch[axis]));
  return fields.hidden_sizes.map((_, stage) => [Math.floor(height / 2 ** stage), Math.floor(width / 2 ** stage)]);
}

/**
 * Names and shapes of the tensors of a packed backbone, in any order.
 *
 * Names that end in `packed_weight` hold bits, in `num_batches_tracked` a count. All others are floats.
 *
 * @param {Architecture} architecture
 * @returns {Array<{ name: string, shape: number[], packedFrom?: number[] }>} packedFrom: the shape before packing.
 */
export function listTensors({ fields, patchSize, gridSizes, hiddenSizes }) {
  const tensors = [];
  const add = (name, shape, packedFrom) => tensors.push({ name, shape, packedFrom });

  function addNorm(name, channels) {
    for (const field of ["weight", "bias", "running_mean", "running_var"])
      add(`${name}.batch_norm.${field}`, [channels]);
    add(`${name}.batch_norm.num_batches_tracked`, []);
  }

  function addNormActivation(name, channels) {
    addNorm(`${name}.norm`, channels);
    for (const field of ["shift_in", "slope", "shift_out"]) add(`${name}.activation.${field}`, [channels]);
  }

  function addPackedWeight(name, inputs, outputs, kernel = []) {
    const squares = kernel.reduce((product, side) => product * side, 1);
    add(`${name}.shift`, [inputs]);
    add(`${name}.packed_weight`, [outputs, Math.ceil((inputs * squares) / 8)], [outputs, inputs, ...kernel]);
    add(`${name}.weight_scale`, [outputs, 1]);
  }

  function addProjection(name, inputs, outputs) {
    addPackedWeight(`${name}.linear`, inputs, outputs);
    addNormActivation(`${name}.norm_activation`, outputs);
  }

  function addPatchEmbeddings(name, inputs, outputs) {
    addNorm(`${name}.norm1`, inputs);
    if (fields.binarize_patch_embeddings) {
      addPackedWeight(`${name}.projection`, inputs, outputs, [2, 2]);
      addNormActivation(`${name}.norm_activation`, outputs);
    } else {
      add(`${name}.projection.weight`, [outputs, inputs, 2, 2]);
      addNorm(`${name}.norm2`, outputs);
    }
  }

  function addLayer(name, stage) {
    const channels = hiddenSizes[stage];
    const inner = fields.intermediate_sizes[stage];
    addNorm(`${name}.norm1`, channels);
    for (const kind of ["query", "key", "value"]) add(`${name}.attention.${kind}_shift`, [channels]);
    add(`${name}.attention.probability_clip`, []);
    const reduction = fields.sequence_reduction_ratios[stage] > 1 ? ["reduction"] : [];
    for (const kind of [...reduction, "query", "key", "value", "output"])
      addProjection(`${name}.attention.${kind}`, channels, channels);
    addNormActivation(`${name}.attention.norm_activation`, channels);
    addNorm(`${name}.norm2`, channels);
    addProjection(`${name}.mlp.fc1`, channels, inner);
    addProjection(`${name}.mlp.fc2`, inner, channels);
    const scales = fields.use_layer_scale ? ["layer_scale1", "layer_scale2"] : [];
    for (let branch = 0; branch < 2 * fields.avg_pool_kernel_sizes.length; branch++)
      scales.push(`avg_pool_branches.${branch}.layer_scale`);
    for (const scale of scales) {
      add(`${name}.${scale}.scale`, [channels]);
      add(`${name}.${scale}.shift`, [channels]);
    }
  }

  const mapTokens = gridSizes.map(([height, width]) => height * width);
  add("embeddings.position_embeddings", [1, mapTokens[0] + Number(fields.use_class_token), hiddenSizes[0]]);
  add("embeddings.projection.weight", [hiddenSizes[0], fields.num_channels, ...patchSize]);
  add("embeddings.projection.bias", [hiddenSizes[0]]);
  if (fields.use_stem_norm) addNorm("embeddings.norm", hiddenSizes[0]);
  if (fields.use_class_token) add("embeddings.class_token", [1, 1, hiddenSizes[0]]);
  hiddenSizes.forEach((channels, stage) => {
    if (stage > 0) {
      const name = `stages.${stage}.patch_embeddings`;
      add(`${name}.position_embeddings`, [1, mapTokens[stage], channels]);
      addPatchEmbeddings(name, hiddenSizes[stage - 1], channels);
    }
    for (let layer = 0; layer < fields.depths[stage]; layer++) addLayer(`stages.${stage}.layers.${layer}`, stage);
  });
  addNorm("norm", hiddenSizes.at(-1));
  return tensors;
}
