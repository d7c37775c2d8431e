"""Folders of published text encoders in small: config.json, weights by the goldens' rule, a tokenizer."""

import json

import golden_tools
import numpy as np

from pagoda_jax.weights.convert import formats, torch_files

CLIP = {'hidden_size': 32, 'intermediate_size': 48, 'projection_dim': 24, 'num_hidden_layers': 2,
        'num_attention_heads': 4, 'max_position_embeddings': 12, 'hidden_act': 'quick_gelu'}
T5 = {'d_model': 16, 'd_kv': 6, 'd_ff': 20, 'num_layers': 2, 'num_heads': 2, 'relative_attention_num_buckets': 8,
      'relative_attention_max_distance': 10, 'feed_forward_proj': 'gated-gelu', 'vocab_size': 60}
MERGES = ('r e', 're d</w>', 'f l', 'fl a', 'fla g</w>', "' s</w>", 'c a', 'ca t</w>', 'Ã ©</w>', '2 0')
SENTENCES = ('a red flag on a pole', 'the smiling cat', 'two blue birds and one red cat', 'a flag of a far land') * 5


def byte_letters() -> list[str]:
  """The letters that stand for the bytes 0 to 255 in byte-pair encodings: printable ones for themselves."""
  printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def clip_vocabulary() -> dict[str, int]:
  """As CLIP's: letters, letters that end a word, merges, the two ends."""
  letters = byte_letters()
  merged = [merge.replace(' ', '') for merge in MERGES]
  return {name: place for place, name in enumerate(
    [*letters, *(f'{letter}</w>' for letter in letters), *merged, '<|startoftext|>', '<|endoftext|>'])}


def write_clip_tokenizer(folder) -> None:
  """vocab.json and merges.txt."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'vocab.json').write_text(json.dumps(clip_vocabulary()))
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *MERGES]) + '\n', encoding='utf-8')


def write_t5_tokenizer(folder) -> None:
  """spiece.model."""
  import sentencepiece

  folder.mkdir(parents=True, exist_ok=True)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(SENTENCES), model_prefix=str(folder / 'spiece'), vocab_size=40, hard_vocab_limit=False,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
  (folder / 'spiece.vocab').unlink()


def write_encoder(folder, kind: str, shards: int = 1) -> None:
  """Such a folder; with several shards, their index."""
  said = {**CLIP, 'vocab_size': len(clip_vocabulary())} if kind == 'clip' else T5
  (write_clip_tokenizer if kind == 'clip' else write_t5_tokenizer)(folder)
  (folder / 'config.json').write_text(json.dumps(said))
  leaves = formats.FORMATS[kind].leaves(options(kind, said))
  tensors = golden_tools.rule_state_dict([(leaf.theirs, leaf.shape) for leaf in leaves], 'text.')
  if shards == 1:
    torch_files.write_safetensors(folder / 'model.safetensors', tensors, {'format': 'pt'})
    return
  weight_map = {name: f'model-{place % shards + 1:05d}-of-{shards:05d}.safetensors'
                for place, name in enumerate(tensors)}
  for file in set(weight_map.values()):
    torch_files.write_safetensors(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


def write_picture_tower(path, patch: int, grid: int, width: int = 64, projection: int = 24, text=None) -> None:
  """A CLIP tower of pictures of patch * grid pixels, with heads of 64 channels; and the tensors `text`."""
  leaves = formats.FORMATS['clip_image'].leaves({
    'patch': patch, 'grid': grid, 'width': width, 'layers': 2, 'heads': width // 64, 'mlp_width': 48,
    'projection': projection})
  tensors = golden_tools.rule_state_dict([(leaf.theirs, leaf.shape) for leaf in leaves], 'image.')
  path.parent.mkdir(parents=True, exist_ok=True)
  torch_files.write_safetensors(path, tensors | (text or {}), {'format': 'pt'})


def write_clip(folder) -> None:
  """A folder of both towers of one network, with its tokenizer, as transformers' CLIPModel is published."""
  write_encoder(folder, 'clip')
  text = torch_files.read(folder / 'model.safetensors').tensors
  write_picture_tower(folder / 'model.safetensors', 4, 3, 64, CLIP['projection_dim'],
                      {key: np.array(value) for key, value in text.items()})
  said = json.loads((folder / 'config.json').read_text())
  vision = {'num_attention_heads': 1, 'hidden_act': 'quick_gelu'}
  (folder / 'config.json').write_text(json.dumps({'text_config': said, 'vision_config': vision}))


def options(kind: str, said: dict) -> dict:
  """Of the format's network, as its `options` finds them."""
  if kind == 'clip':
    return {'vocabulary': said['vocab_size'], 'positions': said['max_position_embeddings'],
            'width': said['hidden_size'], 'layers': said['num_hidden_layers'], 'heads': said['num_attention_heads'],
            'mlp_width': said['intermediate_size'], 'projection': said['projection_dim'],
            'activation': said['hidden_act'], 'eos': None, 'epsilon': 1e-5}
  return {'vocabulary': said['vocab_size'], 'width': said['d_model'], 'layers': said['num_layers'],
          'heads': said['num_heads'], 'head_channels': said['d_kv'], 'mlp_width': said['d_ff'],
          'buckets': said['relative_attention_num_buckets'], 'max_distance': said['relative_attention_max_distance'],
          'epsilon': 1e-6}
