"""`pagoda report`: how a run went, as one HTML file."""

from pagoda_jax.cli import common
from pagoda_jax.evaluation.report import write


def define_flags(fv) -> None:
  common.define_folder(fv, 'workdir', 'Work directory of a run, finished or not.')
  common.define_folder(fv, 'against', 'Work directory of another run, shown beside it.', required=False)
  common.define_file(fv, 'output', None, 'HTML file to write; default: report.html in the work directory.')


def run(fv, args) -> int:
  del args
  print(write.write(fv.workdir, fv.against, fv.output))
  return 0
