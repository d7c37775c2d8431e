"""Emoji from their names in one step, at 16, 32 and 64 px: text to image at a size that two cores train.

  npm pack emoji-datasource-twitter@16.0.0 && npm pack emojibase-data@17.0.0    # and unpack each
  python experiments/emoji_text.py --prepare=twitter/package --names=emojibase/package --output=data/emoji
  pagoda prepare --source=folder:data/emoji/train --output=data/emoji/records_train --resolutions=16,32,64 \
    --format=raw --text_encoder=ngrams --text_length=12 --text_width=128
  pagoda run --config=experiments/emoji_text.py --workdir=runs/emoji
  pagoda sample --workdir=runs/emoji --prompts="a red flag;a green apple" --guidance=2
  python experiments/figures/emoji_text_retrieval.py runs/emoji data/emoji --grid=grid.png

Pictures: Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0, in the npm package emoji-datasource-twitter
(MIT); names and tags: emojibase-data (MIT, after Unicode's CLDR). Neither is shipped here.

1,906 emoji without skin tones, over white. Of each three captions: its name, its name with four tags, and as if written
anew by somebody who sees it, its one or two colours before its name. 218 of them are held out with their captions: one
family in ten, a family being variants of one sign in gender and direction, all families of people, and pictures that
are equal in all pixels. Captions are embedded as hashed n-grams; what words mean, the networks learn.

How often the picture of a caption is nearer to its own true picture than to 9 others (chance: 10 %):

  evaluations an image      held-out name   with its colours    training name   with its colours
  teacher, 16 px    70      36.9 %                              44.9 %
  distill, 16 px     1      31.0 %          49.0 %              45.5 %          59.1 %
  grow_32            1      30.9 %          49.4 %              45.5 %          59.6 %
  grow_64            1      30.8 %          48.3 %              44.6 %          59.3 %

218 captions of each kind, omega = 2, one picture each of the teacher and two of the generators, five seeds of the
others; standard errors are 2.2 to 2.8 %, and pictures of other captions are at 8.9 to 11.9 %. Near is by cosine in the
space of pictures of a second model, trained on the true training pictures and their captions alone, for 150 steps;
longer, it learns them by heart (after 800 steps it finds 31.5 % of held-out names itself instead of 42.6 %, and
grow_64's figure is 24.6 % instead of 30.8 %). Colours come first: with them the figure is half as large again, and in
figures/emoji_text.png "a red heart", "a blue circle" and "a red apple", which are held out, are red, blue and red.
Things that no caption in training has get hardly a shape. Growth adds size and smooth edges, no details, and a faint
line at the border: 200 steps a rung are few.

Run on two cores that others computed on too, the teacher cut at step 3,244 by `--max_steps=3244`; distill had the
schedule of 300 steps for its first 127.
"""

import argparse
import colorsys
import hashlib
import json
import pathlib
from collections import Counter, defaultdict

import numpy as np
from PIL import Image

from pagoda_jax import config as c

HELD_OUT = 10  # one family in so many


