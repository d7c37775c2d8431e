"""`pagoda evaluate`: FID and its relatives of a phase's samples, or of anybody's pictures."""

from absl import flags

from pagoda_jax import config as configs
from pagoda_jax.cli import common
from pagoda_jax.cli.sample import LARGEST_SEED
from pagoda_jax.evaluation import evaluate, plans
from pagoda_jax.networks.frozen.inception import GRAPHS
from pagoda_jax.runtime import distributed
from pagoda_jax.runtime.files import write_sealed
from pagoda_jax.training import workdir
from pagoda_jax.use import sample

OF_WORKDIR = ('phase', 'step', 'ema', 'num_images', 'labels', 'guidance', 'seed')


def define_flags(fv) -> None:
  common.define_folder(fv, 'workdir', 'Work directory of a run.', required=False)
  flags.DEFINE_string('images', None, 'Instead: finished pictures, an .npz (arr_0, uint8 NHWC) or a folder.',
                      flag_values=fv)
  flags.DEFINE_string('phase', '', 'Phase to draw from; default: the last that has a checkpoint.', flag_values=fv)
  flags.DEFINE_string('step', '', "Step of the checkpoint, 'best', a range such as 1000-5000, or 'all'; default: the "
                      'newest.', flag_values=fv)
  flags.DEFINE_string('ema', '', 'Of a teacher with several averages: which; default: the first.', flag_values=fv)
  flags.DEFINE_string('metrics', '', f'Of {", ".join(plans.METRICS)}; default: fid, precision_recall, kid, and '
                      'fd_dinov2 where its file is here, of held-out pictures too.', flag_values=fv)
  flags.DEFINE_integer('num_images', 50_000, 'Images to draw.', lower_bound=1, flag_values=fv)
  flags.DEFINE_string('reference', '', 'What samples are compared with: data (of --workdir, its default), statistics '
                      'or pictures in .npz (ADM, EDM) or .pkl (EDM2), a name of `pagoda weights list`, folder:PATH, '
                      'tfds:NAME, array_record:PATH, mnist.', flag_values=fv)
  flags.DEFINE_enum('features', 'inception', ['inception', 'data'], 'Of FID, IS, KID, precision and recall: Inception-'
                    'v3, or a small network trained on the reference, with nothing downloaded.', flag_values=fv)
  flags.DEFINE_enum('resize', 'tensorflow', GRAPHS, 'How pictures are resized for Inception: as the ADM evaluator and '
                    'EDM do, or as pytorch-fid or clean-fid.', flag_values=fv)
  flags.DEFINE_string('labels', 'random', "Classes: 'cycle', 'random', or a list such as 3,5,7.", flag_values=fv)
  flags.DEFINE_string('guidance', '', 'Strength of guidance; several, such as 1,2,4, one after the other.',
                      flag_values=fv)
  flags.DEFINE_integer('seed', 0, 'Seed: image i is that of `pagoda sample`.', lower_bound=0, upper_bound=LARGEST_SEED,
                       flag_values=fv)
  flags.DEFINE_integer('batch_size', 100, 'Images a call: changes time and memory, not figures.', lower_bound=1,
                       flag_values=fv)
  flags.DEFINE_integer('resolution', 0, 'Of --images: side in pixels that a folder is cut to; default: pictures are '
                       'taken as they are.', lower_bound=0, upper_bound=8192, flag_values=fv)
  flags.DEFINE_string('clip', '', "Of the metric clip: folder of a published CLIP, in transformers' form; better "
                      'another than the one that the captions are embedded by.', flag_values=fv)
  flags.DEFINE_string('weights_dir', '', 'Folder looked in for published files first.', flag_values=fv)
  common.define_file(fv, 'out', None, 'JSON to write; of a run besides that in the folder `evaluate` of its phase.')


def run(fv, args) -> int:
  del args
  if (fv.workdir is None) == (fv.images is None):
    raise ValueError('give --workdir=RUN or --images=FILE_OR_FOLDER' + (', not both' if fv.images else ''))
  of_other = OF_WORKDIR if fv.images else ('resolution',)
  if given := [name for name in of_other if fv[name].present]:
    raise ValueError(f'--{given[0]}={fv[given[0]].value}: is of {"--workdir" if fv.images else "--images"}, and '
                     f'{"--images" if fv.images else "--workdir"} is given')
  asked = evaluate.Request(
    fv.metrics, fv.num_images, fv.reference, fv.features, fv.resize, fv.labels, sample.parse_guidance(fv.guidance),
    fv.seed, fv.batch_size, fv.resolution, fv.weights_dir, fv.clip)
  if fv.images:
    results = [evaluate.of_images(fv.images, asked)]
    _say(results[0], fv.images)
    _write(fv.out, results)
  else:
    results = []
    config, name = workdir.image_phase(fv.workdir, fv.phase)
    if configs.has_text(config) and fv['labels'].present:
      raise ValueError(f'--labels={fv.labels}: {name} is of captions, not of classes')
    sample.check_guidance(config, name, asked.guidance)
    keeps = evaluate.can_keep(fv.workdir, name)
    if not keeps and not fv.out:  # before hours of drawing
      raise ValueError(f'{fv.workdir}/{name}/{evaluate.FOLDER}: cannot be written to; give --out=FILE, where figures '
                       'then go alone')
    for result in evaluate.of_phase(config, fv.workdir, name, fv.step, asked, fv.ema):
      results.append(result)
      drawn = result['samples']
      strength = '' if drawn['guidance'] is None else f', guidance {drawn["guidance"]:g}'
      place = evaluate.write(fv.workdir, result) if keeps else fv.out
      _say(result, f'{drawn["phase"]}, step {drawn["step"]}{strength}: {place}')
      _write(fv.out, results)  # each as it comes: the next may take hours, or not come
  return 0


def _write(out, results):
  if out and distributed.is_primary():
    write_sealed(out, results[0] if len(results) == 1 else {'results': results})


def _say(result, title):
  if distributed.is_primary():
    print(title)
    print(evaluate.table(result), flush=True)
