// The page: takes a picture, gives it to the worker, and shows the answer. Text of the model is set as text, never as HTML.
"use strict";

const TINY = 64; // pixels of a side; smaller pictures are shown with sharp pixels
const PEN_STEP = 0.04; // part of the board that an arrow key moves the pen
const INK = { dark: "#fff", light: "#000" };
const PAPER = { dark: "#000", light: "#fff" };

const page = JSON.parse(document.getElementById("page-data").textContent);
const element = (id) => document.getElementById(id);
const [board, preview, video, fileInput] = ["board", "preview", "video", "file"].map(element);

// ---- The worker ----

const READY = 0; // the worker's first message; it would miss messages that come earlier
const waitingCalls = new Map();
let lastCall = READY;
let worker;
let loaded; // a promise of the loaded model

/** Ask the worker. Resolves to its value, rejects with its message. */
function call(name, given, transfer = []) {
  return new Promise((resolve, reject) => {
    const id = ++lastCall;
    waitingCalls.set(id, { resolve, reject });
    worker.postMessage({ id, call: name, given }, transfer);
  });
}

async function start() {
  if (!page.content && location.protocol === "file:")
    throw Error(
      "Browsers do not let a page on the disk read the files beside it: serve this folder with " +
        "`python -m http.server`, or write one file with `binaryvit page --single-file`.",
    );
  if (typeof WebAssembly === "undefined" || typeof Worker === "undefined")
    throw Error("This browser has no WebAssembly or no workers, which compute the answer: use a newer browser.");
  // A worker of a Blob URL has the Content-Security-Policy of the page, unlike a worker of a file.
  // On the disk, only a classic worker may start from a Blob URL; the modules of a single file are joined into one script.
  // A static import would be shorter, but Firefox reports no error if a module that it imports in turn is missing.
  const code = page.content
    ? page.content.worker
    : `import("${new URL("worker.js", location.href)}").catch((error) => setTimeout(() => { throw error; }));`;
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  worker = new Worker(url, { type: page.content ? "classic" : "module" });
  worker.addEventListener("message", ({ data: { id, value, error } }) => {
    const { resolve, reject } = waitingCalls.get(id);
    waitingCalls.delete(id);
    if (error === undefined) resolve(value);
    else reject(Error(error));
  });
  worker.addEventListener("error", (event) => {
    event.preventDefault(); // it is shown on the page
    const cause = event.message ? ` (${event.message})` : "";
    for (const { reject } of waitingCalls.values())
      reject(Error(`The engine does not start in this browser${cause}: use a newer one, or load the page again.`));
    waitingCalls.clear();
  });
  await new Promise((resolve, reject) => waitingCalls.set(READY, { resolve, reject }));
  const model = page.model.map((name) => [name, contentOf(`model/${name}`)]);
  const [files, engine] = [Object.fromEntries(model), contentOf("binaryvit.wasm")];
  const buffers = [engine, ...Object.values(files)].filter((file) => file instanceof ArrayBuffer);
  return call("load", { name: page.name, files, engine }, buffers);
}

/** The content of a file of the page, as an ArrayBuffer, if the page is a single file; else its URL. */
function contentOf(name) {
  if (page.content) return decode(page.content.files[name]);
  return new URL(name.split("/").map(encodeURIComponent).join("/"), location.href).href;
}

/** The ArrayBuffer of base64. */
function decode(encoded) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(encoded).buffer;
  return Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0)).buffer;
}

// ---- The answer ----

let next = null; // what the worker gets when it is free; a newer picture replaces it
let current = null; // what the worker has
let answered = null; // the picture whose answer is shown

/**
 * Classify a picture and show the answer.
 *
 * @param take returns the picture, a Blob or ImageData, when the worker is free
 * @param isFinal false while a stroke is being drawn: screen readers would never stop
 * @param note a sentence to show beside the answer
 */
async function classify(take, isFinal = true, note = "") {
  next = { take, isFinal, note };
  if (current) return;
  while (next) {
    [current, next] = [next, null];
    const asked = current;
    try {
      await loaded;
      if (current !== asked) continue; // it was cleared
      const picture = asked.take();
      const answer = await call("classify", picture);
      if (current !== asked) continue;
      showAnswer(answer, picture, asked.isFinal);
      showAlert(asked.note);
    } catch (error) {
      if (current !== asked) continue;
      clearAnswer();
      showAlert(error.message);
    }
  }
  current = null;
}

