// The pictures of a view: gone through by Tab and arrow keys, chosen, dragged onto one another.

const tiles = document.getElementById('tiles');
const DRAG = 6;  // pixels from which a press is a drag

export const buttons = () => [...tiles.querySelectorAll('button.tile')];

// One of the pictures is reached by Tab, the others from it by arrow keys.
export function roving(index, focus = false) {
  const all = buttons();
  const chosen = all.find(button => Number(button.dataset.index) === index) ?? all[0];
  all.forEach(button => { button.tabIndex = button === chosen ? 0 : -1; });
  if (focus) chosen?.focus();
}

function columns() {
  const all = buttons();
  return Math.max(all.filter(button => button.offsetTop === all[0].offsetTop).length, 1);
}

const indexOf = event => {
  const button = event.target.closest?.('button.tile');
  return button && tiles.contains(button) ? Number(button.dataset.index) : null;
};

// tileAt(index): what is shown there. Called: chosen(index); joined(tile, tile) where one was dragged onto another;
// pick(index) and back() by their keys.
export function listen({tileAt, chosen, joined, pick, back}) {
  let drag = null, dragged = false;
  tiles.addEventListener('click', event => {
    const index = indexOf(event);
    if (index !== null && !dragged) chosen(index);
    dragged = false;
  });
  tiles.addEventListener('pointerdown', event => {
    dragged = false;
    const index = indexOf(event);
    if (index !== null && event.button === 0 && event.pointerType !== 'touch') {
      // The tile, and not only its place: another view may come while it is dragged.
      drag = {index, tile: tileAt(index), x: event.clientX, y: event.clientY, ghost: null};
    }
  });
  const over = event => {
    const button = document.elementFromPoint(event.clientX, event.clientY)?.closest('button.tile');
    return button && Number(button.dataset.index) !== drag.index ? button : null;
  };
  addEventListener('pointermove', event => {
    if (!drag) return;
    if (!drag.ghost && Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > DRAG) {
      drag.ghost = document.createElement('img');
      drag.ghost.className = 'ghost';
      drag.ghost.alt = '';
      drag.ghost.src = drag.tile.src;
      document.body.append(drag.ghost);
      document.body.classList.add('dragging');
    }
    if (!drag.ghost) return;
    Object.assign(drag.ghost.style, {left: `${event.clientX}px`, top: `${event.clientY}px`});
    const target = over(event);
    buttons().forEach(button => button.classList.toggle('over', button === target));
  });
  const drop = event => {
    if (!drag) return;
    const {tile, ghost} = drag, target = ghost && event.type === 'pointerup' ? over(event) : null;
    drag = null;
    if (!ghost) return;
    dragged = true;
    ghost.remove();
    document.body.classList.remove('dragging');
    buttons().forEach(button => button.classList.remove('over'));
    if (target) joined(tile, tileAt(Number(target.dataset.index)));
    setTimeout(() => { dragged = false; });
  };
  addEventListener('pointerup', drop);
  addEventListener('pointercancel', drop);
  tiles.addEventListener('keydown', event => {
    const index = indexOf(event);
    if (index === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = buttons(), place = all.findIndex(button => Number(button.dataset.index) === index);
    const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(), Home: -place,
                   End: all.length - 1 - place};
    if (event.key in steps) {
      const next = all[place + steps[event.key]];
      if (next) roving(Number(next.dataset.index), true);
    } else if (event.key === 'i' || event.key === 'I') {
      pick(index);
    } else if (event.key === 'Backspace') {
      back();
    } else {
      return;
    }
    event.preventDefault();
  });
  tiles.addEventListener('focusin', event => {
    const index = indexOf(event);
    if (index !== null) roving(index);
  });
}