def get_config(variant: str = ''):
  """`variant`: ''."""
  if variant:
    raise c.ConfigError(f'emoji_text.py:{variant}: has no variants')
  config = c.experiment(base_resolution=16)
  config.data.update({'source': 'array_record', 'path': 'data/emoji/records_train', 'resolution': 64, 'num_classes': 0,
                      'mirror': False})  # arrows, hands and flags have a left and a right
  config.text.update({'encoder': 'ngrams', 'length': 12, 'width': 128, 'pooled_width': 128})
  config.network = c.network(channels=32, channel_mult=(1, 2, 2), num_blocks=1, attention_resolutions=(8, 4),
                             channels_per_head=32, text_attention='cross', text_channels=64)
  config.diffusion.sigma_min = 0.02  # lower levels are hardly trained, and 8-bit pixels have steps of 0.008
  # Names, and what is written anew of them with their colours, as the paper has captions of two kinds.
  config.guidance.update({'law': 'uniform', 'low': 1.0, 'high': 4.0})
  config.guidance.recaptions.update({'law': 'truncated_normal', 'mean': 2.0, 'std': 1.0, 'low': 1.0, 'high': 4.0})
  config.checkpoint.update({'every_steps': 250, 'keep': 2})
  config.log.update({'every_steps': 20, 'samples_every': 100, 'samples': 64})
  c.add_phase(config, 'teacher', c.teacher(
    steps=4000, batch_size=64, ema=0.998, label_dropout=0.1,
    optimizer=c.optimizer(name='adam', learning_rate=2e-3, warmup_steps=50, schedule='cosine')))
  c.add_phase(config, 'invert', c.invert(num_levels=6, add_noise=True, batch_size=256, shard_size=1024))
  c.add_phase(config, 'guide', c.guide(
    steps=40, batch_size=32, sample_levels=4, ema=0.98,
    optimizer=c.optimizer(name='adam', learning_rate=1e-3, warmup_steps=20, schedule='cosine')))
  players = {
    'guide': 'guide',
    'batch_size': 32,
    'ema': 0.98,
    'fakes': 'shared',  # a seventh less work
    'standardize_noise': True,  # of a teacher trained for so short
    'optimizer': c.optimizer(name='adam', learning_rate=1e-3, b1=0.5, schedule='cosine'),
    'discriminator_optimizer': c.optimizer(name='adam', learning_rate=1e-3, b1=0.5),
    'discriminator': c.discriminator(channels=32, scales=1, spectral_norm=False, augment=('translation',)),
  }
  # Held back: what the discriminator makes of omega is not what guidance is (pagoda_jax/README.md).
  c.add_phase(config, 'distill', c.distill(steps=500, adversarial=c.adversarial(weight=0.05), **players))
  # The inverted noise knows the 16 px picture: finer pixels are compared with less weight.
  c.add_phase(config, 'grow_32', c.grow(
    start='distill', resolution=32, channels=32, num_blocks=1, steps=200,
    reconstruction=c.reconstruction(scale_weights=(0.2, 1.0, 1.0)),
    adversarial=c.adversarial(weight=0.1), **players))
  c.add_phase(config, 'grow_64', c.grow(
    start='grow_32', resolution=64, channels=24, num_blocks=0, steps=200,
    reconstruction=c.reconstruction(scale_weights=(0.1, 0.3, 1.0, 1.0)),
    adversarial=c.adversarial(weight=0.1), **players))
  return config


# What the pictures are of, and which of them are held out.

GENDERS = {'1F468': '1F9D1', '1F469': '1F9D1'}  # man and woman, as person
LEFT_OUT = ('200D', 'FE0F', '2640', '2642', '27A1', '2B05')  # joiner, style, genders, directions
PEOPLE = ('family', 'kiss', 'couple with heart')
LEAST = 0.2  # share of a picture that a colour is named from


def _key(hexcode: str) -> str:
  """A sequence of code points as file names and emojibase both give it."""
  return '-'.join(part for part in hexcode.upper().split('-') if part != 'FE0F')


def colours(picture: Image.Image) -> list[str]:
  """The one or two colours that most of a picture (RGBA) has, by name."""
  pixels = np.asarray(picture).reshape(-1, 4)
  named = Counter()
  for value, count in zip(*np.unique(pixels[pixels[:, 3] > 127, :3], axis=0, return_counts=True)):
    named[_colour(*value / 255)] += int(count)
  return [name for name, count in named.most_common(2) if count >= LEAST * named.total()]


