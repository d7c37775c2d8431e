"""`pagoda evaluate` on the tiny run and on files: the same numbers by every way, and what is refused."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import published_files
import pytest
import tiny
from PIL import Image
from runs import pagoda

from pagoda_jax.data import sources
from pagoda_jax.evaluation import data_features, encoders, evaluate, paired, plans, references, representations, sums
from pagoda_jax.evaluation import pictures as sets
from pagoda_jax.evaluation.metrics import frechet
from pagoda_jax.evaluation.pictures import EvaluationError
from pagoda_jax.runtime import sharding
from pagoda_jax.runtime.files import file_digest, read_sealed
from pagoda_jax.training import checkpoints, workdir
from pagoda_jax.weights import locate
from pagoda_jax.weights.convert import torch_files
from pagoda_jax.weights.convert.unpickle import UnsafeFileError, WeightsFileError

COUNT = 40


@pytest.fixture
def quick(monkeypatch):
  """The small network of --features=data after a few steps."""
  monkeypatch.setattr(data_features, 'RECIPE', data_features.RECIPE | {'steps': 3, 'batch_size': 16, 'width': 8})


@pytest.fixture
def tiny_inception(monkeypatch):
  """In Inception's place: 6 features, 5 numbers of the maps and 4 logits by fixed products of the pictures' pixels."""
  rng = np.random.default_rng(0)
  variables = {name: rng.standard_normal((16 * 16, width)).astype(np.float32)
               for name, width in (('features', 6), ('spatial', 5), ('logits', 4))}

  def apply(variables, images):
    flat = images.astype(jnp.float32).mean(-1).reshape(len(images), -1) / 255
    return {name: flat @ matrix for name, matrix in variables.items()}

  def of_inception(weights_dir, graph):
    return encoders.Encoder(apply, variables, {'network': 'tiny', 'sha256': '0', 'resize': graph})

  monkeypatch.setattr(encoders, 'of_inception', of_inception)
  return variables


def test_figures_of_a_run_need_nothing_downloaded_and_no_devices_or_batches_change_them(
    finished, tmp_path, quick, monkeypatch, capsys):
  folder = shutil.copytree(finished, tmp_path / 'run')
  flags = [f'--workdir={folder}', '--features=data', '--metrics=fid,is,precision_recall,kid,psnr',
           f'--num_images={COUNT}', '--labels=cycle']
  assert pagoda('evaluate', *flags, '--batch_size=24', f'--out={tmp_path / "a.json"}') == 0
  shown = capsys.readouterr().out
  first = read_sealed(tmp_path / 'a.json')
  assert {'fd_data', 'is_data', 'is_shuffled_data', 'precision_data', 'recall_data', 'kid_data',
          'reconstruction_psnr'} <= set(first['metrics'])
  assert 'held out' in shown and f'{first["metrics"]["fd_data"]:.5g}' in shown
  # What repeats it.
  samples, (kept,) = first['samples'], (folder / 'grow_16' / 'evaluate').iterdir()
  params, step = checkpoints.read_generator(folder / 'grow_16')
  assert (samples['phase'], samples['step'], samples['seed'], samples['count']) == ('grow_16', step, 0, COUNT)
  assert samples['checkpoint_sha256'] == checkpoints.digest(params)
  assert read_sealed(kept) == first
  assert first['reference']['part'] == 'train' and first['reference']['count'] == 4500
  assert first['held_out']['count'] == 500 and first['fd_ratio']['of'].keys() == {'fd_data'}
  assert first['how']['kid']['images_of_a_subset'] == COUNT
  # One device, other batches.
  eight = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_, **__: eight(devices=jax.devices()[:1]))
  assert pagoda('evaluate', *flags, '--batch_size=7', f'--out={tmp_path / "b.json"}') == 0
  second = read_sealed(tmp_path / 'b.json')
  for group in ('metrics', 'held_out'):
    assert second[group] == pytest.approx(first[group], rel=1e-6, abs=1e-9), group
  assert {key: second[key] for key in ('samples', 'reference', 'features')} == {
    key: first[key] for key in ('samples', 'reference', 'features')}
  assert len(list((folder / 'grow_16' / 'evaluate').iterdir())) == 1  # the same request: replaced
  # The same pictures from a file, without the run.
  assert pagoda('sample', f'--workdir={folder}', f'--num_images={COUNT}', f'--out={tmp_path / "x.npz"}') == 0
  reference = references.of_data(*workdir.image_phase(folder, ''))
  encoder = data_features.encoder(reference.pictures, folder)
  monkeypatch.setattr(references, 'open_reference', lambda *_: reference)
  monkeypatch.setattr(data_features, 'encoder', lambda *_: encoder)
  found = evaluate.of_images(str(tmp_path / 'x.npz'), evaluate.Request('fid', reference='data', features='data'))
  # A grey level may differ here or there.
  assert found['metrics']['fd_data'] == pytest.approx(first['metrics']['fd_data'], rel=1e-3)
  assert found['samples']['sha256'] == file_digest(tmp_path / 'x.npz')


@pytest.mark.parametrize('name, asked, expected', [
  ('teacher', (), None), ('teacher', (3.0,), 3.0), ('distill', (), 2.0), ('distill', (3.0,), 3.0)])
def test_images_that_are_measured_are_guided_as_those_that_are_drawn(
    name, asked, expected, tmp_path, tiny_inception, monkeypatch):
  config, seen = tiny.get_config('guided'), []
  config.base_resolution, config.guidance.low = 16, 2.0
  monkeypatch.setattr(evaluate, 'sweep', lambda step, rows, *rest: seen.extend(rows(np.arange(3))[2:]))
  monkeypatch.setattr(evaluate.starts, 'read_average', lambda *where: ({}, 4))
  monkeypatch.setattr(references, 'open_reference', lambda *where: None)
  request = evaluate.Request('is', num_images=8, guidance=asked)
  found = next(evaluate.of_phase(config, tmp_path, name, '', request))
  assert [strengths.tolist() for strengths in seen] == ([] if expected is None else [[expected] * 3])
  assert found['samples']['guidance'] == expected


def test_the_datas_features_are_kept_made_again_where_damaged_and_learn_without_labels(tmp_path, quick):
  source = sources.open_whole('mnist')
  of = lambda source: sets.of_source(source, 'mnist', 16, 1)
  first = data_features.encoder(of(source), tmp_path)
  (path,) = (tmp_path / 'data_features').iterdir()
  stamp = path.stat().st_mtime_ns
  assert data_features.encoder(of(source), tmp_path).described == first.described
  assert path.stat().st_mtime_ns == stamp
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  assert data_features.encoder(of(source), tmp_path).described == first.described  # trained the same again
  pictures = dataclasses.replace(of(source), source=_Unlabelled(source))
  found = data_features.encoder(pictures, tmp_path)
  assert found.described['trained_by'] == 'contrast' and found.described['sha256'] != first.described['sha256']
  assert 'logits' not in found.widths(16, 16, 1)
  with pytest.raises(EvaluationError, match='no labels'):
    plan = plans.make('is', 'data', references.Reference({}, pictures=pictures), False)
    plan.check_outputs({f'data/{name}': width for name, width in found.widths(16, 16, 1).items()}, None)


@pytest.mark.parametrize('labels, first, kind', [
  ([0, 1] * 10, 0, 'labels'), ([0, 1] * 9 + [1, -1], 0, 'contrast'), (None, 3, 'labels'), (None, -1, 'contrast')])
def test_the_datas_features_are_of_labels_only_where_each_picture_has_one(tmp_path, monkeypatch, labels, first, kind):
  kinds, known = [], {'class_names': ('cat', 'dog'), 'all_labels': labels and np.array(labels)}
  source = type('Source', (dict,), known)({0: {'label': first}})
  monkeypatch.setattr(data_features, 'train', lambda reference, kind, outputs: kinds.append(kind) or {'a': np.ones(1)})
  data_features.encoder(sets.Pictures(None, 20, 16, 16, 1, {}, source), tmp_path)
  assert kinds == [kind]


class _Unlabelled:
  class_names, digest, resolution = (), 'without labels', 32

  def __init__(self, source):
    self._source, self.all_labels = source, np.full(len(source), -1)

  def __len__(self):
    return len(self._source)


def test_contrast_is_least_where_views_agree():
  views = jnp.eye(8)
  assert float(data_features.contrast(views, views, 0.1)) < 0.01
  assert float(data_features.contrast(views, views[::-1], 0.1)) > 5


def write_pictures(path, count, seed=0, size=16):
  images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
  np.savez(path, arr_0=images)
  return images


def test_references_of_adm_edm_and_edm2_and_of_pictures_give_one_distance(tmp_path, tiny_inception):
  reference = write_pictures(tmp_path / 'pictures.npz', 30, seed=1)
  write_pictures(tmp_path / 'x.npz', 20)
  flat = reference.astype(np.float32).mean(-1).reshape(30, -1) / 255
  moments = {}
  for suffix, name in (('', 'features'), ('_s', 'spatial')):
    values = (flat @ tiny_inception[name]).astype(np.float64)
    moments |= {f'mu{suffix}': values.mean(0), f'sigma{suffix}': np.cov(values, rowvar=False)}
  np.savez(tmp_path / 'adm.npz', arr_0=reference, **moments)
  np.savez(tmp_path / 'edm.npz', mu=moments['mu'], sigma=moments['sigma'])
  with open(tmp_path / 'edm2.pkl', 'wb') as file:
    pickle.dump({'fid': {key: moments[key] for key in ('mu', 'sigma')}}, file)

  def of(reference, metrics='fid', **fields):
    return evaluate.of_images(
      str(tmp_path / 'x.npz'), evaluate.Request(metrics, reference=str(tmp_path / reference), batch_size=9, **fields))

  whole = of('adm.npz', 'fid,sfid,precision_recall,kid,is')
  for name in ('pictures.npz', 'edm.npz', 'edm2.pkl'):
    assert of(name)['metrics']['fid'] == pytest.approx(whole['metrics']['fid'], rel=1e-5), name
  again = of('pictures.npz', 'fid,sfid,precision_recall,kid,is')
  assert again['metrics'] == pytest.approx(whole['metrics'], rel=1e-5)
  assert whole['features']['inception']['resize'] == 'tensorflow'
  assert of('edm.npz')['bytes_held_for_features'] == 0  # moments alone
  assert whole['bytes_held_for_features'] == (20 + 30) * 6 * 4
  with pytest.raises(EvaluationError, match='kid compare.*holds statistics only'):
    of('edm.npz', 'kid')
  with pytest.raises(EvaluationError, match='not of inception/spatial'):
    of('edm.npz', 'sfid')
  assert set(of('edm.npz', '')['metrics']) == {'fid'}  # what the reference allows
  # 10,000 of a larger reference, at most, are compared one by one.
  evaluate_at_most = of('adm.npz', 'precision_recall')
  assert evaluate_at_most['how']['precision_recall']['reference_pictures'] == 30


def test_a_large_reference_is_drawn_from(tmp_path, tiny_inception, monkeypatch):
  monkeypatch.setattr(evaluate, 'REFERENCE_PICTURES', 12)
  write_pictures(tmp_path / 'r.npz', 30, seed=1)
  write_pictures(tmp_path / 'x.npz', 20)
  ask = lambda metrics: evaluate.of_images(
    str(tmp_path / 'x.npz'), evaluate.Request(metrics, reference=str(tmp_path / 'r.npz'), batch_size=8))
  with_moments, alone = ask('fid,kid'), ask('kid')
  assert with_moments['how']['kid']['reference_pictures'] == 12
  assert with_moments['metrics']['kid'] == pytest.approx(alone['metrics']['kid'], rel=1e-5)


def test_fdr_is_the_mean_of_distances_over_those_of_held_out_pictures_and_says_which_encoders_lack(
    tmp_path, tiny_inception, monkeypatch):
  real, held = write_pictures(tmp_path / 'r.npz', 30, seed=1), write_pictures(tmp_path / 'h.npz', 25, seed=2)
  samples = write_pictures(tmp_path / 'x.npz', 20) // 2
  np.savez(tmp_path / 'x.npz', arr_0=samples)
  matrices = {name: np.random.default_rng(place).standard_normal((16 * 16, 5)).astype(np.float32)
              for place, name in enumerate(('convnext', 'dinov2_256', 'mae', 'siglip', 'clip_256'))}
  flat = lambda images: images.astype(np.float32).mean(-1).reshape(len(images), -1) / 255
  maker = lambda matrix: lambda weights_dir: encoders.Encoder(
    lambda variables, images: {'features': (images.astype(jnp.float32).mean(-1).reshape(len(images), -1) / 255)
                               @ variables}, matrix, {'network': 'tiny', 'sha256': '1', 'resize': ''})
  monkeypatch.setattr(evaluate, 'MAKERS', {name: maker(matrix) for name, matrix in matrices.items()})
  opened = references.open_reference
  monkeypatch.setattr(references, 'open_reference', lambda *args: dataclasses.replace(
    opened(*args), held_out=sets.open_samples(str(tmp_path / 'h.npz'))))
  request = evaluate.Request('fdr6', reference=str(tmp_path / 'r.npz'), batch_size=9)

  def ratio(matrix):
    moments = [(values.mean(0), np.cov(values, rowvar=False)) for values in (
      (flat(x) @ matrix).astype(np.float64) for x in (samples, real, held))]
    return (frechet.frechet_distance(*moments[0], *moments[1]) / frechet.frechet_distance(*moments[2], *moments[1]))

  for figures in (tuple(representations.SIX), ('fid', 'fd_mae', 'fd_clip')):
    monkeypatch.setattr(representations, 'here', lambda *_, figures=figures: figures)
    found = evaluate.of_images(str(tmp_path / 'x.npz'), request)
    of = [tiny_inception['features'] if name == 'fid' else matrices[representations.SIX[name]] for name in figures]
    assert found['metrics'][f'fdr{len(figures)}'] == pytest.approx(np.mean([ratio(x) for x in of]), rel=1e-4)
    assert set(found['fd_ratio']['of']) == set(figures)
    assert {name for name in found['metrics'] if name.startswith('fdr')} == {f'fdr{len(figures)}'}
    assert any('there is no convnext' in note for note in found['notes']) == (len(figures) < 6)
    assert set(found['features']) == {representations.SIX[name] for name in figures}
  with pytest.raises(EvaluationError, match='as the ADM evaluator'):
    evaluate.of_images(str(tmp_path / 'x.npz'), dataclasses.replace(request, resize='clean_fid'))
  monkeypatch.setattr(representations, 'here', lambda *_: ())
  with pytest.raises(EvaluationError, match='none of its encoders is here: inception .weights pt_inception'):
    evaluate.of_images(str(tmp_path / 'x.npz'), request)


def test_fdr6_of_published_files_from_end_to_end(tmp_path, tiny_inception, monkeypatch, capsys):
  paths = published_files.write_representations(tmp_path / 'weights')
  (tmp_path / 'weights' / locate.entry('pt_inception').file_name).write_bytes(b'')  # tiny_inception is in its place
  for place, name in enumerate(('r', 'h', 'x')):
    write_pictures(tmp_path / f'{name}.npz', 16, seed=place)
  np.savez(tmp_path / 'x.npz', arr_0=np.load(tmp_path / 'x.npz')['arr_0'] // 2)
  opened = references.open_reference
  monkeypatch.setattr(references, 'open_reference', lambda *args: dataclasses.replace(
    opened(*args), held_out=sets.open_samples(str(tmp_path / 'h.npz'))))
  flags = [f'--images={tmp_path / "x.npz"}', f'--reference={tmp_path / "r.npz"}', '--metrics=fdr6', '--batch_size=16',
           f'--weights_dir={tmp_path / "weights"}', f'--out={tmp_path / "f.json"}']
  assert pagoda('evaluate', *flags) == 0
  assert 'fdr6' in capsys.readouterr().out
  found = read_sealed(tmp_path / 'f.json')
  ratios = found['fd_ratio']['of']
  assert set(ratios) == set(representations.SIX) and len({round(ratio, 3) for ratio in ratios.values()}) == 6
  assert min(ratios.values()) > 1  # pictures of half the contrast are further than others of the same kind
  assert found['metrics']['fdr6'] == pytest.approx(np.mean(list(ratios.values())))
  assert not any('there is no' in note for note in found['notes'])
  digests = {name: found['features'][name]['sha256'] for name in representations.MAKERS}
  assert digests == {name: file_digest(paths[representations.FILES[name]]) for name in representations.MAKERS}
  # Files that are not what they are called.
  for name, tensor, said in (('convnextv2_base', 'head.fc.weight', 'which ends in a classifier'),
                             ('siglip2_so400m16', 'attn_pool.latent', 'no attn_pool.latent')):
    path, whole = paths[name], paths[name].read_bytes()
    rest = {key: np.array(value) for key, value in torch_files.read(path).tensors.items() if key != tensor}
    torch_files.write_safetensors(path, rest, {'format': 'pt'})
    for words in ('at first use', said):
      assert pagoda('evaluate', *flags) == 1
      refused = capsys.readouterr().err
      assert words in refused and (name in refused or path.name in refused)
      (tmp_path / 'weights' / f'{path.name}.sha256.json').unlink()
    path.write_bytes(whole)
  paths['convnextv2_base'].unlink()
  here = representations.here(tmp_path / 'weights')
  assert set(representations.SIX) - set(here) == {'fd_convnext'}
  assert representations.lacking(here) == 'convnext (weights convnextv2_base are not here)'


DAMAGED = {
  'nan': (lambda m: m['mu'].__setitem__(2, np.nan), 'NaN or infinite'),
  'not square': (lambda m: m.update(sigma=m['sigma'][:, :5]), r'of shapes \(6,\) and \(6, 5\)'),
  'another network': (lambda m: m.update(mu=np.zeros(8), sigma=np.eye(8)), 'statistics of 8 features, and'),
  'not symmetric': (lambda m: m['sigma'].__setitem__((0, 1), 9.0), 'not symmetric'),
  'negative': (lambda m: m['sigma'].__setitem__((0, 0), -1.0), 'negative variance'),
  'half': (lambda m: m.pop('sigma'), 'only one of mu and sigma'),
  'text': (lambda m: m.update(mu=np.array(['a'] * 6)), 'only numbers|not floating-point|could|types'),
  'other names': (lambda m: (m.pop('mu'), m.pop('sigma'), m.update(a=np.zeros(3))), 'a reference has mu and sigma'),
  'objects': (lambda m: m.update(mu=np.array([os.system, None], object)), 'Python objects'),
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_a_reference_that_is_none_is_refused_by_name(kind, tmp_path, tiny_inception):
  moments = {'mu': np.zeros(6), 'sigma': np.eye(6)}
  damage, said = DAMAGED[kind]
  damage(moments)
  np.savez(tmp_path / 'r.npz', **moments)
  write_pictures(tmp_path / 'x.npz', 20)
  with pytest.raises((EvaluationError, WeightsFileError), match=said) as refused:
    evaluate.of_images(str(tmp_path / 'x.npz'), evaluate.Request('fid', reference=str(tmp_path / 'r.npz')))
  assert 'r.npz' in str(refused.value)


def test_flipped_bytes_and_pickles_that_run_code_are_refused(tmp_path):
  np.savez(tmp_path / 'r.npz', mu=np.zeros(6), sigma=np.eye(6))
  content = bytearray((tmp_path / 'r.npz').read_bytes())
  content[content.index(np.float64(1).tobytes()) + 3] ^= 4
  (tmp_path / 'r.npz').write_bytes(content)

  class Evil:
    def __reduce__(self):
      return os.system, (f'touch {tmp_path / "ran"}',)

  (tmp_path / 'r.pkl').write_bytes(pickle.dumps({'fid': {'mu': Evil(), 'sigma': np.eye(2)}}))
  for name, error in (('r.npz', WeightsFileError), ('r.pkl', UnsafeFileError)):
    with pytest.raises(error, match=name):
      references.open_reference(str(tmp_path / name), '', '', None, 0, '')
  assert not (tmp_path / 'ran').exists()
  (tmp_path / 'other.pkl').write_bytes(pickle.dumps({'a': {'w': np.zeros(2)}}))
  with pytest.raises(EvaluationError, match='no reference of EDM2'):
    references.open_reference(str(tmp_path / 'other.pkl'), '', '', None, 0, '')


@pytest.mark.parametrize('array, said', [
  (np.zeros((0, 4, 4, 3), np.uint8), 'no pictures'), (np.zeros((5, 4, 4, 3), np.float32), 'must be uint8'),
  (np.zeros((5, 4, 4), np.uint8), 'must be uint8'), (np.zeros((5, 4, 4, 2), np.uint8), 'must be uint8'),
  (np.zeros((5, 0, 4, 3), np.uint8), 'must be uint8'),
])
def test_arrays_that_are_no_pictures_are_refused(array, said, tmp_path):
  np.savez(tmp_path / 'x.npz', arr_0=array)
  with pytest.raises(EvaluationError, match=said):
    sets.open_samples(str(tmp_path / 'x.npz'))
  np.savez(tmp_path / 'y.npz', arr_1=array)
  with pytest.raises(EvaluationError, match='no pictures'):
    sets.open_samples(str(tmp_path / 'y.npz'))


def test_a_folder_of_odd_pictures(tmp_path):
  folder = tmp_path / 'folder'
  folder.mkdir()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
  Image.fromarray(pixels[..., :3]).save(folder / 'a.png')
  Image.fromarray(pixels[..., 0]).save(folder / 'b.png')  # grey
  Image.fromarray(pixels).save(folder / 'c.png')  # transparent
  Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / 'd.png')  # 16 bits
  (folder / 'notes.txt').write_text('not a picture, by its name')
  found = sets.open_samples(str(folder))
  read = found.read(np.arange(4))
  assert (found.count, read.shape, read.dtype) == (4, (4, 8, 8, 3), np.uint8)
  np.testing.assert_array_equal(read[0], pixels[..., :3])
  np.testing.assert_array_equal(read[1], read[3])
  Image.fromarray(pixels[:4, :, :3]).save(folder / 'e.png')  # of another size
  with pytest.raises(EvaluationError, match=r'e.png has 8 x 4 pixels.*--resolution'):
    sets.open_samples(str(folder)).read(np.arange(5))
  assert sets.open_samples(str(folder), 4).read(np.arange(5)).shape == (5, 4, 4, 3)
  (folder / 'f.png').write_bytes((folder / 'a.png').read_bytes()[:60])
  with pytest.raises(sets.pictures.SourceError, match='f.png'):
    sets.open_samples(str(folder))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(sets.pictures.SourceError, match='no pictures'):
    sets.open_samples(str(tmp_path / 'empty'))


REFUSED = [
  ('clip', 'inception', 'there are none: a folder has them'), ('fdr6', 'inception', 'config.data.holdout'),
  ('fdr6', 'data', 'by six encoders'), ('fidd', 'inception', "no metric 'fidd'"),
  ('sfid', 'data', "Inception's maps"),
  ('psnr', 'inception', 'is of pairs'),
]


@pytest.mark.parametrize('metrics, features, said', REFUSED)
def test_metrics_that_cannot_be_had_are_refused_with_what_is_missing(metrics, features, said):
  reference = references.Reference({}, pictures=sets.of_array(np.zeros((5, 8, 8, 3), np.uint8), '', {}))
  with pytest.raises(EvaluationError, match=said):
    plans.make(metrics, features, reference, False)


@pytest.mark.parametrize('output', ['inception/spatial', 'dinov2/features'])  # of the latter the network is not here
def test_statistics_of_nothing_in_the_default_report_are_no_result_without_figures(output):
  reference = references.Reference({}, {output: (np.zeros(1), np.ones((1, 1)))})
  with pytest.raises(EvaluationError, match=f'nothing is compared with statistics of {output} alone'):
    plans.make('', 'inception', reference, False)


def test_a_resize_that_no_network_would_take_is_refused(tmp_path):
  write_pictures(tmp_path / 'x.npz', 4)
  of = evaluate.Request('psnr', reference=str(tmp_path / 'x.npz'))
  assert evaluate.of_images(str(tmp_path / 'x.npz'), of)['metrics'] == {'psnr': 100.0}
  with pytest.raises(EvaluationError, match='--resize=clean_fid: is of Inception'):
    evaluate.of_images(str(tmp_path / 'x.npz'), dataclasses.replace(of, resize='clean_fid'))


def test_too_few_pictures_are_refused_before_any_is_looked_at(tmp_path, tiny_inception, monkeypatch):
  write_pictures(tmp_path / 'few.npz', 3)
  write_pictures(tmp_path / 'many.npz', 9)
  for samples, reference, said in (('few', 'many', 'the samples are 3'), ('many', 'few', 'the reference are 3')):
    with pytest.raises(EvaluationError, match=said):
      evaluate.of_images(str(tmp_path / f'{samples}.npz'), evaluate.Request(
        'precision_recall', reference=str(tmp_path / f'{reference}.npz')))
  with pytest.raises(EvaluationError, match='give --reference'):
    evaluate.of_images(str(tmp_path / 'many.npz'), evaluate.Request('fid'))
  # Before a network learns from the reference, too, or images are drawn that nothing could be compared with.
  monkeypatch.setattr(encoders, 'of_inception', lambda *_: pytest.fail('looked at'))
  monkeypatch.setattr(data_features, 'encoder', lambda *_: pytest.fail('learnt from'))
  monkeypatch.setattr(locate, 'located', lambda *_: None)
  few, many = (str(tmp_path / f'{name}.npz') for name in ('few', 'many'))
  for metrics, images, more, said in (
      ('precision_recall', few, {'reference': 'mnist', 'features': 'data'}, 'the samples are 3'),
      ('fid,psnr', few, {'reference': many}, 'the samples are 3 of 16 x 16 x 3, the reference is 9 of'),
      ('fid,lpips', many, {'reference': many}, 'vgg16 is not there')):
    with pytest.raises((EvaluationError, locate.MissingWeightsError), match=said):
      evaluate.of_images(images, evaluate.Request(metrics, **more))
  config = tiny.get_config()
  held = dataclasses.replace(references.of_data(config, 'distill').held_out, count=3)
  monkeypatch.setattr(references, 'open_reference', lambda *_: references.Reference({}, pictures=held, held_out=held))
  with pytest.raises(EvaluationError, match='the held-out pictures are 3'):
    next(evaluate.of_phase(config, tmp_path, 'distill', '', evaluate.Request('precision_recall')))
  with pytest.raises(EvaluationError, match='lpips: pictures of 8 x 8 pixels'):
    next(evaluate.of_phase(config, tmp_path, 'distill', '', evaluate.Request('fid,lpips')))
  config.phases.invert.store = False
  with pytest.raises(EvaluationError, match='invert stores no noise'):
    next(evaluate.of_phase(config, tmp_path, 'distill', '', evaluate.Request('fid,psnr')))


def test_features_that_are_not_finite_name_the_picture():
  kept = sums.Sums(9, kept={'a': 2})
  with pytest.raises(EvaluationError, match='picture 5'):
    kept.add(4, {'a': np.array([[1, 2], [np.nan, 0]], np.float32)})


def test_a_missing_inception_says_where_it_comes_from(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv(locate.ENVIRONMENT, raising=False)
  write_pictures(tmp_path / 'x.npz', 9)
  with pytest.raises(locate.MissingWeightsError, match='download'):
    evaluate.of_images(str(tmp_path / 'x.npz'), evaluate.Request('is'))


@pytest.mark.parametrize('asked, said', [
  ({'guidance': (3.0, 1.5)}, '--guidance=3,1.5: is of samples, and psnr compare reconstructions'),
  ({'labels': 'cycle'}, '--labels=cycle'), ({'seed': 7}, '--seed=7')])
def test_how_samples_are_drawn_is_refused_where_none_are(asked, said, tmp_path, monkeypatch):
  monkeypatch.setattr(references, 'open_reference', lambda *where: references.Reference({}))
  request = evaluate.Request('psnr', **asked)
  with pytest.raises(EvaluationError, match=said):
    next(evaluate.of_phase(tiny.get_config('guided'), tmp_path, 'distill', '', request))


def test_steps_of_a_range(finished):
  with pytest.raises(EvaluationError, match="--step=4-: must be a number, 'best', a range such as 1000-5000, or 'all'"):
    evaluate.steps_of(finished / 'grow_16', '4-', None)
  folder, config = finished / 'grow_16', workdir.image_phase(finished, '')[0].checkpoint
  assert evaluate.steps_of(folder, 'all', config) == [2, 4]
  assert evaluate.steps_of(folder, '3-9', config) == [4]
  assert evaluate.steps_of(folder, '', config) == [None]
  with pytest.raises(EvaluationError, match='they are at 2, 4'):
    evaluate.steps_of(folder, '5-9', config)


def test_a_checkpoint_that_is_removed_before_its_turn_is_left_out(monkeypatch, capsys):
  there = [2, 4, 6]
  monkeypatch.setattr(checkpoints, 'finished_steps', lambda folder: there)

  def read(config, folder, ema, step):
    if step not in there:
      raise checkpoints.CheckpointError(f'no checkpoint of step {step}')
    return {}, step

  monkeypatch.setattr(evaluate.starts, 'read_average', read)
  found = evaluate._read(None, pathlib.Path('distill'), '', [2, 4, 6])
  assert next(found)[1] == 2
  there[:] = [6, 8]
  assert [step for _, step in found] == [6]
  assert 'distill, step 4: left out, as its checkpoint has been removed since' in capsys.readouterr().out
  for asked in ([4], [2, 4]):
    with pytest.raises(checkpoints.CheckpointError, match='no checkpoint of step 4'):
      list(evaluate._read(None, pathlib.Path('distill'), '', asked))


def test_a_result_is_replaced_however_the_paths_of_its_files_are_written(tmp_path):
  def written(place, sha256='a', features='b'):
    return evaluate.write(tmp_path, {
      'metrics': {}, 'samples': {'phase': 'distill', 'step': 4}, 'how': {},
      'reference': {'file': f'{place}/x.npz', 'sha256': sha256},
      'features': {'data': {'file': f'{place}/y.npz', 'sha256': features}}})

  assert written('run') == written('/there/run')
  assert len({written('run'), written('run', 'c'), written('run', features='c')}) == 3


def test_psnr():
  images = np.zeros((2, 4, 4, 1), np.uint8)
  np.testing.assert_allclose(paired.psnr(images, images + np.array([0, 255], np.uint8)[:, None, None, None]),
                             [paired.MOST_PSNR, 0], atol=1e-4)


@pytest.mark.parametrize('flags, said', [
  ([], 'give --workdir=RUN or --images'), (['--images=x.npz', '--step=3'], 'is of --workdir'),
  (['--images=x.txt'], 'must be an .npz'), (['--images=nothing.npz'], 'no such file'),
])
def test_the_command_line_says_what_is_wrong(flags, said, capsys):
  assert pagoda('evaluate', *flags) == 1
  assert said in capsys.readouterr().err


def test_results_are_json(tmp_path, tiny_inception, capsys):
  write_pictures(tmp_path / 'x.npz', 9)
  assert pagoda('evaluate', f'--images={tmp_path}/x.npz', f'--out={tmp_path}/x.json') == 0
  assert 'is_shuffled' in capsys.readouterr().out
  assert set(json.loads((tmp_path / 'x.json').read_text())['metrics']) == {
    'is', 'is_std', 'is_shuffled', 'is_shuffled_std'}
