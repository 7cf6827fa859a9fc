"""Gives a process the stand-in GPU if this folder is on its path: test_cuda_emulated.py puts it there."""

import os

import cuda_stand_in

cuda_stand_in.install(os.environ["FLASHCOMM_CUDA_STAND_IN"])
