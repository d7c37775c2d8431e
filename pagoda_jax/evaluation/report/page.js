'use strict';
// Sliders over sample grids: arrow keys, Home and End are the browser's own.
for (const viewer of document.querySelectorAll('.viewer')) {
  const slider = viewer.querySelector('input'), said = viewer.querySelector('output');
  const frames = [...viewer.querySelectorAll('.frame')];
  const show = () => {
    frames.forEach((frame, index) => { frame.hidden = index !== Number(slider.value); });
    said.textContent = frames[slider.value].dataset.step;
    slider.setAttribute('aria-valuetext', said.textContent);
  };
  slider.addEventListener('input', show);
  slider.closest('.slide').hidden = false;
  slider.value = frames.length - 1;  // a browser that comes back to a page keeps what it was at
  show();
}
// Under the pointer: the step, and each curve's value there.
const node = (name, values) => {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  Object.entries(values).forEach(([key, value]) => made.setAttribute(key, value));
  return made;
};
const text = value => Number.isInteger(value) ? value.toLocaleString('en') : Number(value.toPrecision(3)).toString();
for (const plot of document.querySelectorAll('.plot')) {
  const [left, right, top, bottom] = [46, 352, 8, 166];
  const [first, last] = plot.dataset.x.split(',').map(Number), [low, high] = plot.dataset.y.split(',').map(Number);
  let told = null;
  const clear = () => { if (told) told.remove(); told = null; };
  plot.addEventListener('pointerleave', clear);
  plot.addEventListener('pointermove', event => {
    clear();
    const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 360;
    if (x < left || x > right) return;
    const nearest = new Map();
    for (const line of plot.querySelectorAll('polyline[data-label]')) {
      for (const point of line.points) {
        const away = Math.abs(point.x - x), known = nearest.get(line.dataset.label);
        if (!known || away < known.away) nearest.set(line.dataset.label, {away, x: point.x, y: point.y});
      }
    }
    if (!nearest.size) return;
    told = node('g', {});
    const at = [...nearest.values()].sort((a, b) => a.away - b.away)[0].x;
    told.append(node('line', {class: 'cursor', x1: at, x2: at, y1: top, y2: bottom}));
    const lines = ['step ' + text(Math.round(first + (at - left) / (right - left) * (last - first)))];
    for (const [label, point] of nearest) {
      const value = low + (bottom - point.y) / (bottom - top) * (high - low);
      lines.push(label + ' ' + text(plot.dataset.log ? 10 ** value : value));
    }
    lines.forEach((line, index) => {
      const side = at > 200 ? -6 : 6;
      const said = node('text', {class: 'told', x: at + side, y: top + 12 + 13 * index,
                                 'text-anchor': at > 200 ? 'end' : 'start'});
      said.textContent = line;
      told.append(said);
    });
    plot.append(told);
  });
}