/** Forget pictures that wait for an answer. */
function forgetPictures() {
  next = null;
  if (current) current = {};
}

function showAnswer({ labels, milliseconds, seen }, picture, isFinal) {
  answered = picture;
  showSeen(seen);
  element("attention").hidden = false;
  const [best] = labels;
  element("best").textContent = best.label;
  element("best").classList.remove("waiting");
  const list = element("labels");
  while (list.children.length < labels.length) list.append(createLabel());
  while (list.children.length > labels.length) list.lastChild.remove();
  list.ariaHidden = null;
  labels.forEach(({ label, score }, place) => {
    const [name, number, bar] = list.children[place].children;
    name.textContent = label;
    number.value = score;
    number.textContent = page.probabilities ? percent(score) : score.toPrecision(4);
    bar.hidden = !page.probabilities;
    bar.firstChild.style.transform = `scaleX(${score})`;
  });
  element("time").textContent = `${formatMilliseconds(milliseconds)} for this picture`;
  if (!isFinal) return;
  announce(`${best.label}, ${list.firstChild.children[1].textContent}`);
  showAttention();
}

function createLabel() {
  const item = document.createElement("li");
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.append(document.createElement("i"));
  item.append(document.createElement("span"), document.createElement("data"), bar);
  return item;
}

function clearAnswer() {
  answered = null;
  element("seen").hidden = element("attention").hidden = true;
  element("best").textContent = page.characters
    ? `Draw ${drawnThing()}, or give a picture of one.`
    : "Give a picture to see its labels.";
  element("best").classList.add("waiting");
  const empty = Array.from({ length: Math.min(5, page.labels) }, createLabel); // the page keeps its height
  for (const item of empty) item.firstChild.textContent = "\u00a0";
  element("labels").replaceChildren(...empty);
  element("labels").ariaHidden = "true";
  element("time").textContent = "";
  announce("");
}

function showAlert(sentence) {
  element("alert").textContent = sentence;
  element("alert").hidden = !sentence;
}

function announce(text) {
  element("status").textContent = text;
}

function showFacts({ weights, engine, layers }) {
  const [height, width] = page.size;
  const facts = {
    Model: formatBytes(weights),
    Engine: formatBytes(engine),
    "The model sees": `${width} × ${height} pixels`,
    Labels: String(page.labels),
  };
  for (const [name, value] of Object.entries(facts)) {
    const fact = document.createElement("div");
    const [term, description] = ["dt", "dd"].map((tag) => document.createElement(tag));
    term.textContent = name;
    description.textContent = value;
    fact.append(term, description);
    element("facts").append(fact);
  }
  for (let layer = 0; layer < layers; layer++) element("layer").add(new Option(`${layer + 1} of ${layers}`, layer));
}

