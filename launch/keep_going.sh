#!/usr/bin/env bash
# Runs a command, again and again while it exits with 75 (preempted, and has saved); any other exit code
# ends it, and is its own.
#   bash launch/keep_going.sh [--restarts=1000] [--exit_file=FILE] [--dry_run] COMMAND [ARGUMENT ...]
# --exit_file  where to write the exit code at the end, for whoever looks from outside
# SIGTERM and SIGINT go to the command, which then is not started again: the machine is going away.
set -uo pipefail

restarts=1000 exit_file=''
while (($#)); do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --exit_file=*) exit_file=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    -h | --help)
      sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --*)
      echo "launch/keep_going.sh: no flag '$1'; see --help" >&2
      exit 2
      ;;
    *) break ;;
  esac
  shift
done
if [[ ! $restarts =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
  echo "launch/keep_going.sh: --restarts=$restarts: must be a number" >&2
  exit 2
fi
if ((!$#)); then
  echo "launch/keep_going.sh: no command given; see --help" >&2
  exit 2
fi
if [[ -n ${dry_run-} ]]; then
  echo "would run, and start again up to $restarts times on exit code 75: $*"
  exit 0
fi

if [[ -n $exit_file ]]; then rm -f "$exit_file"; fi
stopping='' # a signal came
child=''
unsent='' # the signal, where the command was not yet there to get it
# shellcheck disable=SC2317,SC2329 # the traps call it
forward() {
  stopping=1
  if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null; else unsent=$1; fi
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP # the terminal is closed; under nohup it stays ignored

for ((attempt = 0; ; attempt++)); do
  child=''
  # In a process group of its own: a terminal's Ctrl-C would come to it twice, and the second stops it unsaved.
  set -m
  "$@" &
  child=$!
  set +m
  if [[ -n $unsent ]]; then kill -s "$unsent" "$child" 2>/dev/null; fi
  wait "$child"
  code=$?
  # A signal ends `wait` early, with a code above 128; the command may still be saving.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  if ((code != 75 || attempt >= restarts)) || [[ -n $stopping ]]; then break; fi
  echo "launch/keep_going.sh: exit code 75, starting again (restart $((attempt + 1)) of $restarts)" >&2
done
if [[ -n $exit_file ]]; then echo "$code" >"$exit_file"; fi
exit "$code"
