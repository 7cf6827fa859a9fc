"""``python -m flashcomm_megatron plan``: what compression would save on given GPUs; computed, never measured.

    python -m flashcomm_megatron plan --gpu L40 --tp 4 --model llama-3-70b --batch 8 --seq 1024 --bits 8,6,4

hardware.py   GPUs and links: published figures, each with its source
models.py     shapes of models
cost.py       the time of one collective, exact and compressed
serving.py    time to first token and tokens per second
cluster.py    one all-reduce over several nodes
measured.py   what a measurement may put in place of an assumption
printing.py   numbers as people write them, tables, the figures of --sweep
command.py    the command line and what it prints

Everything it prints is a projection and says so. docs/planner.md explains the model and where it errs.
"""

PROJECTION = "projection from published figures, not a measurement"
