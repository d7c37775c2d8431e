// The page: a form, a view of pictures with others behind it, and a picture of the user's with a mask over it.
import * as backend from './backend.js';
import {noise, slerp} from './noise.js';
import {maskEditor} from './mask.js';
import {buttons, listen, roving} from './tiles.js';

const $ = id => document.getElementById(id);
const FRAMES = 16, NEIGHBOURS = 8;
const views = [];  // the last is shown
let model, picked = null, running = null;

const text = milliseconds =>
  milliseconds < 10000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
const short = prompt => prompt.length > 60 ? `${prompt.slice(0, 59)}…` : prompt;
const said = prompt => prompt ? `“${short(prompt)}”` : '';
const named = (label, prompt) => label >= 0 ? `label ${label}` : said(prompt) || 'picture';
const plural = (count, what) => `${count} ${what}${count === 1 ? '' : 's'}`;

function say(message, wrong = false) {
  $('status').textContent = message;
  $('status').classList.toggle('error', wrong);
}

// Runs `work(signal)`; what ran before is given up. Returns nothing where it failed or was given up itself.
async function during(what, work) {
  running?.abort();
  const own = running = new AbortController(), begun = performance.now();
  $('pictures').setAttribute('aria-busy', 'true');
  const clock = setInterval(() => {
    $('elapsed').textContent = `${what} … ${Math.round((performance.now() - begun) / 1000)} s`;
    $('under-way').hidden = false;
  }, 1000);
  try {
    const found = await work(own.signal);
    const {waited, device} = found.milliseconds ?? {};
    const inside = device === undefined ? '' :
      ` (${text(device)} at the device${waited >= 1 ? `, ${text(waited)} in the queue` : ''})`;
    found.took = `in ${text(performance.now() - begun)}${inside}`;
    return own.signal.aborted ? undefined : found;
  } catch (error) {
    if (error.name !== 'AbortError') say(error.message, true);
  } finally {
    clearInterval(clock);
    if (running === own) {
      running = null;
      $('under-way').hidden = true;
      $('pictures').setAttribute('aria-busy', 'false');
    }
  }
}

// Views: {title, tiles, kind, slider, moved, more}; a tile: {src, noise, label, how, caption, alt}, drawn with how,
// {omega, prompt}.

function tileOf(image, how, more = {}) {
  const caption = image.label >= 0 ? String(image.label) : '';
  return {...image, how, caption, alt: named(image.label, how.prompt), ...more};
}

function push(view) {
  views.push(view);
  if (views.length > 50) views.shift();
  show(view);
}

function show(view) {
  letGo();
  $('view-title').textContent = view.title;
  $('back').hidden = views.length < 2;
  $('more').hidden = !view.more;
  $('pick').hidden = view.tiles.filter(tile => tile.noise).length < 2;
  $('tiles-help').hidden = false;
  $('slide').hidden = !view.slider;
  if (view.slider) {
    const {name, low, high, step, value} = view.slider;
    $('slider-name').textContent = name;
    Object.assign($('slider'), {min: low, max: high, step, value});
    slid(view);
  }
  $('large').hidden = view.kind !== 'path';
  $('tiles').className = view.kind;
  $('tiles').replaceChildren(...view.tiles.map((tile, index) => {
    const item = document.createElement('li'), shown = document.createElement(tile.noise ? 'button' : 'div');
    const picture = document.createElement('img');
    picture.src = tile.src;
    picture.alt = tile.noise ? '' : tile.alt;
    picture.draggable = false;
    shown.className = 'tile' + (tile.here ? ' here' : '');
    shown.append(picture, tile.caption);
    if (tile.noise) {
      shown.type = 'button';
      shown.setAttribute('aria-label', `${tile.alt}, ${index + 1} of ${view.tiles.length}`);
      shown.dataset.index = index;
    }
    item.append(shown);
    return item;
  }));
  roving(0);
}

const current = () => views[views.length - 1];

