"""binaryvit.js in use: arguments, several calls at once, disposal, memory that runs out, and its parts against Python's."""

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from node import BROWSER, WASM, find_node, run_node
from PIL import Image, ImageColor
from snippets import IN_NODE, snippets_in

from binaryvit_runtime.browser.page import write_page
from binaryvit_runtime.pixels import normalize_colour
from binaryvit_runtime.resources import shipped_models


ROOT = Path(__file__).parents[2]
DIGITS = str(shipped_models()["binaryvit-digits"])
MODULES = [file for file in sorted(BROWSER.glob("*.js")) if file.stem not in ("page", "worker")]
START = """
const picture = (width, height, channels = 3) => ({ data: new Uint8Array(width * height * channels).fill(90), width, height });
const message = async (work) => { try { await work(); return "no error"; } catch (error) { return `${error.name}: ${error.message}`; } };
const print = (value) => console.log(JSON.stringify(value));
"""


def run(script: str, given=None):
    return run_node(START + script, given)


ARGUMENTS = {
    'model.classify(picture(4, 4), { topK: 0 })': "topK is the number of labels, 1 or more, not 0.",
    'model.classify(picture(4, 4), { topK: 1.5 })': "topK is the number of labels, 1 or more, not 1.5.",
    'model.classify(picture(4, 4), { background: "clear" })': "background must be null or an opaque colour such as white or '#ffcc00', not 'clear'.",
    'model.classify({ ...picture(4, 4), width: 5 })': "A picture of 5 x 4 pixels must have 3 (RGB) or 4 bytes (RGBA) a pixel, not 48 in all.",
    'model.classify({ data: [1, 2, 3], width: 1, height: 1 })': "The data of a picture must be a Uint8Array or a Uint8ClampedArray.",
    'model.classify({ data: new Uint8Array(0), width: 0, height: 5 })': "Width and height of a picture must be whole numbers from 1, not 0 and 5.",
    'model.classify("digit.png")': "Only browsers decode pictures; give { data, width, height } with the bytes of a decoder, such as sharp or pngjs.",
    'model.classify()': "Only browsers decode pictures; give { data, width, height } with the bytes of a decoder, such as sharp or pngjs.",
    'binaryvit.load({ ...parts, preprocessor: uncropped }, { engine: wasm })': "The image processor of 'model' (preprocessor_config.json) cannot be used: it makes images of (channels, height, width) (3, 32, 48), the network takes (3, 32, 32).",
    'model.preprocess("digit.png")': "A picture must be { data, width, height }: decodePicture makes one.",
    'model.computeLogits(new Float32Array(5))': "An image must be a Float32Array of 3072 numbers, (3, 32, 32).",
    'model.computeLogits(new Float64Array(3072))': "An image must be a Float32Array of 3072 numbers, (3, 32, 32).",
    'model.attention(picture(4, 4), 4)': "layer must be a whole number from 0 to 3, not 4.",
    'model.attention(picture(4, 4))': "layer must be a whole number from 0 to 3, not undefined.",
    'binaryvit.load(5, { engine: wasm })': "The model '5' cannot be loaded: a model is a URL, or an object with config, preprocessor and weights.",
    'binaryvit.load({}, { engine: wasm })': "The config of 'model' cannot be loaded: config.json is missing.",
    'binaryvit.load({ ...parts, preprocessor: undefined }, { engine: wasm })': "The image processor of 'model' (preprocessor_config.json) cannot be used: preprocessor_config.json is missing.",
    'binaryvit.load({ ...parts, weights: "x" }, { engine: wasm })': "The weights of 'model' cannot be loaded: the weights must be an ArrayBuffer, or ArrayBuffers by file name.",
    'binaryvit.load(given + "-none", { engine: wasm })': f"The model '{DIGITS}-none' cannot be loaded: it has no config.json.",
    'binaryvit.load("http://", { engine: wasm })': "The model 'http://' cannot be loaded: 'http://' is no URL.",
    'binaryvit.load(given, { engine: 5 })': "The engine is a URL, the bytes of binaryvit.wasm, or a module.",
    'binaryvit.load(given, { engine: given + "/none.wasm" })': f"There is no engine at 'file://{DIGITS}/none.wasm': copy binaryvit.wasm there, or give its URL as engine.",
    'binaryvit.load("ftp://host/model", { engine: wasm })': "The model 'ftp://host/model' cannot be loaded: The file 'ftp://host/model/config.json' cannot be read (",
    'binaryvit.load(given, { engine: Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0) })': "The engine is not the binaryvit.wasm of this version: take the file beside binaryvit.js.",
    'binaryvit.load(given, { engine: new Uint8Array(8) })': "The engine cannot be compiled (",
}  # fmt: skip