const percent = (score) => `${(100 * score).toFixed(1)} %`;
const formatBytes = (bytes) => (bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

function formatMilliseconds(milliseconds) {
  if (milliseconds < 0.1) return "Less than 0.1 ms"; // browsers round their clock
  return `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
}

function drawnThing() {
  if (page.characters === "digits") return "a digit";
  return page.characters === "letters" ? "a letter" : "a character";
}

// ---- Attention ----

element("attention").addEventListener("toggle", showAttention);
element("layer").addEventListener("change", showAttention);

async function showAttention() {
  const [picture, layer] = [answered, Number(element("layer").value)];
  if (!element("attention").open || picture === null) return;
  try {
    const found = await call("attention", { picture, layer });
    if (picture === answered && layer === Number(element("layer").value)) showHeads(found);
  } catch (error) {
    showAlert(error.message);
  }
}

/** One small picture for each head: what the model sees, with more colour where more of it looks. */
function showHeads({ heatmaps, grid: [rows, columns] }) {
  const picture = element("seen").querySelector("canvas");
  const figures = heatmaps.map((heatmap, place) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [240, Math.round((240 * picture.height) / picture.width)];
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = picture.width > TINY;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const toEdge = (cell, cells, side) => Math.round((cell * side) / cells);
    heatmap.forEach((part, key) => {
      const [row, column] = [Math.floor(key / columns), key % columns];
      const [left, right] = [column, column + 1].map((edge) => toEdge(edge, columns, canvas.width));
      const [top, bottom] = [row, row + 1].map((edge) => toEdge(edge, rows, canvas.height));
      context.fillStyle = `rgb(124 92 255 / ${0.7 * part})`;
      context.fillRect(left, top, right - left, bottom - top);
    });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `What head ${place + 1} looks at`);
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = `Head ${place + 1}`;
    figure.append(canvas, caption);
    return figure;
  });
  element("heads").replaceChildren(...figures);
}

// ---- Pictures from files, the clipboard and other windows ----

let stageWithoutCamera; // what is shown again when the camera is cancelled

function showStage(mode) {
  element("invitation").hidden = mode !== "invitation";
  element("stage").classList.toggle("inviting", mode === "invitation");
  for (const id of ["board", "board-keys", "clear"]) element(id).hidden = mode !== "board";
  element("draw").hidden = mode === "board";
  element("board-hint").hidden = mode !== "board" || strokes.length > 0;
  preview.hidden = mode !== "picture";
  video.hidden = element("camera-tools").hidden = mode !== "camera";
  if (mode !== "board") drawingPointer = null;
  if (mode === "camera") return;
  stageWithoutCamera = mode;
  stopCamera();
}

function showFirstStage() {
  showStage(page.characters ? "board" : "invitation");
}

/** Show a picture and classify it. `note` stands beside the answer. */
function takePicture(blob, note = "") {
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(blob);
  showStage("picture");
  if (answered !== null) {
    clearAnswer(); // it is not this picture's
    element("best").textContent = "Computing …";
  }
  classify(() => blob, true, note);
}

function takeFiles(files, otherwise) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/"));
  const picture = pictures[0] ?? files[0];
  if (!picture) return showAlert(otherwise);
  takePicture(picture, pictures.length > 1 ? `Only the first of ${pictures.length} pictures is classified.` : "");
}

preview.addEventListener("load", () => preview.classList.toggle("tiny", isTiny(preview)));
preview.addEventListener("error", () => {
  if (preview.hidden) return;
  strokes = []; // an earlier drawing has no answer any more
  paintBoard();
  showFirstStage(); // the worker says what is wrong with the picture
});

const isTiny = (image) => Math.max(image.naturalWidth, image.naturalHeight) <= TINY;

for (const id of ["choose", "invite"]) element(id).addEventListener("click", () => fileInput.click());
fileInput.addEventListener("change", () => {
  if (fileInput.files.length > 0) takePicture(fileInput.files[0]);
  fileInput.value = ""; // the same file can be chosen again
});

let draggedOver = 0; // elements under the dragged file: a child is entered before its parent is left
document.addEventListener("dragenter", ({ dataTransfer }) => {
  draggedOver++;
  element("stage").classList.toggle("dropping", dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", () => {
  if (--draggedOver === 0) element("stage").classList.remove("dropping");
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  draggedOver = 0;
  element("stage").classList.remove("dropping");
  takeFiles(event.dataTransfer.files, "That is no file: save the picture first, then drop its file.");
});

document.addEventListener("paste", (event) =>
  takeFiles(event.clipboardData.files, "The clipboard has no picture: copy one first."),
);
element("paste").hidden = !navigator.clipboard?.read;
element("paste").addEventListener("click", async () => {
  try {
    for (const item of await navigator.clipboard.read()) {
      const type = item.types.find((each) => each.startsWith("image/"));
      if (type) return takePicture(await item.getType(type));
    }
    showAlert("The clipboard has no picture: copy one first.");
  } catch {
    showAlert("The browser does not let this page read the clipboard: press Ctrl+V or ⌘V instead.");
  }
});

/** Show the example pictures. They are loaded at once, to be there without a connection. */
async function showExamples() {
  for (const name of page.examples) {
    const content = contentOf(name);
    const picture =
      content instanceof ArrayBuffer ? new Blob([content]) : await (await fetch(content, { cache: "no-cache" })).blob();
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-label", `Example ${element("examples").children.length}`);
    button.addEventListener("click", () => takePicture(picture));
    image.alt = "";
    image.addEventListener("load", () => image.classList.toggle("tiny", isTiny(image)));
    image.src = URL.createObjectURL(picture);
    button.append(image);
    element("examples").append(button);
    element("examples").hidden = false;
  }
  if (page.examples.length > 1) element("examples-heading").textContent = "Examples";
}

// ---- The camera ----

element("camera").hidden = !navigator.mediaDevices?.getUserMedia;
let lastCameraCall = 0; // only the newest may show the camera, and none after another picture
element("camera").addEventListener("click", async () => {
  const cameraCall = ++lastCameraCall;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (cameraCall !== lastCameraCall) return stopStream(stream);
    stopStream(video.srcObject);
    video.srcObject = stream;
  } catch (error) {
    if (cameraCall !== lastCameraCall) return;
    const isForbidden = error.name === "NotAllowedError";
    showAlert(
      isForbidden
        ? "The browser does not allow the camera: allow it in the settings of this page."
        : "There is no camera, or another program uses it.",
    );
    return;
  }
  showAlert("");
  element("shoot").disabled = true;
  showStage("camera");
});
video.addEventListener("loadeddata", () => {
  element("shoot").disabled = false;
  element("shoot").focus();
});
element("shoot").addEventListener("click", () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => takePicture(blob));
  element("camera").focus();
});
element("close-camera").addEventListener("click", closeCamera);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !video.hidden) closeCamera();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && !video.hidden) closeCamera();
});

function closeCamera() {
  showStage(stageWithoutCamera);
  element("camera").focus();
}

function stopCamera() {
  lastCameraCall++;
  stopStream(video.srcObject);
  video.srcObject = null;
}

function stopStream(stream) {
  for (const track of stream?.getTracks() ?? []) track.stop();
}

// ---- The board ----

let strokes = []; // of points [x, y] from 0 to 1
let pen = { x: 0.5, y: 0.5, isDown: false, isShown: false }; // of the keyboard

function addPoint(x, y) {
  strokes.at(-1).push([x, y]);
  changeDrawing(false);
}

function changeDrawing(isFinal) {
  paintBoard();
  if (strokes.length > 0) classify(page.drawing ? normalizeDrawing : boardPixels, isFinal);
}

function paintBoard() {
  paintDrawing(board);
  const context = board.getContext("2d");
  if (pen.isShown) {
    context.strokeStyle = pen.isDown ? "#f59e0b" : "#8b8fa3";
    context.lineWidth = 4;
    context.beginPath();
    context.arc(pen.x * board.width, pen.y * board.height, 18, 0, 7);
    context.stroke();
  }
  element("board-hint").hidden = strokes.length > 0;
}

/** Paint the strokes. `place` gives the place of a point in parts of the canvas, `stroke` the width of the pen. */
function paintDrawing(canvas, place = (x, y) => [x, y], stroke = 0.07) {
  const context = canvas.getContext("2d");
  const toPixels = (point) => place(...point).map((part) => part * canvas.width);
  context.fillStyle = PAPER[page.board];
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.strokeStyle = INK[page.board];
  context.lineWidth = stroke * canvas.width;
  context.lineCap = context.lineJoin = "round";
  for (const [first, ...others] of strokes) {
    context.beginPath();
    context.moveTo(...toPixels(first));
    for (const point of others.length ? others : [first]) context.lineTo(...toPixels(point)); // a line of length 0 is a dot
    context.stroke();
  }
}

/** A square canvas whose pixels are read. */
function createCanvas(side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  canvas.getContext("2d", { willReadFrequently: true });
  return canvas;
}

function boardPixels() {
  const canvas = createCanvas(board.width);
  paintDrawing(canvas);
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
}

/** The drawing as a picture like those that the model was trained on: they fill a box of their picture. */
function normalizeDrawing() {
  const { size, width, height, stretch, stroke } = page.drawing;
  const [xs, ys] = [0, 1].map((axis) => strokes.flat().map((point) => point[axis]));
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const [most, mostDown] = [(width - stroke) / (right - left), (height - stroke) / (bottom - top)];
  const scale = Math.min(most, mostDown, 100); // a dot has no size
  const [across, down] = [Math.min(most, stretch * scale), Math.min(mostDown, stretch * scale)];

  const cell = Math.ceil(256 / size);
  const canvas = createCanvas(size * cell);
  const place = (x, y) => [
    0.5 + across * (x - (left + right) / 2), // in the middle
    0.5 + down * (y - (top + bottom) / 2),
  ];
  paintDrawing(canvas, place, stroke);
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return averageCells(pixels, cell);
}

/** Each pixel of the result is the mean of a cell of grey pixels. */
function averageCells({ data, width }, cell) {
  const size = width / cell;
  const result = new ImageData(size, size);
  for (let y = 0; y < size; y++)
    for (let x = 0; x < size; x++) {
      let sum = 0;
      for (let i = 0; i < cell; i++)
        for (let j = 0; j < cell; j++) sum += data[4 * ((y * cell + i) * width + x * cell + j)];
      const mean = sum / cell ** 2;
      result.data.set([mean, mean, mean, 255], 4 * (y * size + x));
    }
  return result;
}

function showSeen(pixels) {
  const canvas = element("seen").querySelector("canvas");
  [canvas.width, canvas.height] = [pixels.width, pixels.height];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  element("seen").hidden = false;
}

function clearBoard() {
  strokes = [];
  pen.isDown = false;
  drawingPointer = null;
  forgetPictures();
  showAlert("");
  clearAnswer();
  paintBoard();
}

function placeOf(event) {
  const box = board.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

let drawingPointer = null;
board.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  drawingPointer = event.pointerId;
  board.setPointerCapture(drawingPointer);
  pen.isShown = pen.isDown = false;
  strokes.push([]);
  addPoint(...placeOf(event));
});
board.addEventListener("pointermove", (event) => {
  if (event.pointerId !== drawingPointer) return;
  const events = event.getCoalescedEvents?.() ?? [];
  for (const each of events.length ? events : [event]) strokes.at(-1).push(placeOf(each));
  changeDrawing(false);
});
for (const name of ["pointerup", "pointercancel"])
  board.addEventListener(name, (event) => {
    if (event.pointerId !== drawingPointer) return;
    drawingPointer = null;
    changeDrawing(true);
  });

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
board.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key in ARROWS) {
    const [right, down] = ARROWS[event.key];
    pen.x = Math.min(Math.max(pen.x + PEN_STEP * right, 0), 1);
    pen.y = Math.min(Math.max(pen.y + PEN_STEP * down, 0), 1);
    if (pen.isDown) addPoint(pen.x, pen.y);
  } else if (event.key === " ") {
    pen.isDown = !pen.isDown;
    if (pen.isDown) strokes.push([[pen.x, pen.y]]);
    else changeDrawing(true);
    if (pen.isDown) announce("Pen down");
  } else if (event.key === "Delete" || event.key === "Backspace") {
    clearBoard();
    announce("Cleared");
  } else return;
  event.preventDefault(); // arrow keys would scroll
  pen.isShown = true;
  paintBoard();
});
board.addEventListener("blur", () => {
  const wasDown = pen.isDown;
  pen.isShown = pen.isDown = false;
  if (wasDown) changeDrawing(true);
  else paintBoard();
});

element("clear").addEventListener("click", clearBoard);
element("draw").addEventListener("click", () => {
  showStage("board");
  clearBoard();
  board.focus();
});

// ---- Start ----

board.classList.add(page.board);
board.setAttribute("aria-label", page.characters ? `Board to draw ${drawnThing()}` : "Drawing board");
element("board-hint").textContent = page.characters ? `Draw ${drawnThing()}` : "Draw";
clearAnswer();
paintBoard();
showFirstStage();
element("best").textContent = "Loading the model …";
loaded = start();
loaded
  .then(showFacts)
  .catch((error) => showAlert(error.message))
  .finally(() => {
    if (answered === null) clearAnswer();
  });
showExamples().catch(() => {}); // the page works without them
