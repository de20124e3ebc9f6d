"""Side-by-side measurements: `python -m benchmarks.decode | prefill | train | stream | peers`.

Each asks one question, prints a table and the ratios that it stands for, and writes JSON and a
picture. Candidates take turns, A B A B ..., so that what else the machine does falls on all of
them, and a figure is the median of its turns.
"""
