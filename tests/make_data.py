"""Small data sets on disk, made by the tests that read them."""

import io
import json
import os
import tarfile

import numpy as np
from array_record.python import array_record_module
from PIL import Image

CLASSES = ('bird', 'cat', 'dog')


def pixels(seed: int, side: int = 12) -> np.ndarray:
  """[side, side + 4, 3] uint8, another picture for each seed."""
  return np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, 'PNG')
  return buffer.getvalue()


def write_class_folders(folder, per_class: int = 4) -> None:
  """Pictures CLASS/00.png ...; picture number i of the sorted list shows pixels(i)."""
  for number, name in enumerate(CLASSES):
    (folder / name).mkdir(parents=True)
    for i in range(per_class):
      (folder / name / f'{i:02d}.png').write_bytes(png(pixels(number * per_class + i)))


def write_captions(folder, rows: list[dict]) -> None:
  """captions.jsonl; row i's file shows pixels(i) unless it is there already."""
  folder.mkdir(exist_ok=True)
  for i, row in enumerate(rows):
    if not (folder / row['file']).exists():
      (folder / row['file']).write_bytes(png(pixels(i)))
  (folder / 'captions.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def write_tfds(data_dir, name: str, count: int, label=lambda i: i % 3) -> None:
  """A data set as tensorflow-datasets lays it out (ArrayRecord; without TensorFlow): PNGs of pixels(i)."""
  import tensorflow_datasets as tfds

  folder = data_dir / name / '1.0.0'
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict({
    'image': tfds.features.Image(shape=(None, None, 3)),
    'label': tfds.features.ClassLabel(names=CLASSES),
  })
  writer = array_record_module.ArrayRecordWriter(
    str(folder / f'{name}-train.array_record-00000-of-00001'), 'group_size:1')
  for i in range(count):
    example = features.encode_example({'image': png(pixels(i)), 'label': label(i)})
    writer.write(features.serialize_example(example))
  writer.close()
  template = tfds.core.ShardedFileTemplate(
    dataset_name=name, data_dir=folder, split='train', filetype_suffix='array_record')
  split = tfds.core.SplitInfo(name='train', shard_lengths=[count], num_bytes=0, filename_template=template)
  tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)


def write_tar(path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> None:
  """A tar of files (name, content), one after the other; names may come twice."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', format=format) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
  """Members of captioned pictures: sample i shows pixels(i)."""
  return [member for i in range(first, first + count)
          for member in ((f'{i:03d}.png', png(pixels(i))), (f'{i:03d}.txt', f'picture {i}\n'.encode()))]


class Fatal:
  """A source whose pictures end the process that reads them."""

  class_names, all_labels, digest, resolution = (), None, '', None

  def __len__(self):
    return 4

  def __getitem__(self, index):
    os._exit(7)