function slid(view) {
  const value = Number($('slider').value);
  const said = view.slider.text(value);
  $('slider-value').textContent = said;
  $('slider').setAttribute('aria-valuetext', said);
  if (view.kind === 'path') {
    $('large').src = view.tiles[value].src;
    $('large').alt = `${view.tiles[value].alt}, ${said}`;
  }
}

function back() {
  if (views.length < 2) return;
  running?.abort();
  views.pop();
  show(current());
  say('');
  roving(0, true);
}

// Drawing

function wanted() {
  const values = {seed: Number($('seed').value), count: Number($('count').value)};
  if (model.num_classes) {
    const chosen = ($('label-field').hidden ? $('labels') : $('label')).value.trim();
    values.labels = /^\d+$/.test(chosen) ? Number(chosen) : chosen || 'cycle';
  }
  if (model.omega) values.omega = Number($('omega').value);
  if (model.text) values.prompt = model.prompts ? $('prompts').value : promptOf($('prompt'));
  return values;
}

// One line, as prompts are.
const promptOf = field => field.value.replace(/\p{Cc}+/gu, ' ').trim();

async function drawNew() {
  const values = wanted();
  const found = await during('Drawing', signal => backend.draw(values, signal));
  if (!found) return;
  views.length = 0;
  const title = [plural(found.images.length, 'picture'), said(values.prompt), `seed ${values.seed}`];
  push({title: title.filter(Boolean).join(', '), kind: 'many',
        tiles: found.images.map(image => tileOf(image, {omega: values.omega, prompt: values.prompt}))});
  say(`${plural(found.images.length, 'picture')} ${found.took}`);
}

async function wander(tile, {distance = 0.3, turn = 0, keep = null} = {}) {
  const count = Math.min(NEIGHBOURS, model.limits.images);
  const size = tile.noise.length;
  // Directions of a seed that no picture of a small seed shares.
  const around = Array.from({length: count}, (_, k) =>
    slerp(tile.noise, noise(0x57a4de5 + turn, k, size, model.sigma_max), distance));
  const found = await during('Wandering', signal => backend.draw(
    {noise: around, labels: tile.label >= 0 ? around.map(() => tile.label) : undefined, ...tile.how}, signal));
  if (!found || (keep && current() !== keep)) return;
  const name = named(tile.label, tile.how.prompt);
  const tiles = found.images.map(image => tileOf(image, tile.how, {alt: `neighbour, ${name}`}));
  tiles.splice(Math.min(4, tiles.length), 0, {...tile, here: true, caption: 'here', alt: `here, ${name}`});
  const view = {
    title: `Around a picture${name === 'picture' ? '' : ` of ${name}`}`, kind: 'around', tiles,
    slider: {name: 'Distance', low: 0.05, high: 1, step: 0.05, value: distance, text: value => value.toFixed(2)},
    moved: value => wander(tile, {distance: value, turn, keep: view}),
    more: () => wander(tile, {distance: Number($('slider').value), turn: turn + 1, keep: view}),
  };
  if (keep) views.pop();
  const focus = keep ? document.activeElement : null;
  push(view);
  if (!keep) roving(tiles.findIndex(each => each.here), true);
  else if (focus?.classList?.contains('tile') || !document.contains(focus)) roving(0, true);
  say(`${plural(found.images.length, 'neighbour')} ${found.took}`);
}

// As backend.draw, of any number of images: in as many requests as the server's limit makes of them.
async function drawn({noise: all, labels, ...how}, signal) {
  const images = [], milliseconds = {waited: 0, device: 0};
  for (let start = 0; start < all.length; start += model.limits.images) {
    const part = each => each?.slice(start, start + model.limits.images);
    const found = await backend.draw({noise: part(all), labels: part(labels), ...how}, signal);
    images.push(...found.images);
    for (const key in milliseconds) milliseconds[key] += found.milliseconds[key];
  }
  return {images, milliseconds};
}

