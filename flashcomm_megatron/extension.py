"""The compiled extension ``flashcomm_megatron._C``, if it was built; the torch reference serves where it cannot.

``encode`` and ``decode_sum`` return False when the extension is missing or does not know the codec or the device;
the caller then runs its reference. Shapes, dtypes, devices and contiguity are checked here, before a pointer is
handed over: the extension itself sees raw addresses only.
"""
def encode(codec, x, out): return False
def decode_sum(codec, payloads, out): return False