def _colour(red, green, blue) -> str:
  hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
  chroma, hue = saturation * (1 - abs(2 * lightness - 1)), 360 * hue
  if chroma < 0.15:
    return 'black' if lightness < 0.3 else 'white' if lightness > 0.85 else 'grey'
  if 8 < hue < 45 and (lightness < 0.4 or lightness < 0.62 and chroma < 0.5):
    return 'brown'
  if (hue > 320 or hue < 12) and lightness > 0.68:
    return 'pink'
  bounds = ((14, 'red'), (40, 'orange'), (68, 'yellow'), (165, 'green'), (255, 'blue'), (295, 'purple'),
            (340, 'pink'), (361, 'red'))
  return next(name for bound, name in bounds if hue < bound)


def captions(label: str, tags: list[str], seen: list[str]) -> tuple[list[str], list[str]]:
  """(original, written anew): the name, also with what it is tagged by; the name with its colours before it."""
  more = [tag for tag in tags if tag.lower() not in label.lower()][:4]
  named = ' '.join([' and '.join(name for name in seen if name not in label.lower()), label]).strip()
  named = f'{"an" if named[0] in "aeiou" else "a"} {named}'
  return [label] + ([f'{label}, {", ".join(more)}'] if more else []), [named]


def families(rows: list[dict], pictures: dict[str, Image.Image]) -> dict[str, str]:
  """For each emoji (its key) the family that is held out as a whole: variants in gender and direction, all families
  of people, and equal pictures."""
  found, by_pixels = {}, defaultdict(list)
  for row in rows:
    key = _key(row['hexcode'])
    parts = [GENDERS.get(part, part) for part in key.split('-') if part not in LEFT_OUT]
    people = next((name for name in PEOPLE if row['label'].startswith(name)), '')
    found[key] = people or '-'.join(parts)
    by_pixels[pictures[key].tobytes()].append(key)
  for same in by_pixels.values():
    wanted = {found[key] for key in same}
    found = {key: min(wanted) if family in wanted else family for key, family in found.items()}
  return found


def is_held_out(family: str) -> bool:
  return int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], 'big') % HELD_OUT == 0


def prepare(twitter: pathlib.Path, emojibase: pathlib.Path, output: pathlib.Path) -> None:
  """Writes output/train and output/held_out: pictures over white, and captions.jsonl with a line for each caption."""
  files = {_key(file.stem): file for file in (twitter / 'img/twitter/64').glob('*.png')}
  rows = json.loads((emojibase / 'en/data.json').read_text(encoding='utf-8'))
  # Without skin tones, their swatches, and letters of flags
  rows = [row for row in rows if row.get('group', 2) != 2 and _key(row['hexcode']) in files]
  pictures = {_key(row['hexcode']): Image.open(files[_key(row['hexcode'])]).convert('RGBA') for row in rows}
  family_of = families(rows, pictures)
  lines = {'train': [], 'held_out': []}
  for row in rows:
    key = _key(row['hexcode'])
    part = 'held_out' if is_held_out(family_of[key]) else 'train'
    (output / part).mkdir(parents=True, exist_ok=True)
    picture = pictures[key]
    white = Image.new('RGBA', picture.size, 'white')
    white.alpha_composite(picture)
    white.convert('RGB').save(output / part / f'{key.lower()}.png')
    original, anew = captions(row['label'], row.get('tags', []), colours(picture))
    # A line each: which of a picture's captions training sees is fixed, and it is to see all.
    for text in original:
      lines[part].append({'file': f'{key.lower()}.png', 'caption': text})
    for text in anew:
      lines[part].append({'file': f'{key.lower()}.png', 'caption': [], 'recaption': text})
  for part, some in lines.items():
    text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in some)
    (output / part / 'captions.jsonl').write_text(text, encoding='utf-8')
    print(f'{output / part}: {len({line["file"] for line in some})} pictures, {len(some)} captions')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='Pictures and captions for experiments/emoji_text.py.')
  parser.add_argument('--prepare', type=pathlib.Path, required=True, help='folder of emoji-datasource-twitter')
  parser.add_argument('--names', type=pathlib.Path, required=True, help='folder of emojibase-data')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  prepare(flags.prepare, flags.names, flags.output)
