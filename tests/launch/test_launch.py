"""The launchers: sound shell and YAML, and what they would do. None of them needs a cloud here."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
  path.relative_to(ROOT).as_posix() for path in (ROOT / 'launch').rglob('*') if path.suffix in ('.sh', '.sbatch')
)
# Those that begin a job.
LAUNCHERS = ('launch/tpu_pod.sh', 'launch/gke/render.sh', 'launch/slurm.sbatch', 'launch/keep_going.sh')
TRAINING = ('--config=experiments/mnist.py', '--workdir=gs://bucket/run')


def bash(*args, check=True, **environment):
  """Output of a script run from the root of the checkout."""
  done = subprocess.run(
    ['bash', *map(str, args)], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
  )
  assert not check or done.returncode == 0, done.stderr
  return done.stdout if check else done


@pytest.fixture
def fake(tmp_path):
  """Puts programs on the PATH that write down how they were called; returns (add, calls, environment)."""
  folder, log = tmp_path / 'bin', tmp_path / 'calls'
  folder.mkdir()
  log.touch()

  def add(name, body=''):
    record = f"echo {name} $(tr '\\n' ' ' <<<\"$*\") >>{log}"
    (folder / name).write_text(f'#!/usr/bin/env bash\nset -f\n{record}\n{body}\n')
    (folder / name).chmod(0o755)

  return add, lambda: log.read_text().splitlines(), {'PATH': f'{folder}:{os.environ["PATH"]}'}


@pytest.mark.parametrize('script', SCRIPTS)
def test_shell_is_sound(script):
  bash('-n', script)
  shellcheck = pathlib.Path(sys.executable).parent / 'shellcheck'
  program = str(shellcheck) if shellcheck.exists() else shutil.which('shellcheck')
  done = subprocess.run([program, '-x', script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', [*LAUNCHERS, 'launch/xla_flags.sh'])
def test_help_says_how_to_call_it(script):
  out = bash(script, '--help')
  assert f'{script} ' in out and '#!' not in out and 'set -' not in out


# Compiler flags


GENERATIONS = ('v4', 'v5e', 'v5p', 'v6e', 'h100')


@pytest.mark.parametrize('chip', GENERATIONS)
def test_every_flag_has_its_reason(chip):
  lines = bash('launch/xla_flags.sh', chip).splitlines()
  assert lines and len(lines) % 2 == 0
  for flag, reason in zip(lines[::2], lines[1::2]):
    assert re.fullmatch(r'(LIBTPU_INIT_ARGS|XLA_FLAGS) --xla_\w+=\w+|XLA_PYTHON_CLIENT_MEM_FRACTION 0\.\d+', flag)
    assert reason.startswith('    ') and len(reason.split()) >= 4
  assert 'rng_bit_generator_unsafe' not in '\n'.join(lines)


def test_sourcing_exports_and_what_the_user_set_comes_last():
  show = 'source launch/xla_flags.sh {} && echo "$LIBTPU_INIT_ARGS|$XLA_FLAGS|$XLA_PYTHON_CLIENT_MEM_FRACTION"'
  unset = {'LIBTPU_INIT_ARGS': '--mine=1', 'XLA_FLAGS': '', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5'}
  tpu, xla, _ = bash('-c', show.format('v6e'), **unset).strip().split('|')
  assert tpu.startswith('--xla_enable_async_all_gather=true ') and tpu.endswith(' --mine=1') and not xla
  assert '--xla_tpu_scoped_vmem_limit_kib=98304' in tpu
  tpu, xla, fraction = bash('-c', show.format('h100'), **unset).strip().split('|')
  assert tpu == '--mine=1' and '--xla_gpu_enable_latency_hiding_scheduler=true' in xla and fraction == '0.5'


def test_unknown_generation_is_an_error_that_lists_them():
  done = bash('launch/xla_flags.sh', 'v99', check=False)
  assert done.returncode == 2 and all(chip in done.stderr for chip in GENERATIONS)
  assert bash('-c', 'source launch/xla_flags.sh; echo $?', check=False).stdout.strip() == '2'


def test_gpu_flags_are_known_to_this_jax():
  """XLA ends the process on a flag that it does not know; TPU flags are known to libtpu only."""
  in_readme = set(re.findall(r'--xla_gpu_\w+=[\w./-]+', (ROOT / 'launch' / 'README.md').read_text()))
  assert sum('autotune' in flag for flag in in_readme) == 3
  program = 'source launch/xla_flags.sh h100 && exec "$0" -c "import jax; jax.numpy.zeros(1)"'
  bash('-c', program, sys.executable, XLA_FLAGS=' '.join(in_readme), JAX_PLATFORMS='cpu')


# keep_going.sh


def test_starts_again_on_75_only(tmp_path):
  count = f'echo x >>{tmp_path}/runs; [[ $(wc -l <{tmp_path}/runs) -lt 3 ]] && exit 75; exit 4'
  done = bash('launch/keep_going.sh', f'--exit_file={tmp_path}/code', 'bash', '-c', count, check=False)
  assert done.returncode == 4 and done.stderr.count('starting again') == 2
  assert (tmp_path / 'runs').read_text().count('x') == 3 and (tmp_path / 'code').read_text() == '4\n'


def test_restarts_have_a_limit():
  done = bash('launch/keep_going.sh', '--restarts=2', 'bash', '-c', 'exit 75', check=False)
  assert done.returncode == 75 and done.stderr.count('starting again') == 2


@pytest.mark.parametrize('flag, said', [('--restarts=ten', 'must be a number'), ('--restart=3', 'no flag')])
def test_a_wrong_flag_is_refused_before_the_command_runs_and_not_after(flag, said, tmp_path):
  done = bash('launch/keep_going.sh', flag, 'touch', f'{tmp_path}/ran', check=False)
  assert done.returncode == 2 and said in done.stderr and not (tmp_path / 'ran').exists()


def test_sigterm_reaches_the_command_which_may_take_its_time(tmp_path):
  """It saves, exits with 75, and is not started again: the machine is going away."""
  saving = f'trap "sleep 0.5; echo saved >{tmp_path}/saved; exit 75" TERM; echo up >{tmp_path}/up; sleep 30 & wait'
  process = subprocess.Popen(['bash', 'launch/keep_going.sh', 'bash', '-c', saving], cwd=ROOT)
  deadline = time.monotonic() + 20
  while not (tmp_path / 'up').exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 75
  assert (tmp_path / 'saved').exists()


def test_ctrl_c_at_a_terminal_reaches_the_command_once():
  """By the script alone: told by the terminal too, it would take that for a second one, and stop without saving."""
  saving = ('import os, signal, time\ncame = []\nsignal.signal(signal.SIGINT, lambda *unused: came.append(1))\n'
            'print("by the terminal:", os.tcgetpgrp(1) == os.getpgrp(), flush=True)\n'
            'for _ in range(3000):\n  if came:\n    raise SystemExit(0)\n  time.sleep(0.01)\nraise SystemExit(1)')
  # A test run in the background ignores Ctrl-C, and so would what it starts.
  terminal = ('import pty, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); '
              'sys.exit(pty.spawn(sys.argv[1:]) >> 8)')
  args = [sys.executable, '-c', terminal, 'bash', 'launch/keep_going.sh', sys.executable, '-c', saving]
  with subprocess.Popen(args, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    said = process.stdout.readline()
    process.stdin.write(b'\x03')
    process.stdin.flush()
    assert (process.wait(timeout=60), said) == (0, b'by the terminal: False\r\n')


# TPU pods


def tpu(action, *flags, check=True, training=TRAINING, **environment):
  flags = ('--name=pagoda', '--zone=us-west4-a', *flags)
  return bash('launch/tpu_pod.sh', action, *flags, '--', *training, check=check, **environment)


@pytest.mark.parametrize('type, runtime', [
  ('v4-32', 'tpu-ubuntu2204-base'), ('v5litepod-64', 'v2-alpha-tpuv5-lite'), ('v5p-128', 'v2-alpha-tpuv5'),
  ('v6e-64', 'v2-alpha-tpuv6e'),
])  # fmt: skip
def test_request_for_a_slice(type, runtime):
  out = tpu('create', f'--type={type}', '--project=p', '--spot', '--dry_run')
  assert out.strip() == (
    'would run: gcloud compute tpus queued-resources create pagoda --node-id=pagoda --zone=us-west4-a --project=p '
    f'--accelerator-type={type} --runtime-version={runtime} --spot'
  )


def test_run_copies_installs_and_starts():
  lines = tpu('run', '--type=v5litepod-64', '--dry_run', training=(*TRAINING, '--config.note=a b')).splitlines()
  assert [line.split()[2:6] for line in lines] == [
    ['git', 'archive', '--format=tar.gz', '-o'],
    ['gcloud', 'compute', 'tpus', 'tpu-vm'],
    ['gcloud', 'compute', 'tpus', 'tpu-vm'],
    ['gcloud', 'compute', 'tpus', 'tpu-vm'],
  ]
  assert 'jax[tpu]' in lines[2]
  assert '--worker=all' in lines[2] and 'epath-gcs' not in lines[2]  # the locked requirements have it
  assert 'source launch/xla_flags.sh v5e' in lines[3] and 'keep_going.sh' in lines[3]
  assert f'python -m pagoda_jax.main run {" ".join(TRAINING)}' in lines[3]


def test_delete_logs_and_status():
  assert 'queued-resources delete pagoda --zone=us-west4-a --force --quiet' in tpu('delete', '--dry_run')
  assert 'tail' in tpu('logs', '--worker=3', '--dry_run') and '--worker=3' in tpu('logs', '--worker=3', '--dry_run')
  assert 'queued-resources describe pagoda' in tpu('status', '--dry_run')


@pytest.mark.parametrize('flags, training, said', [
  (('create', '--type=v99-8'), TRAINING, 'must be v4-N'),
  (('watch', '--type=v99-8'), TRAINING, 'must be v4-N'),
  (('run', '--type=v4-8'), ('--config=a.py', '--workdir=/home/me'), 'every host writes to it'),
  (('run', '--type=v4-8'), ('--workdir=gs://b/r',), 'no --config'),
  (('create', '--tpye=v4-8'), TRAINING, "no flag '--tpye=v4-8'"),
  (('destroy',), TRAINING, "no action 'destroy'"),
])  # fmt: skip
def test_wrong_tpu_calls_do_nothing(flags, training, said, fake):
  add, calls, environment = fake
  add('gcloud')
  done = tpu(*flags, check=False, training=training, **environment)
  assert done.returncode == 2 and said in done.stderr and calls() == []


@pytest.mark.parametrize('failing', [[], ['delete', 'scp', 'jax[tpu]']])
def test_watch_asks_anew_when_a_slice_is_taken_away(failing, fake, tmp_path):
  """Taken away, asked for again, started; preempted where it is, started again; ended. What fails once is tried again,
  and nothing is started after it."""
  add, calls, environment = fake
  states = ['SUSPENDED', *['SUSPENDED'] * ('delete' in failing), '', *['ACTIVE'] * 7]
  training = ['gone', *['gone'] * len({*failing} - {'delete'}), 'running', 'ended 75', 'running', 'ended 0']
  for number in range(len(failing)):
    (tmp_path / f'fails{number}').touch()
  (tmp_path / 'state').write_text('\n'.join(states) + '\n')
  (tmp_path / 'training').write_text('\n'.join(training) + '\n')
  answer = 'head -n 1 {0}; sed -i 1d {0}'
  add('sleep')
  add(
    'gcloud',
    f"""case "$*" in
    *describe*) {answer.format(tmp_path / 'state')} ;;
    *'cat pagoda.exit'*) {answer.format(tmp_path / 'training')} ;;
    {''.join(f"*'{words}'*) rm {tmp_path}/fails{number} 2>/dev/null && exit 1 ;; "
             for number, words in enumerate(failing))}
  esac
  exit 0""",
  )
  done = tpu('watch', '--type=v4-8', check=False, **environment)
  assert done.returncode == 0 and 'ended with exit code 0' in done.stdout
  steps = {'describe': '', 'cat pagoda.exit': '', 'delete': 'delete', 'create': 'create', 'scp': 'copy',
           'jax[tpu]': 'install', 'keep_going': 'start'}  # fmt: skip
  gcloud = [call for call in calls() if call.startswith('gcloud')]
  done = [next(step for words, step in steps.items() if words in call) for call in gcloud]
  start = ['copy', 'install', 'start']
  failed = (['delete'], ['copy', 'copy', 'install']) if failing else ([], [])
  assert [step for step in done if step] == [*failed[0], 'delete', 'create', *failed[1], *start, *start]


# Slurm


def slurm(*flags, check=True, **environment):
  return bash('launch/slurm.sbatch', *flags, check=check, **environment)


def test_slurm_directives_and_dry_run():
  out = slurm('--dry_run', *TRAINING, '--config.note=a b')
  for directive in ('--requeue', '--signal=TERM@300', '--open-mode=append', '--nodes=2'):
    assert f'#SBATCH {directive}' in out
  assert 'would run: source launch/xla_flags.sh h100' in out
  training = ' '.join(TRAINING)
  assert f'--wait=300 .venv/bin/python -m pagoda_jax.main run {training} --config.note=a\\ b' in out
  assert 'on exit code 75, up to 100 times: scontrol requeue' in out


@pytest.mark.parametrize('code, restarts, requeued, expected', [
  (75, '0', True, 0), (75, '99', True, 0), (75, '100', False, 75), (0, '0', False, 0), (1, '0', False, 1),
])  # fmt: skip
def test_slurm_queues_again_on_75_only(code, restarts, requeued, expected, fake):
  add, calls, environment = fake
  add('srun', f'exit {code}')
  add('scontrol')
  environment |= {'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_JOB_ID': '42', 'SLURM_RESTART_COUNT': restarts}
  done = slurm(*TRAINING, check=False, **environment)
  assert done.returncode == expected
  assert calls()[0].startswith('srun --kill-on-bad-exit=0') and calls()[0].endswith(' '.join(TRAINING))
  assert calls()[1:] == (['scontrol requeue 42'] if requeued else [])


def test_slurm_without_a_config():
  done = slurm('--workdir=/shared/run', check=False)
  assert done.returncode == 2 and '--config' in done.stderr


# GKE


TPU_FLAGS = ('--kind=tpu', '--accelerator=tpu-v5-lite-podslice', '--topology=8x8', '--nodes=16')
GPU_FLAGS = ('--kind=gpu', '--nodes=2')

# Required fields of a JobSet and of what is in it; a type, a value, or what lies below.
JOBSET = {
  'apiVersion': 'jobset.x-k8s.io/v1alpha2',
  'kind': 'JobSet',
  'metadata': {'name': 'pagoda'},
  'spec': {
    'failurePolicy': {'maxRestarts': int, 'rules': list},
    'replicatedJobs': [{
      'name': 'workers',
      'replicas': 1,
      'template': {'spec': {
        'parallelism': int,
        'completions': int,
        'completionMode': 'Indexed',
        'backoffLimit': 0,
        'podFailurePolicy': {'rules': list},
        'template': {'spec': {
          'restartPolicy': 'Never',
          'terminationGracePeriodSeconds': int,
          'nodeSelector': dict,
          'containers': [{
            'name': 'train',
            'image': 'IMAGE',
            'command': list,
            'lifecycle': {'preStop': {'exec': {'command': list}}},
            'resources': {'requests': dict, 'limits': dict},
          }],
        }},
      }},
    }],
  },
}  # fmt: skip


def assert_has(value, schema, where='jobset'):
  if isinstance(schema, dict):
    assert isinstance(value, dict), where
    for key, below in schema.items():
      assert key in value, f'{where}.{key}'
      assert_has(value[key], below, f'{where}.{key}')
  elif isinstance(schema, list):
    assert isinstance(value, list) and len(value) == len(schema), where
    for number, below in enumerate(schema):
      assert_has(value[number], below, f'{where}[{number}]')
  elif isinstance(schema, type):
    assert type(value) is schema, where
  else:
    assert value == schema, where


def test_an_image_is_without_what_git_ignores_and_without_its_history():
  """`COPY . .` would take the runs and the environment of this checkout along, gigabytes of them."""
  def patterns(name):
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    return {line.removeprefix('**/').rstrip('/') for line in lines if line and not line.startswith('#')}

  assert patterns('.gitignore') | {'.git'} <= patterns('.dockerignore')


def render(*flags, check=True, training=TRAINING, **environment):
  flags = ('--name=pagoda', '--image=IMAGE', *flags)
  return bash('launch/gke/render.sh', *flags, '--', *training, check=check, **environment)


def pod_of(jobset):
  return jobset['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']


@pytest.mark.parametrize('flags', [TPU_FLAGS, GPU_FLAGS])
def test_jobset_has_what_it_needs(flags):
  text = render(*flags, '--dry_run')
  jobset = yaml.safe_load(text)
  assert '${' not in text.replace('fills in ${...}', '')
  assert_has(jobset, JOBSET)
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  nodes = int(flags[-1].split('=')[1])
  assert job['parallelism'] == job['completions'] == nodes
  assert pod_of(jobset)['terminationGracePeriodSeconds'] >= 120
  resources = pod_of(jobset)['containers'][0]['resources']
  assert resources['requests'] == resources['limits']
  (mount,), (volume,) = pod_of(jobset)['containers'][0]['volumeMounts'], pod_of(jobset)['volumes']
  assert mount == {'name': volume['name'], 'mountPath': '/dev/shm'} and volume['emptyDir'] == {'medium': 'Memory'}


@pytest.mark.parametrize('flags', [TPU_FLAGS, GPU_FLAGS])
def test_preemption_restarts_without_counting(flags):
  jobset = yaml.safe_load(render(*flags, '--dry_run'))
  (rule,) = jobset['spec']['failurePolicy']['rules']
  assert rule['action'] == 'RestartJobSetAndIgnoreMaxRestarts' and rule['onJobFailureReasons'] == ['PodFailurePolicy']
  rules = jobset['spec']['replicatedJobs'][0]['template']['spec']['podFailurePolicy']['rules']
  assert rules[0]['onExitCodes'] == {'containerName': 'train', 'operator': 'In', 'values': [75]}
  assert {'type': 'DisruptionTarget'} in rules[1]['onPodConditions']
  assert all(r['action'] == 'FailJob' for r in rules)


def test_commands_in_the_pods():
  tpu_pod, gpu_pod = (pod_of(yaml.safe_load(render(*flags, '--dry_run'))) for flags in (TPU_FLAGS, GPU_FLAGS))
  training = ' '.join(TRAINING)
  run = f'exec python -m pagoda_jax.main run {training}'
  assert tpu_pod['containers'][0]['command'] == ['bash', '-c', f'source launch/xla_flags.sh v5e && {run}']
  assert tpu_pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == '8x8'
  assert gpu_pod['containers'][0]['command'][2] == (
    f'source launch/xla_flags.sh h100 && {run} --coordinator_address=pagoda-workers-0-0.pagoda:8476 '
    '--num_processes=2 --process_id=$JOB_COMPLETION_INDEX'
  )
  for pod in (tpu_pod, gpu_pod):
    hook = pod['containers'][0]['lifecycle']['preStop']['exec']['command']
    assert hook[:2] == ['bash', '-c'] and hook[2].startswith('kill -TERM 1;')


@pytest.mark.parametrize('flags', [TPU_FLAGS, GPU_FLAGS])
def test_spot_nodes_on_request(flags):
  selector = 'cloud.google.com/gke-spot'
  assert selector not in pod_of(yaml.safe_load(render(*flags, '--dry_run')))['nodeSelector']
  assert pod_of(yaml.safe_load(render(*flags, '--spot', '--dry_run')))['nodeSelector'][selector] == 'true'


def test_jobset_goes_to_kubectl(fake, tmp_path):
  add, calls, environment = fake
  add('kubectl', f'cat >{tmp_path}/applied')
  render(*GPU_FLAGS, **environment)
  assert calls() == ['kubectl apply -f -']
  assert_has(yaml.safe_load((tmp_path / 'applied').read_text()), JOBSET)


@pytest.mark.parametrize('flags, training, said', [
  (('--kind=cpu',), TRAINING, 'must be tpu or gpu'),
  (('--kind=tpu', '--accelerator=tpu-v6e-slice'), TRAINING, '--topology is needed'),
  (GPU_FLAGS, ('--config=a.py',), '--workdir'),
  (GPU_FLAGS, (*TRAINING, '--config.x=$(reboot)'), 'characters'),
  ((*GPU_FLAGS, '--nods=3'), TRAINING, "no flag '--nods=3'"),
])  # fmt: skip
def test_wrong_gke_calls_do_nothing(flags, training, said, fake):
  add, calls, environment = fake
  add('kubectl')
  done = render(*flags, check=False, training=training, **environment)
  assert done.returncode == 2 and said in done.stderr and calls() == []
