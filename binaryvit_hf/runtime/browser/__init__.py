"""
The engine in browsers and node: `binaryvit.js`, an ES module without dependencies that loads a packed model and classifies.

`binaryvit.js` has the public names, and `binaryvit.d.ts` their types. It imports its neighbours by relative paths, from
top to bottom:

- `model.js` classifies; `loading.js` reads a model's files, from a URL or from memory.
- `architecture.js` reads config.json, `checkpoint.js` the packed weights, `processor.js` preprocessor_config.json. They
  make the checks of the Python files with these names.
- `engine.js` calls `binaryvit.wasm`.
- `pictures.js` decodes pictures, `cut_off.js` finds damaged ones, `colours.js` reads colours.
- `safetensors.js` and `json.js` read the file formats; `errors.js` serves all.

`page.py` writes a web page around it: `page.html`, `page.css`, `page.js`, and `worker.js`, which computes. `server.py` serves
it to this machine.

The names at the top of these files differ from file to file, so that they can be joined into one script.
"""
