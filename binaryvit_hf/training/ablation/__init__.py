"""
Ablations: train every row and seed of a table by one recipe with one teacher, and write the table of results.

    table.py       the rows of a table, checked before any training
    runs.py        the runs of all rows and seeds, their order, processes and interruption
    results.py     what the finished runs recorded -> the table, with its comparisons in words
    estimates.py   intervals and tests from the answers of several seeds to the same images
    pictures.py    accuracy against a cost, and differences with their intervals
"""
