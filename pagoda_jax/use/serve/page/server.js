// What draws: a server. static.js has the same functions, and draws in the browser.

const toBase64 = bytes => {
  let text = '';
  for (let start = 0; start < bytes.length; start += 8192) {
    text += String.fromCharCode(...bytes.subarray(start, start + 8192));
  }
  return btoa(text);
};

const ofBase64 = text => Uint8Array.from(atob(text), character => character.charCodeAt(0));

async function post(path, values, signal) {
  let response;
  try {
    response = await fetch(path, {method: 'POST', headers: {'content-type': 'application/json'},
                                  body: JSON.stringify(values), signal});
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('The server does not answer. Does it still run?');
  }
  const found = await response.json().catch(() => ({error: response.statusText || 'No answer that can be read.'}));
  if (response.ok) return found;
  const wait = response.headers.get('retry-after');
  throw new Error(found.error + (wait ? ` (in ${wait} s)` : ''));
}

const image = found => ({src: `data:image/png;base64,${found.png}`, label: found.label,
                         noise: new Float32Array(ofBase64(found.noise).buffer)});

// What the model is; as calls.describe has it.
export async function describe() {
  const response = await fetch('model.json');
  if (!response.ok) throw new Error((await response.json()).error);
  return response.json();
}

// {images: [{src, noise, label}], milliseconds} of {seed, count, labels, omega}, or of {noise: [...], labels, omega};
// of a network of captions with a prompt in place of labels.
export async function draw({noise, ...values}, signal) {
  if (noise) {
    const size = noise[0].length, all = new Float32Array(size * noise.length);
    noise.forEach((one, index) => all.set(one, index * size));
    values.noise = toBase64(new Uint8Array(all.buffer));
  }
  const found = await post('draw', values, signal);
  return {...found, images: found.images.map(image)};
}

// {src, png} of a file: as the model would be shown it.
export async function square(file, signal) {
  const found = await post('square', {picture: toBase64(new Uint8Array(await file.arrayBuffer()))}, signal);
  return {...found, src: `data:image/png;base64,${found.png}`};
}

// {images, misfit, steps, milliseconds} of {edit, picture, mask, label or prompt, omega}; pictures in base64.
export async function edit(values, signal) {
  const found = await post('edit', values, signal);
  return {...found, images: found.images.map(image)};
}
