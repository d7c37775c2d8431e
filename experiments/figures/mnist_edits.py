"""Figures of `pagoda edit` on held-out digits of a finished MNIST run, as pagoda_jax/use/README.md has them.

  python experiments/figures/mnist_edits.py runs/mnist 100 30
"""

import sys

import numpy as np
from PIL import Image

import pagoda_jax
from pagoda_jax.data import stream as streams
from pagoda_jax.data.images import image_grid, write_png
from pagoda_jax.evaluation import small_data
from pagoda_jax.method import inverse_problems
from pagoda_jax.use import edit

OPTIONS = edit.Options(steps=100, tries=1, learning_rate=0.1)
HOLE = slice(10, 22)


def psnr(images, truth) -> float:
  """Mean over pictures of the peak signal-to-noise ratio, dB."""
  errors = np.square(images.astype(np.float64) - truth).mean((1, 2, 3))
  return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-3))))


def harmonic(pictures, hole) -> np.ndarray:
  """The hole filled so that each pixel is the mean of its four neighbours: the smoothest answer."""
  filled = np.where(hole, 0.0, pictures[..., 0])
  for _ in range(2000):
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1)), mode='edge')
    mean = (padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2]) / 4
    filled = np.where(hole, mean, filled)
  return filled[..., None]


def main(folder: str, inverted: int, fitted: int) -> None:
  """Prints figures of so many held-out digits by inversion, and by Adam, each as it is there; a picture of the latter
  goes to edits.png."""
  generator = pagoda_jax.load(folder)
  say(f'{generator.where}; {OPTIONS}')
  real = small_data.reference(generator.config, generator.name)
  if inverted:
    by_inversion(generator, real, inverted)
  if fitted:
    by_adam(generator, real, fitted)


def say(text: str) -> None:
  print(text, flush=True)


def of(generator, real, count):
  """(digits, the same at the base resolution, their labels, other labels)."""
  labels = real.held_labels[:count]
  small = streams.epoch_pictures(generator.config.data, generator.config.base_resolution, 'holdout', range(count))[0]
  say(f'{count} held-out digits, SVM on them: {real.accuracy(real.held_images[:count], labels):.1%}')
  return real.held_images[:count], small, labels, ((labels + 1 + np.arange(count) % 9) % 10).astype(np.int32)


def by_inversion(generator, real, count: int) -> None:
  truth, small, labels, wanted = of(generator, real, count)
  found = edit.reconstruct(generator, truth, labels, by='inversion')
  say(f'reconstruct by inversion: PSNR {psnr(found.images, truth):.2f}, SVM {real.accuracy(found.images, labels):.1%}')
  grown = edit.super_resolve(generator, small, labels, by='inversion')
  say(f'super_resolve by inversion: PSNR {psnr(grown.images, truth):.2f}, '
      f'SVM {real.accuracy(grown.images, labels):.1%}')
  styled = edit.restyle(generator, truth, wanted, labels, by='inversion')
  say(f'restyle by inversion: SVM sees the new label in {real.accuracy(styled.images, wanted):.1%}, '
      f'the old one in {real.accuracy(styled.images, labels):.1%}')


def by_adam(generator, real, count: int) -> None:
  truth, small, labels, wanted = of(generator, real, count)
  side, report = generator.resolution, lambda step, value: print(f'step {step}: {value:.4g}', file=sys.stderr)
  found = edit.reconstruct(generator, truth, labels, OPTIONS, report)
  say(f'reconstruct by Adam: PSNR {psnr(found.images, truth):.2f}, SVM {real.accuracy(found.images, labels):.1%}, '
      f'{found.steps} steps')
  styled = generator.of_noise(found.noise, wanted)
  say(f'restyle by Adam: SVM sees the new label in {real.accuracy(styled, wanted):.1%}, '
      f'the old one in {real.accuracy(styled, labels):.1%}')

  hole = np.zeros((1, side, side), bool)
  hole[:, HOLE, HOLE] = True
  painted, smooth = edit.inpaint(generator, truth, hole, labels, OPTIONS, report), harmonic(truth, hole)
  means = np.stack([real.images[real.labels == label].mean(0) for label in labels])
  error = lambda images: np.sqrt(np.square((images.astype(float) - truth)[:, hole[0]]).mean())
  say(f'inpaint a {HOLE.stop - HOLE.start} px square: rms error in it {error(painted.images):.1f} grey levels; '
      f'harmonic filling {error(smooth):.1f}, mean of the class {error(means):.1f}; '
      f'SVM {real.accuracy(painted.images, labels):.1%}, of harmonic filling {real.accuracy(smooth, labels):.1%}')

  enlarged = np.stack([np.asarray(Image.fromarray(x[..., 0]).resize((side, side), Image.Resampling.BICUBIC))[..., None]
                       for x in small])
  sharp = edit.super_resolve(generator, small, labels, OPTIONS, report)
  say(f'super_resolve by Adam, {small.shape[1]} -> {side} px: PSNR {psnr(sharp.images, truth):.2f}, SVM '
      f'{real.accuracy(sharp.images, labels):.1%}; bicubic {psnr(enlarged, truth):.2f}, '
      f'{real.accuracy(enlarged, labels):.1%}')

  matrix = inverse_problems.gaussian_blur(side, 2.0)
  blurred = np.einsum('ri,bijk,sj->brsk', matrix, truth, matrix).round().astype(np.uint8)
  undone = edit.deblur(generator, blurred, 2.0, labels, OPTIONS, report)
  say(f'deblur, sigma 2 px: PSNR {psnr(undone.images, truth):.2f}, SVM {real.accuracy(undone.images, labels):.1%}; '
      f'as blurred {psnr(blurred, truth):.2f}, {real.accuracy(blurred, labels):.1%}')

  holed = np.where(hole[..., None], np.uint8(127), truth)
  rows = [truth, found.images, styled, holed, painted.images, enlarged, sharp.images, blurred, undone.images]
  write_png('edits.png', image_grid(np.concatenate([row[:10] for row in rows]), 10))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
