"""experiments/emoji_text.py's pictures and captions, and what its figure counts."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from pagoda_jax.data import captions, folders

EXPERIMENTS = pathlib.Path(__file__).parent.parent / 'experiments'
RED, WHITE, BLUE, NONE = (220, 40, 50, 255), (250, 250, 250, 255), (60, 90, 230, 255), (0, 0, 0, 0)


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


emoji, figure = load(EXPERIMENTS / 'emoji_text.py'), load(EXPERIMENTS / 'figures' / 'emoji_text_retrieval.py')


def write_packages(folder, rows):
  """The two packages with these emoji: (code points, label, tags, colours from left to right)."""
  (folder / 'twitter/img/twitter/64').mkdir(parents=True)
  (folder / 'names/en').mkdir(parents=True)
  listed = [{'hexcode': code, 'label': label, 'tags': tags, 'group': 1} for code, label, tags, _ in rows]
  (folder / 'names/en/data.json').write_text(json.dumps(listed + [
    {'hexcode': '1F3FB', 'label': 'light skin tone', 'group': 2}, {'hexcode': '1F1E6', 'label': 'regional indicator A'},
    {'hexcode': '1F999', 'label': 'has no picture', 'group': 3}]))
  for code, *_, stripes in [*rows, ('1F3FB', RED), ('1F1E6', BLUE)]:
    pixels = np.repeat(np.uint8([stripes if isinstance(stripes, list) else [stripes]]), 8, 0)
    name = code.lower().replace('2764-', '2764-fe0f-')
    Image.fromarray(pixels.repeat(8 // pixels.shape[1], 1)).save(folder / f'twitter/img/twitter/64/{name}.png')


def test_families_are_held_out_whole_and_captions_name_what_is_seen(tmp_path, capsys):
  rows = [(f'{code:X}', f'thing {code}', ['tagged', 'thing'], [RED, (code % 256, 90, 230, 255)])
          for code in range(0x1F400, 0x1F4C8)]
  runners = [('1F3C3', 'person running', ['fast'], [RED, WHITE, BLUE, NONE]),
             ('1F3C3-200D-2640-FE0F', 'woman running', ['fast'], [RED, WHITE]),
             ('1F3C3-200D-2642-FE0F-200D-27A1-FE0F', 'man running facing right', [], [RED, BLUE])]
  cooks = [(f'1F46{digit}-200D-1F373', name, [], [BLUE]) for digit, name in (('8', 'man cook'), ('9', 'woman cook'))]
  flags = [('1F1F3-1F1F4', 'flag: Norway', [], [RED, WHITE, RED, BLUE]),
           ('1F1E7-1F1FB', 'flag: Bouvet Island', [], [RED, WHITE, RED, BLUE])]
  couples = [(f'1F469-200D-2764-200D-1F46{i}', f'couple with heart: woman, {i}', [], [RED]) for i in (8, 9)]
  write_packages(tmp_path, rows + runners + cooks + flags + couples)
  emoji.prepare(tmp_path / 'twitter', tmp_path / 'names', tmp_path / 'out')
  found = {part: [json.loads(line) for line in (tmp_path / 'out' / part / 'captions.jsonl').read_text().splitlines()]
           for part in ('train', 'held_out')}
  files = {part: {row['file'] for row in lines} for part, lines in found.items()}
  assert not files['train'] & files['held_out']
  assert len(files['train'] | files['held_out']) == len(rows) + 9  # no skin tones, no letters, none without a picture
  assert 0.04 < len(files['held_out']) / len(rows) < 0.18
  for family in (runners, cooks, flags, couples):
    parts = {part for part, some in files.items() for code, *_ in family
             if f'{emoji._key(code).lower()}.png' in some}
    assert len(parts) == 1
  # A line each: the name, with its tags, anew with the colours that the name does not say.
  lines = [row for some in found.values() for row in some if row['file'] == '1f3c3-200d-2640.png']
  assert [row['caption'] for row in lines] == ['woman running', 'woman running, fast', []]
  assert lines[2]['recaption'] == 'a red and white woman running'
  assert emoji.captions('red flag', [], ['red', 'grey'])[1] == ['a grey red flag']
  assert emoji.captions('orange', ['Orange'], ['orange']) == (['orange'], ['an orange'])
  # Over white; and the source reads it, three captions of one picture as three pictures.
  runner = next(part for part, some in files.items() if '1f3c3.png' in some)
  assert np.asarray(Image.open(tmp_path / 'out' / runner / '1f3c3.png'))[0, -1].tolist() == [255, 255, 255]
  source = folders.open_folder(str(tmp_path / 'out' / 'train'))
  assert len(source) == len(found['train'])
  assert {kind for i in range(len(source)) for kind, _ in captions.of_record(source[i])} == set(captions.KINDS)
  assert 'pictures' in capsys.readouterr().out


@pytest.mark.parametrize('rgb, name', [
  ((221, 46, 68), 'red'), ((193, 105, 79), 'brown'), ((244, 144, 12), 'orange'), ((253, 203, 88), 'yellow'),
  ((120, 177, 89), 'green'), ((85, 172, 238), 'blue'), ((170, 142, 214), 'purple'), ((244, 171, 186), 'pink'),
  ((49, 55, 61), 'black'), ((230, 231, 232), 'white'), ((153, 170, 181), 'grey')])
def test_colours_of_twemoji_have_their_names(rgb, name):
  """Those of its hearts, circles and squares."""
  assert emoji.colours(Image.new('RGBA', (4, 4), rgb)) == [name]


def test_the_figure_is_one_tenth_by_chance_and_whole_where_pictures_are_their_own():
  rng = np.random.default_rng(0)
  unit = lambda shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(rng.standard_normal(shape))
  true, places, distinct = unit((400, 16)), np.arange(400), np.arange(400)
  chance = np.mean([figure.shares(unit((400, 2, 16)), true, places, distinct, seed).mean() for seed in range(5)])
  assert chance == pytest.approx(0.1, abs=0.02)
  own = figure.shares(true[:, None], true, places, distinct, 0)
  assert own.shape == (400,) and own.mean() == 1
  # One of two pictures right: half. Equal pictures are never one another's others.
  mixed = np.stack([true, np.roll(-true, 1, axis=0)], 1)
  assert 0.5 <= figure.shares(mixed, true, places, distinct, 0).mean() < 0.6
  twice = np.concatenate([true, true])
  assert figure.shares(true[:, None], twice, places, np.concatenate([distinct, distinct]), 0).mean() == 1
  # Pictures are compared at the detail that the phase has.
  image = rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
  small = np.asarray(Image.fromarray(image[0]).resize((16, 16), Image.Resampling.BOX))[None]
  np.testing.assert_array_equal(figure.view(image, 16), figure.view(small, 16))
  assert figure.view(image, 64).shape == (1, 32, 32, 3)