def test_wrong_arguments_are_named_in_one_sentence():
    script = """
    const model = await binaryvit.load(given, { engine: wasm });
    const read = (name) => readFileSync(`${given}/${name}`);
    const parts = { config: String(read("config.json")), preprocessor: String(read("preprocessor_config.json")), weights: read("model.safetensors") };
    const uncropped = { ...JSON.parse(parts.preprocessor), do_center_crop: false };
    """
    calls = ", ".join(f"await message(() => {call})" for call in ARGUMENTS)
    for call, expected, actual in zip(ARGUMENTS, ARGUMENTS.values(), run(f"{script} print([{calls}]);", DIGITS)):
        assert actual.startswith(f"BinaryViTError: {expected}"), call
        assert len(actual.splitlines()) == 1 and actual.endswith(".")


def test_a_model_is_loaded_from_memory_as_from_its_folder():
    """Objects, texts, their bytes, shards and typed arrays. What the caller does to them later has no effect."""
    script = """
    const read = (name) => readFileSync(`${given}/${name}`);
    const texts = { config: String(read("config.json")), preprocessor: String(read("preprocessor_config.json")) };
    const objects = { config: JSON.parse(texts.config), preprocessor: JSON.parse(texts.preprocessor) };
    const bytes = { config: read("config.json"), preprocessor: read("preprocessor_config.json") };
    const weights = Uint8Array.from(read("model.safetensors"));
    const shifted = new Uint8Array(weights.length + 1).subarray(1);
    shifted.set(weights);
    const engine = await WebAssembly.compile(readFileSync(wasm));
    const answers = [];
    for (const source of [given, new URL(`file://${given}/`), { ...texts, weights }, { ...bytes, weights }, { ...objects, weights: shifted },
                          { ...objects, weights: weights.slice().buffer }, { ...objects, weights: { "model.safetensors": weights } }]) {
      const model = await binaryvit.load(source, { engine });
      if (source.weights instanceof Uint8Array) source.weights.fill(0, 0, 8);
      answers.push([await model.classify(picture(50, 40)), model.labels, model.imageShape, model.bytes, model.numLayers]);
      weights.set(read("model.safetensors"));
    }
    print(answers);
    """
    first, *others = run(script, DIGITS)
    assert first[1:] == [[str(i) for i in range(10)], [3, 32, 32], {"weights": 294_944, "engine": None}, 4]
    assert others == [first] * 6


def test_a_store_may_forbid_files_that_are_not_there():
    """S3 does, unless everybody may list its files."""
    script = """
    import { createServer } from "node:http";
    import { existsSync } from "node:fs";
    const server = createServer((request, response) => {
      const file = given[request.url.split("/")[1]] + "/" + request.url.split("/").pop();
      response.writeHead(existsSync(file) ? 200 : 403);
      response.end(existsSync(file) ? readFileSync(file) : "");
    });
    await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
    const url = `http://127.0.0.1:${server.address().port}`;
    const model = await binaryvit.load(`${url}/0`, { engine: wasm });
    const forbidden = await message(() => binaryvit.load(`${url}/1`, { engine: wasm }));
    print([model.labels.length, forbidden.replaceAll(url, "")]);
    server.close();
    """
    assert run(script, [DIGITS, DIGITS + "-none"]) == [
        10,
        "BinaryViTError: The model '/1' cannot be loaded: The file '/1/config.json' cannot be read (the server answers 403).",
    ]


def test_a_node_that_is_too_old_says_so():
    script = (
        "process.getBuiltinModule = undefined; print(await message(() => binaryvit.load(given, { engine: wasm })));"
    )
    assert "is too old: use 20.16 or newer" in run(script, DIGITS)


