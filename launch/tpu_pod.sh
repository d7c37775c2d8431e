#!/usr/bin/env bash
# A Cloud TPU slice from request to removal, through the queue of resources.
#   bash launch/tpu_pod.sh create --name=pagoda --type=v5litepod-64 --zone=us-west4-a [--spot]
#   bash launch/tpu_pod.sh status --name=pagoda --zone=us-west4-a
#   bash launch/tpu_pod.sh run    --name=pagoda --type=v5litepod-64 --zone=us-west4-a -- \
#     --config=experiments/imagenet_64_to_512.py:published --workdir=gs://BUCKET/imagenet
#   bash launch/tpu_pod.sh logs   --name=pagoda --zone=us-west4-a [--worker=0]
#   bash launch/tpu_pod.sh watch  --name=pagoda --type=v5litepod-64 --zone=us-west4-a --spot -- --config=... --workdir=...
#   bash launch/tpu_pod.sh delete --name=pagoda --zone=us-west4-a
#
# create  asks for the slice; it comes when there is room (see status).
# run     copies the last commit of this checkout to every host, installs it and starts training in the
#         background; a run that exits with 75 is started again where it is.
# watch   create and run, again and again: a spot slice that was taken away is asked for anew, and
#         training goes on from the last checkpoint in --workdir.
#
# --type      accelerator type, such as v4-32, v5litepod-64, v5p-128, v6e-64
# --runtime   software version; default: by --type
# --project   Google Cloud project; default: gcloud's own
# --spot      cheaper, and can be taken away at any moment
# --dry_run   prints the commands instead of running them
# Everything after -- goes to `pagoda run`. --workdir must be on gs://, as every host writes to it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' launch/tpu_pod.sh; }

die() {
  echo "launch/tpu_pod.sh: $1" >&2
  exit 2
}

action=${1-}
case $action in
  create | status | run | logs | watch | delete) shift ;;
  '' | -h | --help)
    usage
    exit 0
    ;;
  *) die "no action '$action'; there are create, status, run, logs, watch, delete" ;;
esac

name='' type='' zone='' project='' runtime='' worker=0 spot='' dry_run=''
training=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      training=("$@")
      break
      ;;
    *) die "no flag '$1'; see --help (flags of training come after --)" ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || die "--name and --zone are needed"
where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi

generation() { # of --type, as launch/xla_flags.sh calls it
  case $type in
    v4-*) echo v4 ;;
    v5litepod-*) echo v5e ;;
    v5p-*) echo v5p ;;
    v6e-*) echo v6e ;;
    *) die "--type=$type: must be v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
}

default_runtime() {
  case $1 in
    v4) echo tpu-ubuntu2204-base ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

gcloud_do() { # runs gcloud, or prints the command
  if [[ -n $dry_run ]]; then
    echo "would run: gcloud$(printf ' %q' "$@")"
  else
    gcloud "$@"
  fi
}

state() { # of the request: ACTIVE, SUSPENDED, ...; nothing where there is none
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

create() {
  local chip
  chip=$(generation)
  gcloud_do compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="${runtime:-$(default_runtime "$chip")}" ${spot:+--spot}
}

remove() { gcloud_do compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

everywhere() { # runs a command on every host
  gcloud_do compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

check_training() {
  [[ " ${training[*]} " == *" --config="* ]] || die "no --config=... after --"
  [[ " ${training[*]} " == *" --workdir=gs://"* ]] || die "no --workdir=gs://... after --: every host writes to it"
}

install='set -e; rm -rf pagoda; mkdir pagoda; tar xzf pagoda.tar.gz -C pagoda; cd pagoda
command -v python3.11 >/dev/null || { sudo apt-get -qq update; sudo apt-get -qq install -y python3.11 python3.11-venv; }
bash launch/venv.sh
.venv/bin/python -m pip install --quiet --disable-pip-version-check "jax[tpu]"'

run() {
  check_training
  local chip start archive
  chip=$(generation)
  start="cd pagoda; source launch/xla_flags.sh $chip
nohup bash launch/keep_going.sh --exit_file=\$HOME/pagoda.exit .venv/bin/python -m pagoda_jax.main run"
  start+="$(printf ' %q' "${training[@]}") >\$HOME/pagoda.log 2>&1 </dev/null & echo \$! >\$HOME/pagoda.pid"
  archive=pagoda.tar.gz
  if [[ -n $dry_run ]]; then
    echo "would run: git archive --format=tar.gz -o $archive HEAD"
  else
    archive=$(mktemp -d)/$archive
    git archive --format=tar.gz -o "$archive" HEAD
  fi
  # Where one of them fails, nothing is started: `watch`, which calls this where a failure ends nothing, tries again.
  gcloud_do compute tpus tpu-vm scp "$archive" "$name:pagoda.tar.gz" "${where[@]}" --worker=all &&
    everywhere "$install" && everywhere "$start"
}

logs() {
  gcloud_do compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$worker" --command='tail -n 100 -F ~/pagoda.log'
}

training_state() { # on host 0: running, gone, or ended and the exit code; nothing where the host cannot be asked
  # shellcheck disable=SC2016 # for the host's shell
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --command='
    if [ -s pagoda.exit ]; then echo "ended $(cat pagoda.exit)"
    elif kill -0 "$(cat pagoda.pid)" 2>/dev/null; then echo running; else echo gone; fi' 2>/dev/null || true
}

watch() {
  check_training
  generation >/dev/null # a wrong --type ends it here, and not below
  if [[ -n $dry_run ]]; then
    echo "would do, and again whenever the slice is taken away, until training ends by itself:"
    create
    run
    return
  fi
  local training_now
  while true; do
    case $(state) in
      ACTIVE)
        training_now=$(training_state)
        case $training_now in
          gone | 'ended 75') run || true ;;
          ended*)
            echo "launch/tpu_pod.sh: training has ended with exit code ${training_now#ended }"
            return "${training_now#ended }"
            ;;
        esac
        ;;
      SUSPENDED | FAILED)
        echo "launch/tpu_pod.sh: the slice was taken away; asking for another" >&2
        remove || true # asked again
        ;;
      '') create || true ;; # or gcloud could not be reached: asked again
    esac
    sleep "${PAGODA_WATCH_SECONDS:-60}"
  done
}

case $action in
  create) create ;;
  status) gcloud_do compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' ;;
  run) run ;;
  logs) logs ;;
  watch) watch ;;
  delete) remove ;;
esac