async function interpolate(first, second) {
  const count = Math.max(Math.min(FRAMES, model.limits.images), 2);
  const path = Array.from({length: count}, (_, k) => slerp(first.noise, second.noise, k / (count - 1)));
  const half = k => k / (count - 1) < 0.5 ? first : second;
  const labels = first.label >= 0 ? path.map((_, k) => half(k).label) : undefined;
  const found = await during('Interpolating', signal => drawn({noise: path, labels, ...first.how}, signal));
  if (!found) return;
  const ends = first.label >= 0 ? `label ${first.label} to label ${second.label}` : 'one picture to another';
  const far = k => `${Math.round(100 * k / (count - 1))} %`;
  push({
    title: `From ${ends}`, kind: 'path',
    tiles: found.images.map((image, k) => tileOf(image, first.how, {caption: '', alt: `${far(k)} of the way`})),
    slider: {name: 'Along the way', low: 0, high: count - 1, step: 1, value: 0, text: far},
  });
  $('slider').focus();
  say(`${plural(count, 'picture')} ${found.took}`);
}

// Picking two pictures: by the button, by the key I, or by dragging.

function letGo() {
  picked = null;
  $('pick').setAttribute('aria-pressed', 'false');
  buttons().forEach(button => button.removeAttribute('aria-pressed'));
}

function pick(index) {
  if (picked === index) {
    letGo();
    say('Let go.');
  } else if (picked === null) {
    picked = index;
    $('pick').setAttribute('aria-pressed', 'true');
    buttons().forEach(button => button.setAttribute('aria-pressed', String(Number(button.dataset.index) === index)));
    say('Now the other one.');
  } else {
    const tiles = current().tiles, first = tiles[picked];
    letGo();
    interpolate(first, tiles[index]);
  }
}

function chosen(index) {
  if (picked !== null || $('pick').getAttribute('aria-pressed') === 'true') pick(index);
  else wander(current().tiles[index]);
}

// A picture of the user's

function listenToUpload() {
  const editor = maskEditor({canvas: $('mask'), brush: $('brush'), brushValue: $('brush-value'), erase: $('erase'),
                             clear: $('clear'), said: $('mask-said')}, model.resolution,
                            marked => { $('inpaint').disabled = !marked; });
  let own = null;
  $('file').addEventListener('change', async () => {
    const [file] = $('file').files;
    if (!file) return;
    if (file.size * 4 / 3 + 1000 > model.limits.bytes) {
      say(`${file.name}: more than ${Math.floor(model.limits.bytes * 3 / 4 / 2 ** 20)} MiB; take a smaller one.`, true);
      return;
    }
    const found = await during('Reading', signal => backend.square(file, signal));
    if (!found) return;
    own = found;
    $('editor').hidden = false;
    await editor.open(found.src);
    say(`${file.name}, ${found.width} x ${found.height} pixels: as the model would be shown it, ${found.took}`);
  });
  const edited = async word => {
    const values = {edit: word, picture: own.png};
    if (word === 'inpaint') values.mask = editor.png();
    if (!$('own-field').hidden && $('own').value !== '') values.label = Number($('own').value);
    if (model.text) values.prompt = promptOf($('own-prompt'));
    if (model.omega) values.omega = Number($('omega').value);
    const shown = word === 'inpaint' ? editor.shown() : own.src;
    const found = await during(word === 'inpaint' ? 'Inpainting' : 'Reconstructing',
                               signal => backend.edit(values, signal));
    if (!found) return;
    const [image] = found.images;
    const name = word === 'inpaint' ? 'Inpainted' : 'Reconstructed';
    const {omega, prompt} = values, as = image.label >= 0 ? `a ${image.label}` : said(prompt);
    push({title: name, kind: 'few', tiles: [
      {src: shown, alt: 'your picture', caption: word === 'inpaint' ? 'what is known' : 'yours'},
      tileOf(image, {omega, prompt}, {caption: name.toLowerCase() + (as && `, as ${as}`),
                                      alt: `${name}, ${named(image.label, prompt)}`})]});
    roving(1, true);
    const met = `What is known is met to ${found.misfit.toFixed(1)} grey levels (rms)`;
    say(`${met}: ${plural(found.steps, 'step')} ${found.took}`);
  };
  $('reconstruct').addEventListener('click', () => edited('reconstruct'));
  $('inpaint').addEventListener('click', () => edited('inpaint'));
}