def test_whole_numbers_in_an_object_may_be_floats():
    script = """
    const read = (name) => JSON.parse(String(readFileSync(`${given}/${name}`)));
    const parts = { preprocessor: read("preprocessor_config.json"), weights: readFileSync(`${given}/model.safetensors`) };
    const config = { ...read("config.json"), initializer_range: 0 };
    const load = (config) => message(() => binaryvit.load({ ...parts, config }, { engine: wasm }));
    print([await load(config), await load(JSON.stringify(config))]);
    """
    accepted, refused = run(script, DIGITS)
    assert accepted == "no error"
    assert "initializer_range must be from" in refused


def test_several_calls_at_once_and_disposal_between_them():
    script = """
    const model = await binaryvit.load(given, { engine: wasm });
    const pictures = [picture(50, 40), picture(40, 50, 4), picture(32, 32)];
    const alone = [];
    for (const each of pictures) alone.push(await model.classify(each));
    const together = await Promise.all([...pictures, ...pictures].map((each) => model.classify(each)));
    const other = await binaryvit.load(given, { engine: wasm });
    model.dispose();
    model.dispose();
    const after = [
      await message(() => model.classify(pictures[0])),
      await message(() => model.preprocess(pictures[0])),
      await message(() => model.computeLogits(new Float32Array(3072))),
      await message(() => model.attention(pictures[0], 0)),
    ];
    print({ alone, together, after, other: await other.classify(pictures[0]) });
    """
    found = run(script, DIGITS)
    assert found["together"] == found["alone"] * 2
    assert set(found["after"]) == {"BinaryViTError: The model is disposed: load it again."}
    assert found["other"] == found["alone"][0]


def limit_memory(module: bytes, pages: int) -> bytes:
    """The module with a maximum of 64 KiB pages for its memory."""
    place, sections = 8, [module[:8]]
    while place < len(module):
        kind, (length, start) = module[place], read_number(module, place + 1)
        body = module[start : start + length]
        if kind == 5:
            least, _ = read_number(body, 2)
            body = bytes([1, 1, *write_number(least), *write_number(pages)])
        sections.append(bytes([kind, *write_number(len(body))]) + body)
        place = start + length
    return b"".join(sections)


def read_number(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        place, shift = place + 1, shift + 7
        if data[place - 1] < 128:
            return value, place


def write_number(value: int) -> list[int]:
    return [value & 127 | 128, *write_number(value >> 7)] if value > 127 else [value]


def test_a_model_works_on_after_memory_ran_out(tmp_path):
    for pages in (60, 40):
        (tmp_path / f"{pages}.wasm").write_bytes(limit_memory(WASM.read_bytes(), pages))
    script = """
    const free = await binaryvit.load(given.digits, { engine: wasm });
    const small = picture(50, 40);
    const model = await binaryvit.load(given.digits, { engine: `${given.folder}/60.wasm` });
    const before = await model.classify(small);
    const refusals = [await message(() => model.classify(picture(2000, 2000))), await message(() => model.classify(picture(2000, 2000)))];
    print({
      before, refusals, after: await model.classify(small), expected: await free.classify(small),
      fashion: await message(() => binaryvit.load(given.fashion, { engine: `${given.folder}/40.wasm` })),
    });
    """
    fashion = str(shipped_models()["binaryvit-fashion-mnist"])
    found = run(script, {"digits": DIGITS, "fashion": fashion, "folder": str(tmp_path)})
    assert found["before"] == found["after"] == found["expected"]
    assert set(found["refusals"]) == {
        "BinaryViTError: The picture cannot be classified: The engine ran out of memory; use a smaller picture, or close "
        "other models."
    }
    assert found["fashion"].startswith(
        f"BinaryViTError: The weights of '{fashion}' cannot be loaded: The engine ran out of memory"
    )


def test_a_large_picture_leaves_no_large_memory():
    script = """
    const { Engine } = await import(given.engine);
    const engine = new Engine(await WebAssembly.compile(readFileSync(wasm)));
    const steps = { resample: 3, shortest_edge: 32, rescale: true, normalize: false, rescale_factor: 1 / 255, mean: [0, 0, 0], std: [0, 0, 0] };
    engine.preprocess(steps, picture(100, 100));
    const kept = engine.exports !== null;
    engine.preprocess(steps, picture(6000, 6000));
    print([kept, engine.exports !== null]);
    """
    assert run(script, {"engine": str(BROWSER / "engine.js")}) == [True, False]


def damaged_text(text: str, choose: random.Random) -> str:
    place, length = choose.randrange(len(text)), choose.randrange(1, 4)
    inserted = choose.choice(
        [
            "",
            "",
            '"',
            "\\",
            ",",
            "}",
            "]",
            "[",
            "{",
            ":",
            "-",
            "0",
            ".5",
            "e5",
            "NaN",
            "null",
            "\t",
            "\x01",
            "\\u00e9",
            "\\ud800",
            "é",
        ]
    )
    return text[:place] + inserted + text[place + length * (not inserted) :]


def test_json_is_read_as_python_reads_it():
    value = {"a": [1, 1.5, -2e3, 0, -0.0, 10**20, True, None], "b": {"c": 'text "é\\ \n', "d": {}}, "": [[], [[1.0]]]}
    choose = random.Random(0)
    texts = [json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False), "-0", "1e999", '"\\/"', "01", "1.", ".5", "+1", "[1,]", "'a'", " \n1\r\t", "\xa01", "", "-Infinity", "-NaN", "nul", "1 2", '{"a":1,"a":2}', "\ufeff1", "[" * 300 + "]" * 300]  # fmt: skip
    texts += [damaged_text(json.dumps(value), choose) for _ in range(1000)]
    script = """
    const { Float, parseJson } = await import(given.json);
    const show = (value) =>
      value instanceof Float ? { float: String(value.value) }
      : typeof value === "bigint" || typeof value === "number" ? { int: String(value) }
      : Array.isArray(value) ? value.map(show)
      : value !== null && typeof value === "object" ? { object: Object.entries(value).map(([name, each]) => [name, show(each)]).sort() }
      : value;
    print(given.texts.map((text) => { try { return [show(parseJson(text))]; } catch (error) { return error.name; } }));
    """
    actual = run(script, {"json": str(BROWSER / "json.js"), "texts": texts})
    refused = 0
    for text, found in zip(texts, actual):
        try:
            expected = [show(json.loads(text))]
        except ValueError:
            expected, refused = "SyntaxError", refused + 1
        assert found == expected, text
    assert 100 < refused < len(texts) - 100


