"""The LL band of the orthonormal Haar wavelet: of pictures, in the place of cutting smaller ones, and of noise."""


def band(images, levels: int = 1):
  """The LL band [..., H / 2^levels, W / 2^levels, C], of an array of floats, NumPy's or JAX's.

  A level turns four neighbours a, b, c, d into (a + b + c + d) / 2: twice their mean, so the band of pictures in
  [-1, 1] lies within 2^levels, and that of noise has the noise's own law. The other bands hold the rest of the energy,
  sum(images^2).

  Raises:
    ValueError: a side is no multiple of 2^levels.
  """
  *others, height, width, channels = images.shape
  if height % 2**levels or width % 2**levels:
    raise ValueError(f'{height} x {width}: cannot be halved {levels} times')
  blocks = images.reshape(*others, height >> levels, 2**levels, width >> levels, 2**levels, channels)
  return blocks.sum((-4, -2)) / 2**levels
