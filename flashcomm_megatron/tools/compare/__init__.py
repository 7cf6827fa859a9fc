"""``python -m flashcomm_megatron compare RUN...``: training runs side by side: a page, pictures, a W&B view.

runs.py         what a run is, and reading it: JSON lines, the folder of a local W&B run, the W&B service
table.py        final numbers and their differences to a baseline
headline.py     one sentence: what won
plots.py        the figures
page.py         one HTML file that needs no network
workspace.py    the same comparison as a saved W&B workspace
command.py      the command line
"""
