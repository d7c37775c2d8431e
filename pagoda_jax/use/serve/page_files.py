"""The files of the page, for the server and for the folder that needs none."""

import pathlib

from pagoda_jax.evaluation import report

FOLDER = pathlib.Path(__file__).parent / 'page'
# The name by which the page knows each -> the file. Beside them page.html, and as backend.js what draws: server.js or
# static.js.
FILES = {'report.css': pathlib.Path(report.__file__).parent / 'page.css'} | {  # both pages look alike
  name: FOLDER / name for name in ('page.css', 'page.js', 'tiles.js', 'mask.js', 'noise.js')}