// The form

function options(select, first, count) {
  for (const [value, name] of [...first, ...Array.from({length: count}, (_, label) => [label, String(label)])]) {
    select.add(new Option(name, value));
  }
}

function setUp() {
  const size = `${model.resolution} px${model.channels === 1 ? ', grey' : ''}`;
  $('title').textContent = document.title = model.run || model.where;
  const classes = model.num_classes ? `${model.num_classes} classes` : '';
  $('about').textContent = [model.run ? model.where : model.name, size, classes, backend.where ?? '']
    .filter(Boolean).join(' · ');
  document.body.classList.toggle('pixels', model.resolution < 128);
  $('tiles').style.setProperty('--tile', model.resolution < 128 ? '92px' : '150px');
  $('prompt-field').hidden = !model.text || Boolean(model.prompts);
  $('prompts-field').hidden = !model.prompts;
  for (const prompt of model.prompts ?? []) $('prompts').add(new Option(prompt, prompt));
  const few = model.num_classes <= 100;
  $('label-field').hidden = !model.num_classes || !few;
  $('labels-field').hidden = !model.num_classes || few;
  if (few) options($('label'), [['cycle', 'each in turn'], ['random', 'random']], model.num_classes);
  $('labels-help').textContent = `random, cycle, or numbers of 0 to ${model.num_classes - 1}, such as 1,2`;
  $('count').max = model.limits.images;
  $('count').value = Math.min(16, model.limits.images);
  if (model.omega) {
    const {low, high} = model.omega;
    Object.assign($('omega'), {min: low, max: high, step: (high - low) / 60 || 1, value: model.omega.default});
    $('omega-field').hidden = low === high;
    const shown = () => { $('omega-value').textContent = Number($('omega').value).toFixed(2); };
    $('omega').addEventListener('input', shown);
    shown();
  }
  $('draw').addEventListener('submit', event => { event.preventDefault(); drawNew(); });
  $('next').addEventListener('click', () => {
    $('seed').value = (Number($('seed').value) + 1) % 2 ** 32;
    if ($('draw').reportValidity()) drawNew();
  });
  $('back').addEventListener('click', back);
  $('stop').addEventListener('click', () => { running?.abort(); say('Stopped.'); });
  $('more').addEventListener('click', () => current().more());
  $('pick').addEventListener('click', () => {
    const on = $('pick').getAttribute('aria-pressed') !== 'true';
    letGo();
    $('pick').setAttribute('aria-pressed', String(on));
    say(on ? 'Choose two pictures.' : '');
  });
  let soon;
  $('slider').addEventListener('input', () => {
    const view = current();
    slid(view);
    if (!view.moved) return;
    clearTimeout(soon);
    soon = setTimeout(() => { if (current() === view) view.moved(Number($('slider').value)); }, 150);
  });
  listen({tileAt: index => current().tiles[index], chosen, joined: interpolate, pick, back});
  addEventListener('keydown', event => {
    if (event.key === 'Escape' && $('pick').getAttribute('aria-pressed') === 'true') {
      letGo();
      say('Let go.');
    }
  });
  $('upload').hidden = !model.edits.length;
  $('no-upload').hidden = !backend.missing;
  $('no-upload').textContent = backend.missing ?? '';
  if (model.edits.length) {
    $('own-field').hidden = !model.num_classes;
    $('own-prompt-field').hidden = !model.text;
    options($('own'), model.tries_labels ? [['', 'try each']] : [], model.num_classes);
    listenToUpload();
  }
  const evaluations = model.kind === 'generator' ? ' One network evaluation a picture.' : '';
  $('footer').textContent = `pagoda_jax.${evaluations} Nothing here comes from elsewhere.`;
}

try {
  model = await backend.describe();
  setUp();
  await drawNew();
} catch (error) {
  $('about').textContent = '';
  say(error.message, true);
}
