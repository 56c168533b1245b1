"""
Describe a binary network in numbers and on a web page: `binaryvit inspect MODEL --out report.html`.

Input: a packed or latent classifier, pictures, and the records of its training run.
Output: measurements, as text for the terminal and as one HTML file without scripts.

    parts.py         the parts of a network (stem, layers, head) and the quantised layers in them
    storage.py       operations and bytes of each part; the size of the checkpoint's files
    signs.py         share of +1 of weights and activations, distance of latent weights from their threshold
    attention.py     share of attention probabilities that are quantised to 0
    pictures.py      reads the pictures that activations and attention are measured on
    measurements.py  measures all of these for one model
    figures.py       tables with bars, maps of cells and curves, as HTML and SVG
    report.py        the page: report.css, and the sections in sections.py
    summary.py       the text for the terminal
"""
