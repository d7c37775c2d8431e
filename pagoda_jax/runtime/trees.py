"""Trees of arrays: their leaves by path, and a digest that tells two of them apart."""

import hashlib

import numpy as np
from flax import traverse_util


def flat_leaves(tree) -> dict:
  """'/'-joined path -> leaf of a tree of nested dicts and lists, in sorted order."""

  def as_dict(node):
    if isinstance(node, (list, tuple)):
      return {f'{i:04d}': as_dict(child) for i, child in enumerate(node)}
    return {str(key): as_dict(child) for key, child in node.items()} if isinstance(node, dict) else node

  flat = traverse_util.flatten_dict(as_dict(tree), sep='/')
  return {path: flat[path] for path in sorted(flat) if flat[path] is not None}


def hashed(tree):
  """hashlib's SHA-256 of every leaf's path, shape, dtype and bytes."""
  sha = hashlib.sha256()
  for path, leaf in flat_leaves(tree).items():
    leaf = np.asarray(leaf)
    sha.update(f'{path} {leaf.shape} {leaf.dtype}\n'.encode())
    sha.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
  return sha
