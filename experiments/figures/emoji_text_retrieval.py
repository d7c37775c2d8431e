"""How often a picture drawn of a caption is nearer to the caption's own picture than to nine others, and a grid.

  python experiments/figures/emoji_text_retrieval.py runs/emoji data/emoji --phases=teacher,distill,grow_32,grow_64

Near is by cosine in the pictures' space of a two-tower model (pictures, names) that is trained here on the true
pictures of the training captions, by a contrastive loss: a second model, of another seed and other n-grams, which no
phase has seen. Only its tower of pictures is used; it never saw a held-out picture. All pictures are seen at 32 px, as
many details as the phase has: true pictures too are cut at the phase's side first. Others are drawn anew for each of
several seeds, among the true pictures of the same part that differ in a pixel; chance is 10 %.
"""

import argparse
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import pagoda_jax
from pagoda_jax.data.images import write_png
from pagoda_jax.networks.text import ngrams
from pagoda_jax.use import sample

SIDE, OTHERS, SEEDS = 32, 9, 5
STEPS, BATCH, RATE, FEATURES = 150, 256, 2e-3, 64
WORDS, WORD_WIDTH = 16, 320  # of the n-grams that this model sees, which are not those of the experiment
PROMPTS = ('a red flag', 'a green flag', 'a red heart', 'a blue circle', 'a black circle', 'a red apple',
           'a green apple', 'a yellow smiling cat')


class Towers(nn.Module):
  """Pictures and captions as unit vectors of one space."""

  def setup(self):
    self.convolutions = [nn.Conv(channels, (3, 3), strides=2) for channels in (32, 64, 128)]
    self.norms = [nn.GroupNorm(8) for _ in range(3)]
    self.picture_out = nn.Dense(FEATURES)
    self.text_in, self.text_out = nn.Dense(256), nn.Dense(FEATURES)
    self.scale = self.param('scale', nn.initializers.constant(np.log(10.0)), ())

  def picture(self, images: jax.Array) -> jax.Array:
    """[N, 32, 32, 3] in [-1, 1] -> [N, FEATURES]."""
    x = images
    for convolution, norm in zip(self.convolutions, self.norms):
      x = nn.silu(norm(convolution(x)))
    return _unit(self.picture_out(x.reshape(len(x), -1)))

  def __call__(self, images, texts):
    """-> (pictures, captions [N, FEATURES], scale of the logits)."""
    captions = _unit(self.text_out(nn.silu(self.text_in(texts))))
    return self.picture(images), captions, jnp.exp(jnp.minimum(self.scale, np.log(30.0)))


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def view(images: np.ndarray, detail: int) -> np.ndarray:
  """uint8 [N, S, S, 3] -> float32 [N, 32, 32, 3] in [-1, 1] with the details of pictures of side `detail`."""
  rows = []
  for image in images:
    picture = Image.fromarray(image)
    if detail < picture.width:
      picture = picture.resize((detail, detail), Image.Resampling.BOX)
    smaller = picture.width > SIDE
    rows.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)))
  return np.stack(rows).astype(np.float32) / 127.5 - 1


def words(captions: list[str]) -> np.ndarray:
  return ngrams.embed(captions, WORDS, 8, WORD_WIDTH)[2]