def show(value):
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return {"int": str(value)}
    if isinstance(value, float):
        whole = value == int(value) if np.isfinite(value) else False
        words = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
        return {"float": str(int(value)) if whole else words.get(str(value), str(value))}
    if isinstance(value, list):
        return [show(each) for each in value]
    return {"object": sorted([name, show(each)] for name, each in value.items())}


def test_colours_are_those_of_pillow():
    choose = random.Random(0)
    colours = [*ImageColor.colormap, "#fc0", "#FFCC00", "#ffcc00ff", "#abcd", "White", " white", "whit", "", "rgb(1, 2,300)",
               "rgb(10%,50%,100%)", "rgb(1,2)", "rgba(1,2,3,4)", "rgb(-1,2,3)", "toString", "__proto__"]  # fmt: skip
    colours += [f"rgb({','.join(f'{choose.randrange(130)}%' for _ in range(3))})" for _ in range(50)]
    actual = run("const { readColour } = await import(given.file); print(given.colours.map(readColour));",
                 {"file": str(BROWSER / "colours.js"), "colours": colours})  # fmt: skip
    for colour, found in zip(colours, actual):
        try:
            expected = list(ImageColor.getrgb(normalize_colour(colour)))
        except ValueError:
            expected = None
        assert found == expected, colour


