"""`pagoda prepare`: pictures from anywhere into ArrayRecord shards of one resolution or several, or latents of them."""

import os

from absl import flags

from pagoda_jax.cli import common
from pagoda_jax.data import pictures, prepare, records
from pagoda_jax.weights import autoencoders


def define_flags(fv) -> None:
  flags.DEFINE_string('source', '', 'folder:PATH (class sub-folders, or a captions.jsonl), webdataset:PATH '
                      '(tars of .jpg, .png, .webp beside .txt, .json), tfds:NAME, array_record:PATH or mnist.',
                      flag_values=fv)
  common.define_folder(fv, 'output', 'Folder to write to: made if need be, gone on with if it is there.')
  flags.DEFINE_integer('resolution', 512, 'Side of the stored pictures in pixels.', lower_bound=1, flag_values=fv)
  flags.DEFINE_string('resolutions', None, 'Instead: several, such as 64,128,256,512, each cut from the original: '
                      'those that the phases of an experiment work at.', flag_values=fv)
  common.define_folder(fv, 'autoencoder', 'Stores latents instead of pictures, as mean and deviation: folder of an '
                       'autoencoder, of `pagoda convert` or `weights` in that of a phase that trained one.',
                       required=False)
  flags.DEFINE_bool('mirror', True, "With --autoencoder: stores mirror images' latents too, which config.data.mirror "
                    'needs.', flag_values=fv)
  flags.DEFINE_integer('workers', 0, 'Processes; 0: one for each core.', lower_bound=0, flag_values=fv)
  flags.DEFINE_integer('shard_size', 2048, 'Pictures a shard, the unit that is made anew after a crash.',
                       lower_bound=1, flag_values=fv)
  flags.DEFINE_enum('format', 'png', pictures.FORMATS, 'Format of the stored pictures; raw (pixels) is read fastest '
                    'and takes most room: for small ones, up to 64 px.', flag_values=fv)
  flags.DEFINE_integer('quality', 95, 'Quality of JPEGs.', lower_bound=1, upper_bound=100, flag_values=fv)
  common.define_number(fv, 'max_unreadable', 0.01, 'Share of pictures that may be unreadable; they are listed and left '
                       'out.', 0, 1)
  flags.DEFINE_string('data_dir', '', 'Of tfds; default: its own default.', flag_values=fv)
  flags.DEFINE_string('split', 'train', 'Of tfds.', flag_values=fv)
  flags.DEFINE_string('text_encoder', '', 'Also store embeddings of the captions, made by: clip:FOLDER or t5:FOLDER '
                      '(published weights with config.json and tokenizer), ngrams (nothing downloaded), or '
                      'module:function.', flag_values=fv)
  flags.DEFINE_integer('text_length', 77, 'Tokens of a caption; longer ones are truncated.', lower_bound=1,
                       upper_bound=4096, flag_values=fv)
  flags.DEFINE_integer('text_width', 0, "ngrams: width of a token's embedding and of a caption's; default 256.",
                       lower_bound=0, upper_bound=16_384, flag_values=fv)
  flags.DEFINE_bool('verify', False, 'Only check what is in --output against its checksums.', flag_values=fv)


def run(fv, args) -> int:
  del args
  if fv.verify:
    if given := [name for name in fv if fv[name].present and name not in ('verify', 'output')]:
      raise prepare.PrepareError(f'--{given[0]}={fv[given[0]].value}: --verify looks at what is in --output alone; '
                                 'leave one of the two out')
    print(prepare.summary(fv.output, prepare.verify(fv.output)) + ', all whole')
    return 0
  if fv.resolutions is not None and fv['resolution'].present:
    raise prepare.PrepareError(f'--resolution={fv.resolution}: cannot be given beside --resolutions={fv.resolutions}')
  sides = (fv.resolution,) if fv.resolutions is None else prepare.parse_resolutions(fv.resolutions)
  recipe, encoder = records.Recipe(sides, fv.format, fv.quality), None
  if fv.autoencoder is not None:
    if given := [name for name in ('format', 'quality', 'workers') if fv[name].present]:
      raise prepare.PrepareError(f'--{given[0]}={fv[given[0]].value}: is of pictures, and '
                                 f'--autoencoder={fv.autoencoder} stores latents')
    encoder = autoencoders.encoder(fv.autoencoder)
    recipe = prepare.latent_recipe(sides, encoder, fv.mirror)
  elif fv['mirror'].present:
    raise prepare.PrepareError(f'--mirror={fv.mirror}: is of latents (--autoencoder); pictures are mirrored as they '
                               'are read')
  if not fv.text_encoder and (given := [name for name in ('text_length', 'text_width') if fv[name].present]):
    raise prepare.PrepareError(f'--{given[0]}={fv[given[0]].value}: is of embeddings (--text_encoder)')
  if fv['quality'].present and fv.format != 'jpeg':
    raise prepare.PrepareError(f'--quality={fv.quality}: is of --format=jpeg; {fv.format} keeps every pixel as it is')
  if not fv.source.startswith('tfds:') and (given := [name for name in ('data_dir', 'split') if fv[name].present]):
    raise prepare.PrepareError(f'--{given[0]}={fv[given[0]].value}: is of --source=tfds:NAME')
  source = prepare.open_input(fv.source, fv.data_dir, fv.split)
  manifest = prepare.prepare(source, fv.output, recipe, fv.shard_size, fv.workers or os.cpu_count(), fv.max_unreadable,
                             _text_encoder(fv), encoder)
  print(prepare.summary(fv.output, manifest))
  return 0


def _text_encoder(fv):
  if not fv.text_encoder:
    return None
  from pagoda_jax.weights import text_encoders  # and JAX: only where captions are embedded

  return text_encoders.open_encoder(fv.text_encoder, fv.text_length, fv.text_width)
