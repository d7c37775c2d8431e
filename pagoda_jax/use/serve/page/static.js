// What draws: the generator as ONNX, in this browser. server.js has the same functions.
import * as ort from './ort/ort.wasm.min.mjs';
import {noise as noiseOf} from './noise.js';

const PIXELS = 2 ** 14;  // of images drawn at once, so that the page can be used between
const KINDS = {text: 'float32', text_mask: 'bool', text_pooled: 'float32'};
let model, session, texts;

export const where = 'drawn in this browser';
export const missing = 'To reconstruct or inpaint a picture of yours takes a server (pagoda serve): the network in ' +
  'this page has no gradients.';

async function fetched(path) {
  const response = await fetch(path, {cache: 'no-cache'});  // a folder made anew is not mixed with the one before
  if (!response.ok) throw new Error(`${path} is missing beside this page.`);
  return response;
}

export async function describe() {
  model = await (await fetched('model.json')).json();
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  ort.env.wasm.wasmPaths = new URL('./ort/', import.meta.url).href;
  ort.env.logLevel = 'error';
  const content = new Uint8Array(await (await fetched('generator.onnx')).arrayBuffer());
  session = await ort.InferenceSession.create(content, {executionProviders: ['wasm']});
  if (model.prompts) texts = embeddings(await (await fetched('prompts.bin')).arrayBuffer());
  return model;
}

// {name: {shape, rows: one array a prompt}} of static.py's file.
function embeddings(content) {
  const parts = Object.entries(model.text_shape).map(([name, shape]) => {
    const Numbers = KINDS[name] === 'bool' ? Uint8Array : Float32Array;
    return {name, shape, Numbers, bytes: shape.reduce((a, b) => a * b) * Numbers.BYTES_PER_ELEMENT};
  });
  const whole = model.prompts.length * parts.reduce((sum, {bytes}) => sum + bytes, 0);
  if (content.byteLength !== whole) {
    throw new Error(`prompts.bin: ${content.byteLength} bytes, not ${whole}: make this folder again.`);
  }
  let start = 0;
  return Object.fromEntries(parts.map(({name, shape, Numbers, bytes}) => {
    const rows = model.prompts.map(() => new Numbers(content.slice(start, start += bytes)));
    return [name, {shape, rows}];
  }));
}

// The inputs of `count` images of one of the prompts.
function textsOf(prompt, count) {
  const row = model.prompts.indexOf(prompt);
  if (row < 0) throw new Error(`“${prompt}”: is none of the prompts of this page`);
  return Object.fromEntries(Object.entries(texts).map(([name, {shape, rows}]) => {
    const together = new rows[row].constructor(rows[row].length * count);
    for (let k = 0; k < count; k++) together.set(rows[row], k * rows[row].length);
    return [name, new ort.Tensor(KINDS[name], together, [count, ...shape])];
  }));
}

// Labels of `count` images of what the form has: a number, a list, 'cycle' or 'random'.
function labelsOf(labels, count, seed) {
  const known = model.num_classes;
  if (!known) return Array(count).fill(-1);
  if (labels === undefined || labels === 'cycle') return Array.from({length: count}, (_, k) => k % known);
  if (labels === 'random') {
    // By the sign and size of noise that draws no picture: the same seed, the same labels.
    const draws = noiseOf(seed, 2 ** 31 - 1, count, 1e6);
    return Array.from(draws, value => Math.floor(Math.abs(value)) % known);
  }
  const given = (typeof labels === 'string' ? labels.split(',') : [labels].flat()).map(Number);
  const wrong = given.find(label => !Number.isInteger(label) || label < 0 || label >= known);
  if (wrong !== undefined) throw new Error(`labels: ${wrong} is no class; there are 0 to ${known - 1}`);
  return Array.from({length: count}, (_, k) => given[k % given.length]);
}

function url(values, side, channels) {
  const canvas = document.createElement('canvas'), pixels = new ImageData(side, side);
  canvas.width = canvas.height = side;
  for (let place = 0; place < side * side; place++) {
    for (let channel = 0; channel < 3; channel++) {
      // Clamped and rounded by the array.
      pixels.data[4 * place + channel] = (values[place * channels + (channels === 1 ? 0 : channel)] + 1) * 127.5;
    }
    pixels.data[4 * place + 3] = 255;
  }
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas.toDataURL('image/png');
}

// {images: [{src, noise, label}], milliseconds} of {seed, count, labels, omega}, or of {noise: [...], labels, omega};
// of a network of captions with one of the page's prompts in place of labels.
export async function draw({seed = 0, count = 1, labels, omega, noise, prompt}, signal) {
  const size = model.noise_shape.reduce((a, b) => a * b), {resolution: side, channels} = model;
  const drawn = noise ?? Array.from({length: count}, (_, k) => noiseOf(seed, k, size, model.sigma_max));
  const classes = labelsOf(labels, drawn.length, seed), images = [], strength = omega ?? model.omega?.default ?? 1;
  const most = Math.max(Math.floor(PIXELS / side ** 2), 1);
  let device = 0;
  for (let start = 0; start < drawn.length; start += most) {
    await new Promise(resolve => setTimeout(resolve));
    signal?.throwIfAborted();
    const part = drawn.slice(start, start + most), own = classes.slice(start, start + most);
    const together = new Float32Array(size * part.length);
    part.forEach((one, index) => together.set(one, index * size));
    const given = {
      noise: new ort.Tensor('float32', together, [part.length, ...model.noise_shape]),
      label: new ort.Tensor('int32', Int32Array.from(own), [part.length]),
      omega: new ort.Tensor('float32', new Float32Array(part.length).fill(strength), [part.length]),
      ...(texts && textsOf(prompt, part.length)),
    };
    const begun = performance.now();
    const found = await session.run(Object.fromEntries(session.inputNames.map(name => [name, given[name]])));
    device += performance.now() - begun;
    const values = found.images.data, each = side * side * channels;
    part.forEach((one, index) => images.push({
      src: url(values.subarray(index * each, (index + 1) * each), side, channels), noise: one, label: own[index]}));
  }
  return {images, milliseconds: {waited: 0, device}};
}

export const square = undefined, edit = undefined;
