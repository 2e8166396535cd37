"""Captions and indexes millions of images; see README.md for the flow."""

import os

__version__ = "0.1.0"

# PyTorch reads it when it first allocates: large tensors get pages of 2 MB, which cost less time to come by; and glibc,
# which keeps other blocks in pieces that fit nothing else, takes half the memory. Where a system has no such pages
# nothing changes.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
