"""The planner: what compression would save on given GPUs, links and models, computed, never measured.

    python -m flashcomm_megatron plan --gpu L40 --tp 4 --model llama-3-70b --batch 8 --seq 1024 --bits 8,6,4

``hardware.py`` holds published figures, ``models.py`` shapes of models, ``cost.py`` the cost of one collective and of
one step, ``inference.py`` time to first token and tokens per second, ``nodes.py`` many nodes, ``measured.py`` what a
measurement may put in place of an assumption, ``published.py`` what others measured, to check all this against.
Everything it prints is a projection and says so. docs/planner.md explains the model and where it errs.
"""

PROJECTION = "projection from published figures, not a measurement"
