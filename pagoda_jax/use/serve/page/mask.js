// A mask over a picture, painted by pointer or keys; in pixels of the picture.

export function maskEditor({canvas, brush, brushValue, erase, clear, said}, side, changed) {
  const scale = Math.max(Math.floor(512 / side), 1), context = canvas.getContext('2d');
  const marks = new Uint8Array(side * side);
  let picture = null, last = null, cursor = {x: side / 2, y: side / 2}, focused = false;
  canvas.width = canvas.height = side * scale;
  brush.max = Math.max(Math.round(side / 3), 2);
  brush.value = Math.max(Math.round(side / 8), 1);

  const erasing = () => erase.getAttribute('aria-pressed') === 'true';
  const count = () => marks.reduce((sum, mark) => sum + mark, 0);

  function drawn(withCursor) {
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.fillStyle = 'rgb(235 64 120 / .75)';
    marks.forEach((mark, place) => {
      if (mark) context.fillRect(place % side * scale, Math.floor(place / side) * scale, scale, scale);
    });
    if (!withCursor) return;
    const radius = Number(brush.value) / 2 * scale;
    for (const [style, width] of [['#000', 4], ['#fff', 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.beginPath();
      context.arc(cursor.x * scale, cursor.y * scale, Math.max(radius, scale / 2), 0, 2 * Math.PI);
      context.stroke();
    }
  }

  const redraw = () => { if (picture) drawn(focused); };

  function dab({x, y}, value) {
    const radius = Math.max(Number(brush.value) / 2, 0.5);
    for (let row = Math.max(Math.floor(y - radius), 0); row < Math.min(y + radius, side); row++) {
      for (let column = Math.max(Math.floor(x - radius), 0); column < Math.min(x + radius, side); column++) {
        const inside = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius;
        if (inside || (Math.floor(x) === column && Math.floor(y) === row)) marks[row * side + column] = value;
      }
    }
  }

  function told() {
    const marked = count();
    changed(marked > 0 && marked < side * side);
    redraw();
    return marked;
  }

  const place = event => {
    const box = canvas.getBoundingClientRect();
    return {x: (event.clientX - box.left) / box.width * side, y: (event.clientY - box.top) / box.height * side};
  };

  canvas.addEventListener('pointerdown', event => {
    if (event.button !== 0 || !picture) return;
    canvas.setPointerCapture(event.pointerId);
    last = cursor = place(event);
    dab(last, erasing() ? 0 : 1);
    told();
  });
  canvas.addEventListener('pointermove', event => {
    if (!last) return;
    const to = place(event), steps = Math.ceil(Math.hypot(to.x - last.x, to.y - last.y) * 2) || 1;
    for (let step = 1; step <= steps; step++) {
      dab({x: last.x + (to.x - last.x) * step / steps, y: last.y + (to.y - last.y) * step / steps}, erasing() ? 0 : 1);
    }
    last = cursor = to;
    told();
  });
  for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, () => { last = null; });

  canvas.addEventListener('keydown', event => {
    const stride = Math.max(Math.round(Number(brush.value) / 2), 1);
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const inside = value => Math.min(Math.max(value, 0.5), side - 0.5);
    if (event.key in moves) {
      const [right, down] = moves[event.key];
      cursor = {x: inside(cursor.x + right * stride), y: inside(cursor.y + down * stride)};
    } else if (event.key === ' ') {
      dab(cursor, erasing() ? 0 : 1);
    } else if (event.key === 'Delete' || event.key === 'Backspace') {
      dab(cursor, 0);
    } else {
      return;
    }
    event.preventDefault();
    said.textContent = `row ${Math.floor(cursor.y) + 1}, column ${Math.floor(cursor.x) + 1}; ${told()} pixels marked`;
  });
  canvas.addEventListener('focus', () => { focused = canvas.matches(':focus-visible'); redraw(); });
  canvas.addEventListener('blur', () => { focused = false; redraw(); });
  const sized = () => { brushValue.textContent = `${brush.value} px`; redraw(); };
  brush.addEventListener('input', sized);
  sized();
  erase.addEventListener('click', () => erase.setAttribute('aria-pressed', String(!erasing())));
  clear.addEventListener('click', () => { marks.fill(0); told(); });

  return {
    // Shows another picture; the mask begins anew.
    async open(src) {
      const image = new Image();
      image.src = src;
      await image.decode();
      picture = image;
      marks.fill(0);
      told();
    },
    // The mask as a PNG in base64, white where it marks.
    png() {
      const small = document.createElement('canvas');
      small.width = small.height = side;
      const pixels = new ImageData(side, side);
      marks.forEach((mark, at) => pixels.data.set([255 * mark, 255 * mark, 255 * mark, 255], 4 * at));
      small.getContext('2d').putImageData(pixels, 0, 0);
      return small.toDataURL('image/png').split(',')[1];
    },
    // The picture with its mask, as a URL.
    shown() {
      drawn(false);
      const url = canvas.toDataURL('image/png');
      redraw();
      return url;
    },
  };
}