def test_every_alpha_is_composited_as_pillow_does():
    value, alpha = (each.astype(np.uint8) for each in np.mgrid[0:256, 0:256])
    picture = np.stack([value, 255 - value, value // 2, alpha], -1)
    background = (255, 7, 128)
    under = Image.new("RGBA", (256, 256), background)
    expected = np.asarray(Image.alpha_composite(under, Image.fromarray(picture)).convert("RGB"))
    script = """
    const { putOnBackground } = await import(given.file);
    const data = Uint8Array.from({ length: 4 << 16 }, (_, i) => {
      const value = i >> 10, alpha = (i >> 2) & 255;
      return [value, 255 - value, value >> 1, alpha][i & 3];
    });
    print([...putOnBackground({ data, width: 256, height: 256 }, given.background).data]);
    """
    actual = run(script, {"file": str(BROWSER / "pictures.js"), "background": background})
    np.testing.assert_array_equal(actual, expected.ravel())


@pytest.mark.parametrize("snippet", [each for each in snippets_in("js") if IN_NODE in each.text], ids=str)
def test_a_snippet_for_node_runs(snippet, tmp_path):
    write_page(DIGITS, tmp_path / "site")
    (tmp_path / "snippet.mjs").write_text(snippet.text)
    done = subprocess.run([find_node(), "snippet.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert "label:" in done.stdout


def test_names_at_the_top_differ_from_file_to_file():
    """So that the files can be joined into one script."""
    declared = r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+|\[.*?\])"
    groups = [name for file in MODULES for name in re.findall(declared, file.read_text(), re.M)]
    names = [name for group in groups for name in re.findall(r"\w+", group)]
    assert len(names) == len(set(names)) > 50, sorted(name for name in names if names.count(name) > 1)


def test_lines_are_as_long_as_in_python():
    files = [*MODULES, *BROWSER.glob("*.ts")]
    long = [f"{file.name}: {line}" for file in files for line in file.read_text().splitlines() if len(line) > 119]
    assert long == []


def test_types_are_those_of_the_module(tmp_path):
    compiler = find_typescript()
    shutil.copy(BROWSER / "binaryvit.d.ts", tmp_path / "binaryvit.d.ts")
    (tmp_path / "use.ts").write_text("""
import { BinaryViTError, UnsupportedModelError, decodePicture, load } from "./binaryvit.js";
import type { Attention, BinaryViTModel, Label, Picture } from "./binaryvit.js";
const model: BinaryViTModel = await load("https://host/folder");
await load(new URL("https://host/folder"), { engine: new ArrayBuffer(8), name: "digits" });
await load({ config: {}, preprocessor: "{}", weights: { "model-1.safetensors": new Uint8Array(8) } });
const picture: Picture = await decodePicture(new Blob());
const labels: Label[] = await model.classify(picture, { topK: 3, background: null });
await model.classify(new ImageData(1, 1));
await model.classify(document.createElement("canvas"));
const logits: Float32Array = model.computeLogits(model.preprocess(picture, { background: "white" }));
const attention: Attention = model.attention(picture, model.numLayers - 1);
const [height, width] = attention.keys;
const score: number = labels[0].score + model.imageShape[2] + (model.bytes.engine ?? 0);
const error: Error = new UnsupportedModelError("no") as BinaryViTError;
// @ts-expect-error
await model.classify(5);
// @ts-expect-error
await load({ config: {} });
// @ts-expect-error
model.labels.push("more");
model.dispose();
""")
    assert check_types(compiler, "--strict", str(tmp_path / "use.ts")) == ""


def test_types_in_the_comments_of_the_module_are_right():
    """The types that the comments declare fit each other and the code."""
    sources = [str(file) for file in MODULES if file.stem != "binaryvit"]
    assert check_types(find_typescript(), "--strict", "false", "--allowJs", "--checkJs", *sources) == ""


def check_types(compiler: Path, *arguments: str) -> str:
    """What the compiler has to say about files."""
    options = (
        "--noEmit --target es2022 --module esnext --moduleResolution bundler --lib es2023,dom,dom.iterable --types"
    )
    command = [str(find_node()), str(compiler), *options.split(), "", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def find_typescript() -> Path:
    """The compiler in the `node_modules` of this repository or of `NODE_PATH`. Skips the test where there is none."""
    places = [*map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep))), ROOT / "node_modules"]
    found = next(
        (place / "typescript" / "lib" / "tsc.js" for place in places if (place / "typescript").is_dir()), None
    )
    if found is None:
        pytest.skip("there is no typescript: npm install --no-save typescript")
    return found


def test_the_types_name_what_the_module_exports():
    exported = run("print(Object.keys(binaryvit));")
    types = (BROWSER / "binaryvit.d.ts").read_text()
    assert set(exported) == set(re.findall(r"^export (?:class|function) (\w+)", types, re.M))
    methods = run("print(Object.getOwnPropertyNames(binaryvit.BinaryViTModel.prototype));")
    for method in set(methods) - {"constructor"}:
        assert re.search(rf"^  {method}\(", types, re.M), method
