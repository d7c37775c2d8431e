"""What growth does to a picture: whether its object stays, and whether its fine detail is there."""

import numpy as np


def moved(base: np.ndarray, grown: np.ndarray, labels: np.ndarray) -> float:
  """How far objects move when their generator grows.

  The mean squared difference of `base` and `grown`, averaged down, over that of `base` and other pictures of the same
  class: 0 where growth only adds detail, 1 where it makes an unrelated picture of the class.

  Args:
    base: uint8 [N, r, r, C] of the generator before growth.
    grown: uint8 [N, R, R, C] of the one after it, of the same noise and labels; R is a multiple of r.
    labels: [N], every class at least twice.
  """
  side, factor = base.shape[1], grown.shape[1] // base.shape[1]
  blocks = grown.reshape(len(grown), side, factor, side, factor, -1).astype(np.float64)
  base, small = base.astype(np.float64), blocks.mean((2, 4))
  other = np.empty(len(labels), int)
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    other[members] = np.roll(members, 1)
  return float(np.mean((base - small) ** 2) / np.mean((base - small[other]) ** 2))


def fine_power(images: np.ndarray, real: np.ndarray) -> float:
  """Power of the images' finest octave over that of real ones: below 1 where they are blurred.

  Args:
    images, real: uint8 [N, R, R, C]; the octave is of the frequencies from R / 4 to R / 2 along either axis.
  """

  def power(pictures):
    side = pictures.shape[1]
    frequency = np.abs(np.fft.fftfreq(side, 1 / side))
    fine = np.maximum(*np.meshgrid(frequency, frequency)) >= side / 4
    spectrum = np.abs(np.fft.fft2(pictures.astype(np.float64), axes=(1, 2))) ** 2
    return spectrum[:, fine].mean()

  return float(power(images) / power(real))