def trained(part: 'Part', seed: int):
  """pictures -> unit vectors [N, FEATURES], of a model trained on a part's pictures and captions."""
  towers, rng = Towers(), np.random.default_rng(seed)
  views = np.stack([view(part.pictures, detail) for detail in (16, SIDE)])
  texts = [words(captions) for captions in part.captions]
  params = jax.jit(towers.init)(jax.random.key(seed), views[0][:2], texts[0][[0, 0]])
  optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, STEPS), weight_decay=0.05)

  def loss_of(params, images, texts, noise_key):
    images = images + 0.1 * jax.random.normal(noise_key, images.shape)
    pictures, captions, scale = towers.apply(params, images, texts)
    logits, own = scale * pictures @ captions.T, jnp.arange(len(images))
    both = [optax.softmax_cross_entropy_with_integer_labels(some, own).mean() for some in (logits, logits.T)]
    return sum(both) / 2

  @jax.jit
  def step(params, state, images, texts, key):
    loss, grads = jax.value_and_grad(loss_of)(params, images, texts, key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  for number in range(STEPS):
    chosen = rng.choice(len(part.pictures), min(BATCH, len(part.pictures)), replace=False)
    images = np.pad(views[rng.integers(2, size=len(chosen)), chosen], ((0, 0), (2, 2), (2, 2), (0, 0)), mode='edge')
    top, left = rng.integers(5, size=2)
    some = np.stack([texts[i][rng.integers(len(texts[i]))] for i in chosen])
    params, state, loss = step(params, state, images[:, top : top + SIDE, left : left + SIDE], some,
                               jax.random.key(number))
    if number % 50 == 0 or number == STEPS - 1:
      print(f'second model, step {number + 1}: loss {float(loss):.3f}', flush=True)
  picture = jax.jit(lambda images: towers.apply(params, images, method=Towers.picture))
  caption = jax.jit(lambda texts: towers.apply(params, np.zeros((len(texts), SIDE, SIDE, 3), np.float32), texts)[1])
  return lambda images: np.asarray(picture(images)), lambda texts: np.asarray(caption(words(texts)))


class Part:
  """The pictures of output/train or output/held_out, uint8 [N, 64, 64, 3], and each one's captions, its name first."""

  def __init__(self, folder: pathlib.Path):
    by_file = {}
    for line in (folder / 'captions.jsonl').read_text(encoding='utf-8').splitlines():
      row = json.loads(line)
      by_file.setdefault(row['file'], []).append(row['caption'] or row['recaption'])
    self.captions = list(by_file.values())
    self.pictures = np.stack([np.asarray(Image.open(folder / file).convert('RGB')) for file in by_file])

  def some(self, count: int, seed: int = 0) -> np.ndarray:
    """Places of so many pictures, or of all."""
    order = np.random.default_rng(seed).permutation(len(self.captions))
    return np.sort(order[:count])


def shares(drawn: np.ndarray, true: np.ndarray, places: np.ndarray, distinct: np.ndarray, seed: int) -> np.ndarray:
  """For each caption, the share of its drawn pictures that are nearer to its own than to each of nine others.

  Args:
    drawn: [N, J, D] unit vectors, J pictures of each caption.
    true: [M, D] unit vectors of all true pictures.
    places: [N] of the captions' own pictures among them.
    distinct: [M] numbers, equal for equal pictures, which are never one another's others.
    seed: of the nine others, drawn anew for each caption.
  """
  rng, found = np.random.default_rng(seed), []
  for some, place in zip(drawn, places):
    others = rng.choice(np.flatnonzero(distinct != distinct[place]), OTHERS, replace=False)
    found.append(np.mean((some @ true[place])[:, None] > some @ true[others].T, axis=1) == 1)
  return np.array([row.mean() for row in np.reshape(found, (len(drawn), -1))])


def measured(pictures: np.ndarray, part: Part, places: np.ndarray, space) -> tuple[float, float, float]:
  """(share over captions and seeds, its standard error over captions, the standard deviation among seeds)."""
  detail = pictures.shape[2]
  drawn = space(view(pictures.reshape(-1, *pictures.shape[2:]), detail)).reshape(*pictures.shape[:2], -1)
  true = space(view(part.pictures, detail))
  distinct = np.unique(part.pictures.reshape(len(part.pictures), -1), axis=0, return_inverse=True)[1].reshape(-1)
  found = np.stack([shares(drawn, true, places, distinct, seed) for seed in range(SEEDS)])
  by_caption = found.mean(0)
  return found.mean(), by_caption.std(ddof=1) / np.sqrt(len(by_caption)), found.mean(1).std(ddof=1)


def main(flags) -> None:
  parts = {name: Part(flags.data / name) for name in ('train', 'held_out')}
  space, of_text = trained(parts['train'], flags.seed)
  for name, part in parts.items():
    places = part.some(flags.captions)
    said = of_text([part.captions[place][0] for place in places])[:, None]
    distinct, true = np.arange(len(part.pictures)), space(view(part.pictures, SIDE))
    rate = np.mean([shares(said, true, places, distinct, seed).mean() for seed in range(SEEDS)])
    print(f'{name}: {len(part.pictures)} pictures; the second model itself, name to true picture: {rate:.1%}')
  for phase in flags.phases.split(','):
    generator = pagoda_jax.load(flags.run, phase=phase)
    for omega in flags.guidance:
      for name, part in parts.items():
        places = part.some(flags.captions)
        for kind, which in (('name', 0), ('name and colours', -1))[: 1 if generator.kind == 'teacher' else 2]:
          prompts = [part.captions[place][which] for place in places]
          drawn = np.stack([generator(prompts=prompts, seed=seed, guidance=omega) for seed in range(flags.pictures)], 1)
          share, error, spread = measured(drawn, part, places, space)
          print(f'{phase}, omega {omega:g}, {name}, {kind}: {share:.1%}, standard error {error:.1%}; {len(places)} '
                f'captions, {flags.pictures} pictures each, {SEEDS} seeds of the others (deviation {spread:.1%})',
                flush=True)
          if kind == 'name':
            others = np.random.default_rng(0).permutation(len(places))
            share, error, _ = measured(drawn[others], part, places, space)
            print(f'  pictures of other captions instead: {share:.1%}, standard error {error:.1%}', flush=True)
  if flags.grid:
    write_grid(flags, parts['held_out'])


def write_grid(flags, part: Part) -> None:
  """Prompts of two noises each; below, held-out names as they come by chance, drawn, and their true pictures."""
  generator = pagoda_jax.load(flags.run, phase=flags.phases.split(',')[-1])
  draw = lambda prompts, seed: generator(prompts=prompts, seed=seed, guidance=flags.guidance[-1])
  places = part.some(len(PROMPTS))
  names = [part.captions[place][0] for place in places]
  side = generator.resolution
  true = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
          for image in part.pictures[places]]
  images = np.concatenate([draw(PROMPTS, 0), draw(PROMPTS, 1), draw(names, 0), np.stack(true)])
  texts = [*PROMPTS, *PROMPTS, *names, *(f'true: {name}' for name in names)]
  write_png(flags.grid, sample.captioned_grid(images, texts, len(PROMPTS)))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('run', type=pathlib.Path, help='work directory')
  parser.add_argument('data', type=pathlib.Path, help='what emoji_text.py --prepare wrote')
  parser.add_argument('--phases', default='teacher,distill,grow_32,grow_64')
  parser.add_argument('--guidance', type=lambda text: [float(part) for part in text.split(',')], default=[2.0])
  parser.add_argument('--captions', type=int, default=250, help='of each part; of the held-out ones there are fewer')
  parser.add_argument('--pictures', type=int, default=2, help='of each caption')
  parser.add_argument('--seed', type=int, default=1, help='of the second model')
  parser.add_argument('--grid', help='a PNG to write, of the last phase')
  main(parser.parse_args())
